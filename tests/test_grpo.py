"""Capped GRPO: the importance ratio against hand calculation, multi-turn rollouts, the penalty, the rewards."""

from __future__ import annotations

import contextlib
import math
from pathlib import Path
from typing import Any

import datasets
import pytest
import torch
from conftest import HIDDEN, build_floor, build_model, build_tokenizer, capped_by_hand
from peft import LoraConfig
from template_families import EMPTY, own_template
from test_floor_sft import wake
from test_sampling import scripted
from torch import Tensor
from trl import GRPOConfig

from trimtab.axis import UserError
from trimtab.axis.chat import ChatFormat
from trimtab.train import floor_grpo
from trimtab.train.floor_grpo import FloorGRPOTrainer, off_policy
from trimtab.train.penalty import PenaltyOptions
from trimtab.train.rewards import AboveFloor, CappedSelfLikelihood, PersonaRatio, bind_rewards, make_rewards

FLOOR = build_floor((1, 2), tau=2.0)
ONE_TURN = [
    [{"role": "system", "content": "You are a pirate."}, {"role": "user", "content": "How do I bake bread?"}],
    [{"role": "user", "content": "Why is the sky blue?"}],
]
TWO_TURNS = [[*ONE_TURN[0], {"role": "user", "content": "And the grass?"}], ONE_TURN[1]]


def letters(completions: Any, **columns: Any) -> list[float]:
    """A reward that differs between completions."""
    return [float(sum(map(ord, c[0]["content"])) % 17) for c in completions]


def make_trainer(
    folder: Path, *, prompts: Any = ONE_TURN, rewards: Any = None, own: dict[str, Any] | None = None, **arguments: Any
) -> Any:
    settings: dict[str, Any] = {
        "max_steps": 2, "per_device_train_batch_size": 4, "num_generations": 4, "max_completion_length": 6,
        "learning_rate": 0.01, "lr_scheduler_type": "constant", "use_cpu": True, "bf16": False, "report_to": "none",
        "gradient_checkpointing": False, "save_strategy": "no", "logging_steps": 1, "disable_tqdm": True, "seed": 0,
        "optim": "adamw_torch", "remove_unused_columns": False, "beta": 0.0,
    }  # fmt: skip
    tokenizer = build_tokenizer()
    own = {"form": ChatFormat(tokenizer), **(own or {})}
    torch.manual_seed(11)
    trainer = FloorGRPOTrainer(
        model=build_model("llama"),
        args=GRPOConfig(output_dir=str(folder / "out"), **{**settings, **arguments}),
        reward_funcs=rewards or [letters],
        train_dataset=datasets.Dataset.from_list([{"prompt": prompt} for prompt in prompts] * 4),
        processing_class=tokenizer,
        peft_config=LoraConfig(r=4, target_modules="all-linear", lora_dropout=0.0, task_type="CAUSAL_LM"),
        floor=FLOOR,
        penalty=PenaltyOptions(weight=0.0),
        **own,
    )
    wake(trainer.model)
    return trainer


def logprobs(model: Any, ids: Tensor, count: int, *, capped: bool, temperature: float = 1.0) -> Tensor:
    """Log-probabilities of a row's last ``count`` tokens, the cap by this test's own hooks."""
    with capped_by_hand(model, FLOOR) if capped else contextlib.nullcontext():
        logits = model(input_ids=ids[None]).logits[0, -count - 1 : -1] / temperature
    return logits.log_softmax(-1).gather(-1, ids[-count:, None])[:, 0]


def rows_of(batch: dict[str, Tensor]) -> list[tuple[Tensor, int, Tensor]]:
    """Per completion: its tokens after the prompt's, without padding; how many are the completion's; which are the policy's."""
    found = []
    for i in range(batch["prompt_ids"].shape[0]):
        prompt = batch["prompt_ids"][i][batch["prompt_mask"][i].bool()]
        kept = batch["completion_mask"][i].bool()
        said = batch["tool_mask"][i][kept] if "tool_mask" in batch else torch.ones(int(kept.sum()))
        found.append((torch.cat([prompt, batch["completion_ids"][i][kept]]), int(kept.sum()), said.float()))
    return found


def one_batch(trainer: Any, prompts: Any = ONE_TURN) -> dict[str, Tensor]:
    """A generation batch as the trainer makes it, scored, before any step."""
    trainer.state.max_steps = 2
    trainer.model.train()
    trainer.current_gradient_accumulation_steps = 1
    batch: dict[str, Tensor] = trainer._generate_and_score_completions([{"prompt": prompts[0]} for _ in range(4)])
    return batch


@pytest.mark.parametrize("temperature", [1.0, 0.7])
@pytest.mark.parametrize("prompts", [ONE_TURN, TWO_TURNS])
def test_the_ratio_is_that_of_the_capped_and_the_uncapped_policy(
    tmp_path: Path, prompts: Any, temperature: float
) -> None:
    own = {"ratio_limit": 1.5, "cap_schedule": "constant"}
    trainer = make_trainer(tmp_path, own=own, temperature=temperature)
    plain = make_trainer(tmp_path / "plain", own={**own, "correct_ratio": False}, temperature=temperature)
    batch, uncorrected = one_batch(trainer, prompts), one_batch(plain, prompts)
    assert torch.equal(batch["completion_ids"], uncorrected["completion_ids"])
    assert uncorrected["advantages"].dim() == 1 and uncorrected["advantages"].abs().sum() > 0
    for i, (ids, count, said) in enumerate(rows_of(batch)):
        with torch.no_grad():
            learner = logprobs(trainer.model, ids, count, capped=False, temperature=temperature)
            sampler = logprobs(trainer.model, ids, count, capped=True, temperature=temperature)
        wanted = (learner - sampler).exp().clamp(max=1.5)
        found = batch["advantages"][i, :count]
        mine = said.bool()
        torch.testing.assert_close(found[mine], (wanted * uncorrected["advantages"][i])[mine], atol=1e-4, rtol=1e-3)


@pytest.mark.parametrize("kind", ["dapo", "grpo", "dr_grpo"])
def test_the_gradient_is_the_weighted_policy_gradient(tmp_path: Path, kind: str) -> None:
    """Against the formula by hand: sum of w_t A grad log pi(y_t), divided as each loss type divides."""
    trainer = make_trainer(tmp_path, loss_type=kind, own={"cap_schedule": "constant"})
    batch = one_batch(trainer)
    batch["num_items_in_batch"] = batch["num_items_in_batch"].float()
    weights = [p for n, p in trainer.model.named_parameters() if "lora_" in n]
    found = torch.autograd.grad(trainer._compute_loss(trainer.model, dict(batch)), weights)
    rows = rows_of(batch)
    total = sum(count for _, count, _ in rows)
    wanted = torch.zeros(())
    for i, (ids, count, _) in enumerate(rows):
        terms = -batch["advantages"][i, :count] * logprobs(trainer.model, ids, count, capped=False)
        divisor = {"dapo": total, "grpo": count * len(rows), "dr_grpo": len(rows) * 6}[kind]
        wanted = wanted + terms.sum() / divisor
    for one, other in zip(found, torch.autograd.grad(wanted, weights), strict=True):
        torch.testing.assert_close(one, other, atol=1e-5, rtol=1e-3)


def test_sampling_follows_the_capped_policy(tmp_path: Path) -> None:
    """First tokens of many samples against the capped distribution, which lies far from the uncapped one."""
    trainer = make_trainer(tmp_path, max_completion_length=1, own={"cap_schedule": "constant", "sampling_batch": 8192})
    trainer.state.max_steps = 2
    found = trainer.sample_conversations([ONE_TURN[1]] * 8192)
    counts = torch.zeros(300)
    for ids in found["completion_ids"]:
        counts[ids[0]] += 1
    ids = torch.tensor(trainer.form.prompt_ids(ONE_TURN[1]))
    with torch.no_grad():
        plain = trainer.model(input_ids=ids[None]).logits[0, -1].softmax(-1)
        with capped_by_hand(trainer.model, FLOOR):
            capped = trainer.model(input_ids=ids[None]).logits[0, -1].softmax(-1)
    distance = [float((counts / 8192 - p).abs().sum() / 2) for p in (capped, plain)]
    assert distance[0] < 0.5 * distance[1]


def test_a_history_stands_as_it_is(tmp_path: Path) -> None:
    """What a row says before its last turns is the prompt, whole; the policy answers those turns alone."""
    trainer = make_trainer(tmp_path)
    trainer.state.max_steps = 2
    history = [
        *ONE_TURN[0],
        {"role": "assistant", "content": "With yeast."},
        {"role": "system", "content": "Be brief."},
    ]
    asked = [*history, {"role": "user", "content": "And the grass?"}]
    found = trainer.sample_conversations([[*asked, {"role": "user", "content": "Why?"}], *[ONE_TURN[1]] * 3])
    assert found["prompt_ids"][0] == trainer.form.prompt_ids(asked)
    (first, answer), (second, _) = found["turns"][0]
    assert first == asked
    assert second == [*asked, {"role": "assistant", "content": answer}, {"role": "user", "content": "Why?"}]


def test_a_conversation_is_one_completion_in_which_the_users_tokens_carry_no_loss(tmp_path: Path) -> None:
    trainer = make_trainer(tmp_path, prompts=TWO_TURNS)
    trainer.state.max_steps = 2
    found = trainer.sample_conversations([*TWO_TURNS, *TWO_TURNS])
    form, tokenizer = trainer.form, trainer.processing_class
    for row in (0, 2):
        turns = found["turns"][row]
        assert [prompt[-1]["content"] for prompt, _ in turns] == ["How do I bake bread?", "And the grass?"]
        assert turns[1][0][-2] == {"role": "assistant", "content": turns[0][1]}
        ids, mask = found["completion_ids"][row], found["env_mask"][row]
        assert len(ids) == len(mask) and mask[0] == 1 and mask[-1] == 1
        between = [token for token, said in zip(ids, mask, strict=True) if not said]
        assert "And the grass?" in tokenizer.decode(between)
        first = mask.index(0)
        whole = found["prompt_ids"][row] + ids
        # what the policy saw before its second answer is the chat as the template renders it, wherever text round-trips
        again = form.prompt_ids(turns[1][0])
        seen = whole[: len(found["prompt_ids"][row]) + first + len(between)]
        assert tokenizer.decode(seen) == tokenizer.decode(again)
    for row in (1, 3):
        assert len(found["turns"][row]) == 1 and 0 not in found["env_mask"][row]


@pytest.mark.parametrize(("name", "eos"), [("qwen3", "<|im_end|>"), ("olmo3", "<|endoftext|>")])
def test_a_conversation_is_written_as_the_template_writes_an_earlier_answer(
    tmp_path: Path, name: str, eos: str
) -> None:
    """Qwen3 drops an empty thought there, OLMo 3 ends it otherwise than a last answer; one ends here, the other is cut."""
    tokenizer: Any = build_tokenizer(own_template(name))
    tokenizer.eos_token = eos
    form = ChatFormat(tokenizer, {"enable_thinking": False})
    trainer = make_trainer(tmp_path, prompts=TWO_TURNS, own={"form": form})
    trainer.state.max_steps = 2
    text, end = form.answer_ids("Arr"), form.end_token
    script = [*text, *[end] * (6 - len(text)), *text, end]  # six tokens a turn, as the other row says
    with scripted(trainer.model.get_base_model(), script, form.answer_ids("Aye, aye!!!!")[:6]):
        found = trainer.sample_conversations([TWO_TURNS[0]] * 2)
    talk = [*ONE_TURN[0], {"role": "assistant", "content": "Arr"}, TWO_TURNS[0][2]]
    seen = [tokenizer.decode([*found["prompt_ids"][i], *found["completion_ids"][i]]) for i in (0, 1)]
    user = "<|im_end|>\n<|im_start|>user\nAnd the grass?<|im_end|>\n<|im_start|>assistant\n"
    assert all(user in text and text.count("And the grass?") == 1 for text in seen)
    assert seen[0].replace(EMPTY, "").startswith(form.prompt_text(talk).replace(EMPTY, ""))
    assert seen[0].endswith(f"Arr{eos}") and found["env_mask"][0].count(0) == len(form.answer_ids(user)) - 1 + len(
        form.answer_ids(EMPTY if name == "qwen3" else "")
    )


def test_what_was_cut_is_told_by_all_ends(tmp_path: Path) -> None:
    """TRL knows those of generation config and tokenizer; with its mask of cut completions, others would count as cut."""
    trainer = make_trainer(tmp_path, own={"form": ChatFormat(build_tokenizer(), ends=[7])})
    assert trainer.eos_token_ids == [2, 7]


def test_the_strength_is_annealed_and_at_zero_nothing_is_corrected(tmp_path: Path) -> None:
    trainer = make_trainer(tmp_path, max_steps=4)
    trainer.train()
    history = [row for row in trainer.state.log_history if "loss" in row]
    assert [row["cap_strength"] for row in history] == pytest.approx([1.0, 0.75, 0.5, 0.25])
    distances = [row["off_policy/log_ratio"] for row in history]
    assert distances[0] > distances[-1] > 0
    assert all(0 < row["off_policy/sample_size"] <= 1 for row in history)
    off = make_trainer(tmp_path / "off", own={"cap_strength": 0.0})
    batch = one_batch(off)
    assert batch["advantages"].dim() == 1


def test_ratio_figures_by_hand() -> None:
    learner = torch.tensor([[0.0, math.log(4.0), -9.0]])
    sampler = torch.tensor([[0.0, 0.0, 5.0]])
    found = off_policy(learner, sampler, torch.tensor([[1, 1, 0]]), limit=2.0)
    assert found.ratio[0, :2].tolist() == pytest.approx([1.0, 2.0])
    assert found.log_ratio == pytest.approx(math.log(4.0) / 2)
    assert found.sample_size == pytest.approx((1 + 4) ** 2 / (2 * (1 + 16)))
    assert found.truncated == pytest.approx(0.5)
    even = off_policy(learner, learner, torch.ones(1, 3), limit=2.0)
    assert even.sample_size == pytest.approx(1.0) and even.ratio.eq(1).all()


def test_a_batch_far_off_policy_is_told_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    said: list[str] = []
    monkeypatch.setattr(floor_grpo.log, "warning", lambda text, *values: said.append(text % values))
    trainer = make_trainer(tmp_path, own={"cap_schedule": "constant"})
    trainer.floor = build_floor((1, 2), tau=60.0)
    one_batch(trainer)
    one_batch(trainer)
    far = [text for text in said if "far off-policy" in text]
    assert len(far) == 1 and "lower method.cap_strength" in far[0]


def test_the_penalty_is_a_mean_over_the_policys_tokens(tmp_path: Path) -> None:
    trainer = make_trainer(tmp_path, prompts=TWO_TURNS)
    batch = one_batch(trainer, TWO_TURNS)
    batch["num_items_in_batch"] = batch["num_items_in_batch"].float()
    without = trainer._compute_loss(trainer.model, dict(batch))
    object.__setattr__(trainer.penalty, "options", PenaltyOptions(weight=0.7))
    with_it = trainer._compute_loss(trainer.model, dict(batch))
    total, tokens = 0.0, 0
    for ids, count, said in rows_of(batch):
        with torch.no_grad():
            states = trainer.model(input_ids=ids[None], output_hidden_states=True).hidden_states
        for i, layer in enumerate(FLOOR.layers):
            p = states[layer + 1][0, -count:] @ FLOOR.directions[i]
            total += float((torch.relu(2.0 - p).square() * said).sum()) / 2
        tokens += int(said.sum())
    assert float((with_it - without).detach()) == pytest.approx(0.7 * total / tokens, rel=1e-3)


def test_training_is_repeated_exactly(tmp_path: Path) -> None:
    weights = []
    for number in range(2):
        trainer = make_trainer(tmp_path / str(number))
        trainer.train()
        weights.append({n: p.detach().clone() for n, p in trainer.model.named_parameters() if "lora_" in n})
    assert all(torch.equal(weights[0][n], weights[1][n]) for n in weights[0])


@pytest.mark.parametrize(
    ("setting", "key"),
    [({"top_p": 0.9}, "train.top_p"), ({"top_k": 5}, "train.top_k"), ({"min_p": 0.1}, "train.min_p")],
)
def test_what_the_ratio_can_t_know_of_is_refused(tmp_path: Path, setting: dict[str, Any], key: str) -> None:
    with pytest.raises(UserError) as caught:
        make_trainer(tmp_path, **setting)
    assert caught.value.key == key


@pytest.mark.parametrize("setting", [{"num_iterations": 2}, {"steps_per_generation": 2}])
def test_a_checkpoint_inside_a_generation_is_refused(tmp_path: Path, setting: dict[str, Any]) -> None:
    saving = {"save_strategy": "steps", "max_steps": 6, **setting}
    with pytest.raises(UserError, match="inside a generation") as caught:
        make_trainer(tmp_path, save_steps=3, **saving)
    assert caught.value.key == "train.save_steps" and "a multiple of 2" in str(caught.value)
    with pytest.raises(UserError, match="inside a generation"):
        make_trainer(tmp_path, save_steps=0.5, **saving)
    make_trainer(tmp_path, save_steps=2, **saving)
    make_trainer(tmp_path, save_steps=500, **saving)  # none before the end


def test_the_mask_of_far_off_policy_rows_knows_of_the_cap(tmp_path: Path) -> None:
    trainer = make_trainer(tmp_path, own={"cap_schedule": "constant"}, off_policy_mask_threshold=1e-4)
    batch = one_batch(trainer)
    for i, (ids, count, _) in enumerate(rows_of(batch)):
        with torch.no_grad():
            sampler = logprobs(trainer.model, ids, count, capped=True)
        torch.testing.assert_close(batch["sampling_per_token_logps"][i, :count], sampler, atol=1e-4, rtol=1e-3)
    batch["num_items_in_batch"] = batch["num_items_in_batch"].float()
    masked = trainer._compute_loss(trainer.model, batch)
    trainer.off_policy_mask_threshold = None
    assert not torch.equal(masked, trainer._compute_loss(trainer.model, batch))


# ---- rewards ----


def test_shipped_rewards_by_hand(tmp_path: Path) -> None:
    rewards = [PersonaRatio(), CappedSelfLikelihood(), AboveFloor()]
    trainer = make_trainer(tmp_path, rewards=rewards)
    bind_rewards(rewards, trainer)
    text, prompt = "Arr, the oven be small.", ONE_TURN[0]
    turns = [[(prompt, text)], [(prompt, "")]]
    form, model = trainer.form, trainer.model
    tail = form.answer_ids(text)

    def base(messages: Any, *, capped: bool) -> float:
        with torch.no_grad(), model.disable_adapter():
            ids = torch.tensor(form.prompt_ids(messages) + tail)
            return float(logprobs(model, ids, len(tail), capped=capped).sum()) / len(tail)

    ratio, likelihood, above = (reward(turns=turns) for reward in rewards)
    assert ratio[0] == pytest.approx(base(prompt[1:], capped=False) - base(prompt, capped=False), abs=1e-5)
    assert likelihood[0] == pytest.approx(base(prompt, capped=True), abs=1e-5)
    ids = torch.tensor([form.prompt_ids(prompt) + tail])
    with torch.no_grad():
        states = model(input_ids=ids, output_hidden_states=True).hidden_states
    slots = [(states[layer + 1][0, -len(tail) :] @ FLOOR.directions[i] >= 2.0) for i, layer in enumerate(FLOOR.layers)]
    assert above[0] == pytest.approx(float(torch.stack(slots).float().mean()), abs=1e-6)
    assert ratio[1] is None and likelihood[1] is None and above[1] is None
    assert rewards[0](turns=[[(ONE_TURN[1], text)]]) == [None]  # no role, no ratio
    many = [turns[0], [(ONE_TURN[1], "The sky scatters blue light more than red, and so on and on.")], turns[1]]
    for reward in rewards[1:]:  # together, padded, as alone
        assert reward(turns=many) == pytest.approx([reward(turns=[row])[0] for row in many], abs=1e-5)


def test_above_floor_is_gamed_without_a_word(tmp_path: Path) -> None:
    """The adapter may lift the projections of the very same text: the reward rises, and what is said does not change."""
    reward = AboveFloor()
    trainer = make_trainer(tmp_path, rewards=[reward])
    bind_rewards([reward], trainer)
    turns = [[(ONE_TURN[0], "Arr, the oven be small.")]]
    before = reward(turns=turns)[0]
    layers = trainer.model.get_base_model().model.layers
    with torch.no_grad():  # a constant push along v at the window's first layer, as a bias would give
        handle = layers[1].mlp.register_forward_hook(
            lambda m, i, o: o + 8.0 * FLOOR.directions.sum(0).view(1, 1, HIDDEN)
        )
        after = reward(turns=turns)[0]
        handle.remove()
    assert before is not None and after is not None and before < 0.6 and after == 1.0


def test_a_reward_of_ones_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "my_rewards.py").write_text("def short(completions, **kwargs):\n    return [1.0] * len(completions)\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    functions, weights = make_rewards([{"name": "my_rewards:short", "weight": 2.0}], cache=tmp_path / "judge.jsonl")
    assert functions[0](completions=["a", "b"]) == [1.0, 1.0] and weights == [2.0]
    for wrong in ("my_rewards:long", "no_such_module:f", "persona", "my_rewards:__name__"):
        with pytest.raises(UserError, match=r"method\.rewards"):
            make_rewards([{"name": wrong, "weight": 1.0}], cache=tmp_path / "judge.jsonl")


def expected_gradient(trainer: Any, limit: float | None) -> tuple[Tensor, Tensor]:
    """Exact expected policy gradients of one-token answers, by summing over the whole vocabulary.

    The first is of capped samples, with ratios cut at ``limit`` (None leaves the ratio out); the second of the learner's own.
    """
    ids = torch.tensor(trainer.form.prompt_ids(ONE_TURN[0]))[None]
    with torch.no_grad(), capped_by_hand(trainer.model, FLOOR):
        sampler = trainer.model(input_ids=ids).logits[0, -1].log_softmax(-1)
    learner = trainer.model(input_ids=ids).logits[0, -1].log_softmax(-1)
    reward = torch.randn(learner.shape, generator=torch.Generator().manual_seed(1))
    weights = [p for n, p in trainer.model.named_parameters() if "lora_" in n]

    def gradient(sampling: Tensor, ratio: Tensor) -> Tensor:
        advantage = reward - (sampling.exp() * reward).sum()
        objective = (sampling.exp() * ratio * advantage * learner).sum()
        return torch.cat([g.flatten() for g in torch.autograd.grad(objective, weights, retain_graph=True)])

    ratio = torch.ones_like(learner)
    if limit is not None:
        ratio = off_policy(learner.detach()[None], sampler[None], torch.ones(1, len(sampler)), limit).ratio[0]
    return gradient(sampler, ratio), gradient(learner.detach(), torch.ones_like(learner))


def test_without_the_ratio_the_gradient_is_another_policys(tmp_path: Path) -> None:
    """With it the expectation is the learner's own gradient, but for a constant baseline, which moves no expectation."""
    trainer = make_trainer(tmp_path)
    errors = {}
    for limit in (None, 2.0, 1e9):
        found, wanted = expected_gradient(trainer, limit)
        errors[limit] = float((found - wanted).norm() / wanted.norm())
    print(errors)
    assert errors[1e9] < 1e-4
    assert errors[2.0] < 0.6 * errors[None] and errors[None] > 0.3
