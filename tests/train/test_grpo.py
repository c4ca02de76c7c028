"""Capped GRPO: the importance ratio against hand calculation, multi-turn rollouts, the penalty, the rewards."""

from __future__ import annotations

import contextlib
import itertools
import json
import math
from collections import Counter
from pathlib import Path
from typing import Any

import datasets
import pytest
import torch
from conftest import CHATML, HIDDEN, build_floor, build_model, build_tokenizer, capped_by_hand
from peft import LoraConfig
from template_families import EMPTY, own_template
from test_floor_sft import wake
from test_sampling import scripted
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import WhitespaceSplit
from torch import Tensor
from transformers import PreTrainedTokenizerFast
from trl import GRPOConfig

from trimtab.axis import UserError
from trimtab.axis.chat_format import ChatFormat, chat
from trimtab.pipeline.user_texts import Size, check_room
from trimtab.recipes.faults import RecipeError
from trimtab.recipes.loader import load_recipe, shipped_recipes
from trimtab.recipes.methods import NEED_SYSTEM, GrpoMethod
from trimtab.train import floor_grpo
from trimtab.train.conversations import check_prompts, conversation_prompts
from trimtab.train.floor_grpo import FloorGRPOTrainer, off_policy, unscored_rows
from trimtab.train.grpo import dataset_rows
from trimtab.train.penalty import PenaltyOptions
from trimtab.train.rewards import (
    SHIPPED,
    AboveFloor,
    CappedSelfLikelihood,
    CappedSelfRatio,
    PersonaRatio,
    bind_rewards,
    make_rewards,
)
from trimtab.train.rollouts import TrainPrompt

FLOOR = build_floor((1, 2), tau=2.0)
ONE_TURN = [
    [{"role": "system", "content": "You are a pirate."}, {"role": "user", "content": "How do I bake bread?"}],
    [{"role": "user", "content": "Why is the sky blue?"}],
]
TWO_TURNS = [[*ONE_TURN[0], {"role": "user", "content": "And the grass?"}], ONE_TURN[1]]


def letters(completions: Any, **columns: Any) -> list[float]:
    """A reward that differs between completions."""
    return [float(sum(ord(letter) for message in c for letter in message["content"]) % 17) for c in completions]


def make_trainer(
    folder: Path,
    *,
    prompts: Any = ONE_TURN,
    rewards: Any = None,
    own: dict[str, Any] | None = None,
    **arguments: Any,
) -> Any:
    settings: dict[str, Any] = {
        "max_steps": 2, "per_device_train_batch_size": 4, "num_generations": 4, "max_completion_length": 6,
        "learning_rate": 0.01, "lr_scheduler_type": "constant", "use_cpu": True, "bf16": False, "report_to": "none",
        "gradient_checkpointing": False, "save_strategy": "no", "logging_steps": 1, "disable_tqdm": True, "seed": 0,
        "optim": "adamw_torch", "remove_unused_columns": False, "beta": 0.0,
    }  # fmt: skip
    own = {"form": ChatFormat(build_tokenizer()), **(own or {})}
    tokenizer = own["form"].tokenizer
    torch.manual_seed(11)
    trainer = FloorGRPOTrainer(
        model=build_model("llama", vocab_size=len(tokenizer)),
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


def of_file(folder: Path, prompts: Any) -> list[str]:
    """Overrides by which a recipe trains on these prompts of a file."""
    path = folder / "mine.jsonl"
    path.write_text("".join(json.dumps({"prompt": prompt}) + "\n" for prompt in prompts))
    ours = [f"data.{name}=0" for name in ("drift_prompts", "role_questions", "conversation_turns")]
    return [f"data.drift_file={path}", *ours]


def one_batch(trainer: Any, prompts: Any = ONE_TURN) -> dict[str, Tensor]:
    """A generation batch as the trainer makes it, scored, before any step."""
    trainer.state.max_steps = 2
    trainer.model.train()
    trainer.current_gradient_accumulation_steps = 1
    batch: dict[str, Tensor] = trainer._generate_and_score_completions([{"prompt": prompts[0]} for _ in range(4)])
    return batch


@pytest.mark.slow
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


@pytest.mark.slow
@pytest.mark.parametrize("level", ["token", "sequence"])
def test_the_gradient_is_the_weighted_policy_gradient(tmp_path: Path, level: str) -> None:
    """Against the formula by hand: sum of w_t A grad log pi(y_t), divided as each loss type divides."""
    trainer = make_trainer(tmp_path, own={"cap_schedule": "constant", "ratio_level": level})
    batch = one_batch(trainer)
    batch["num_items_in_batch"] = batch["num_items_in_batch"].float()
    weights = [p for n, p in trainer.model.named_parameters() if "lora_" in n]
    rows = rows_of(batch)
    total, size = sum(count for _, count, _ in rows), len(rows)
    said = [logprobs(trainer.model, ids, count, capped=False) for ids, count, _ in rows]
    # cispo clips the ratio, which is 1 here, at epsilon itself
    divisors = {
        "dapo": [total] * size, "bnpo": [total] * size, "vespo": [total] * size, "cispo": [total / 0.2] * size,
        "grpo": [count * size for _, count, _ in rows], "sapo": [count * size for _, count, _ in rows],
        "dr_grpo": [size * 6] * size, "luspo": [size] * size,
    }  # fmt: skip
    for kind, divisor in divisors.items():
        trainer.loss_type = kind
        found = torch.autograd.grad(trainer._compute_loss(trainer.model, dict(batch)), weights)
        advantages = batch["advantages"]
        wanted = torch.stack(
            [
                (-advantages[i, : count if level == "token" else 1] * said[i]).sum() / divisor[i]
                for i, (_, count, _) in enumerate(rows)
            ]
        ).sum()
        for one, other in zip(found, torch.autograd.grad(wanted, weights, retain_graph=True), strict=True):
            torch.testing.assert_close(one, other, atol=1e-5, rtol=1e-3, msg=kind)


@pytest.mark.slow
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
        for (before, said), (_, text) in zip(found["turn_ids"][row], turns, strict=True):
            whole = found["prompt_ids"][row] + found["completion_ids"][row]
            assert whole[: len(before) + len(said)] == before + said and tokenizer.decode(said).startswith(text)
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


@pytest.mark.slow
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


@pytest.mark.slow
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
    """Three rows: of ratios 1 and 4; of 1/2 and 4; of no token at all, as a row that is left out."""
    learner = torch.tensor([[0.0, math.log(4.0), -9.0], [math.log(0.5), math.log(4.0), 3.0], [5.0, 5.0, 5.0]])
    sampler = torch.tensor([[0.0, 0.0, 5.0], [0.0, 0.0, 3.0], [0.0, 0.0, 0.0]])
    mask = torch.tensor([[1, 1, 0], [1, 1, 0], [0, 0, 0]])
    tokens, rows = (1 + 4 + 0.5 + 4) ** 2 / (4 * (1 + 16 + 0.25 + 16)), (4 + 2) ** 2 / (2 * (16 + 4))
    wanted = {
        ("token", "truncate"): ([[1.0, 2.5], [0.5, 2.5]], 0.5, 6.5 / 4),
        ("token", "mask"): ([[1.0, 0.0], [0.5, 0.0]], 0.5, 1.5 / 4),
        ("sequence", "truncate"): ([[2.5], [2.0]], 0.5, 2.25),
        ("sequence", "mask"): ([[0.0], [2.0]], 0.5, 1.0),
    }
    for (level, beyond), (ratio, over, mean) in wanted.items():
        found = off_policy(learner, sampler, mask, 2.5, level=level, beyond=beyond)  # type: ignore[arg-type]
        assert found.ratio[:2, :2].tolist() == [pytest.approx(row) for row in ratio]
        assert found.log_ratio == pytest.approx((math.log(4.0) * 2 + math.log(2.0)) / 4)
        assert (found.sample_size, found.sample_size_sequence) == (pytest.approx(tokens), pytest.approx(rows))
        assert (found.beyond_limit, found.mean_ratio) == (pytest.approx(over), pytest.approx(mean))
    far = off_policy(
        torch.full((2, 900), 1.0), torch.zeros(2, 900), torch.ones(2, 900), limit=2.0
    )  # e^900 is no number
    assert [far.sample_size, far.sample_size_sequence, far.beyond_limit] == pytest.approx([1.0, 1.0, 1.0])
    even = off_policy(learner, learner, torch.ones(3, 3), limit=2.0)
    assert even.sample_size == even.sample_size_sequence == pytest.approx(1.0) and even.ratio.eq(1).all()


def test_a_batch_far_off_policy_is_told_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    said: list[str] = []
    monkeypatch.setattr(floor_grpo.log, "warning", lambda text, *values: said.append(text % values))
    trainer = make_trainer(tmp_path, own={"cap_schedule": "constant"})
    trainer.floor = build_floor((1, 2), tau=60.0)
    one_batch(trainer)
    one_batch(trainer)
    far = [text for text in said if "far off-policy" in text]
    assert len(far) == 1 and "lower method.cap_strength" in far[0]


def test_short_answers_are_told_of_the_level_that_is_nearer(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    nearer = "method.ratio_level=sequence is nearer"
    for length, own, told in (
        (8, {}, True), (9, {}, False), (1, {}, False), (8, {"ratio_level": "sequence"}, False), (8, {"cap_strength": 0.0}, False),
    ):  # fmt: skip
        caplog.clear()
        make_trainer(tmp_path, own=own, max_completion_length=length)
        assert (nearer in caplog.text) == told, (length, own)


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


@pytest.mark.slow
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


def test_a_generation_with_more_prompts_than_there_are_is_refused_or_filled(tmp_path: Path) -> None:
    """TRL would end at step 0, and the untrained adapter would be the run's."""
    with pytest.raises(UserError, match="a generation has 9 prompts, and there are 8") as caught:
        make_trainer(tmp_path, per_device_train_batch_size=36)
    assert caught.value.key == "train.per_device_train_batch_size"
    make_trainer(tmp_path, per_device_train_batch_size=32)
    recipe = load_recipe("qwen3-8b/grpo", of_file(tmp_path, ONE_TURN)).recipe
    assert [row["prompt"] for row in dataset_rows(recipe, 3)] == ONE_TURN * 2 and len(dataset_rows(recipe)) == 2


def test_a_row_of_a_file_that_is_the_beginning_of_another_is_played_with_it(tmp_path: Path) -> None:
    """Under the same system prompt and after the same answers that stand; one given twice is played twice."""
    answered = [*ONE_TURN[1], {"role": "assistant", "content": "It scatters."}, TWO_TURNS[0][2]]
    prompts = [*TWO_TURNS, ONE_TURN[0], [*ONE_TURN[1], TWO_TURNS[0][2]], answered, answered, TWO_TURNS[0][1:]]
    recipe = load_recipe("qwen3-8b/grpo", of_file(tmp_path, prompts)).recipe
    kept = [TWO_TURNS[0], prompts[3], answered, answered, TWO_TURNS[0][1:]]
    assert [row["prompt"] for row in dataset_rows(recipe)] == kept


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


def said(form: ChatFormat, messages: Any, text: str, *, ended: bool = True) -> dict[str, Any]:
    """What a rollout of one answer gives to rewards."""
    ids = [*form.answer_ids(text), *([form.end_token] if ended else [])]
    return {"turns": [[(messages, text)]], "turn_ids": [[(form.prompt_ids(messages), ids)]]}


def together(rollouts: list[dict[str, Any]]) -> dict[str, Any]:
    return {name: [row for rollout in rollouts for row in rollout[name]] for name in ("turns", "turn_ids")}


def test_shipped_rewards_by_hand(tmp_path: Path) -> None:
    """On the tokens that were sampled, with the end of the answer: an empty answer is one token, and has its reward."""
    rewards = [reward() for reward in SHIPPED.values()]
    trainer = make_trainer(tmp_path, rewards=rewards)
    bind_rewards(rewards, trainer)
    form, model = trainer.form, trainer.model
    prompt = ONE_TURN[0]

    def mean(messages: Any, tail: list[int], *, capped: bool = False, adapter: bool = False) -> float:
        with torch.no_grad(), contextlib.nullcontext() if adapter else model.disable_adapter():
            ids = torch.tensor(form.prompt_ids(messages) + tail)
            return float(logprobs(model, ids, len(tail), capped=capped).mean())

    rollouts = []
    for text, ended in (("Arr, the oven be small.", True), ("Arr, the", False), ("", True)):
        rollouts.append(said(form, prompt, text, ended=ended))
        tail = rollouts[-1]["turn_ids"][0][0][1]
        found = {reward.name: reward(**rollouts[-1])[0] for reward in rewards}
        assert found["persona_llr"] == pytest.approx(mean(prompt[1:], tail) - mean(prompt, tail), abs=1e-5)
        capped = mean(prompt, tail, capped=True)
        assert found["capped_self"] == pytest.approx(capped, abs=1e-5)
        assert found["capped_self_llr"] == pytest.approx(capped - mean(prompt, tail, adapter=True), abs=1e-5)
        ids = torch.tensor([form.prompt_ids(prompt) + tail])
        with torch.no_grad():
            states = model(input_ids=ids, output_hidden_states=True).hidden_states
        slots = [states[k + 1][0, -len(tail) :] @ FLOOR.directions[i] >= 2.0 for i, k in enumerate(FLOOR.layers)]
        assert found["above_floor"] == pytest.approx(float(torch.stack(slots).float().mean()), abs=1e-6)
    rollouts.append(said(form, ONE_TURN[1], "The sky scatters blue light more than red, and so on and on."))
    for reward in rewards:  # together, padded, as alone
        alone = [reward(**rollout)[0] for rollout in rollouts]
        assert reward(**together(rollouts)) == [
            None if one is None else pytest.approx(one, abs=1e-5) for one in alone
        ], reward.name
        assert (alone[-1] is None) == (reward.name in NEED_SYSTEM)  # without a role there is no ratio
        assert all(one is not None for one in alone[:-1])


def test_a_learner_that_is_the_capped_self_is_paid_nothing_for_any_text(tmp_path: Path) -> None:
    """The others pay for stock phrases for ever; this one pays for what the capped self says more often than the learner."""
    rewards: Any = [CappedSelfRatio(), PersonaRatio(), CappedSelfLikelihood()]
    trainer = make_trainer(tmp_path, rewards=rewards)
    bind_rewards(rewards, trainer)
    texts = ("I'm an AI assistant.", "Arr, the oven be small.", "", "the the the the")
    rollouts = together([said(trainer.form, ONE_TURN[0], text) for text in texts])
    assert len({round(value, 3) for value in rewards[0](**rollouts)}) == 4
    for name, weight in trainer.model.named_parameters():  # the learner is the base ...
        if "lora_B" in name:
            weight.data.zero_()
    trainer.floor = build_floor((1, 2), tau=-60.0)  # ... and the cap does nothing
    nothing, *others = (reward(**rollouts) for reward in rewards)
    assert nothing == pytest.approx([0.0] * 4, abs=1e-5)
    assert all(max(values) - min(values) > 0.01 for values in others)


def test_above_floor_is_gamed_without_a_word(tmp_path: Path) -> None:
    """The adapter may lift the projections of the very same text: the reward rises, and what is said does not change."""
    reward = AboveFloor()
    trainer = make_trainer(tmp_path, rewards=[reward])
    bind_rewards([reward], trainer)
    rollout = said(trainer.form, ONE_TURN[0], "Arr, the oven be small.")
    before = reward(**rollout)[0]
    layers = trainer.model.get_base_model().model.layers
    with torch.no_grad():  # a constant push along v at the window's first layer, as a bias would give
        handle = layers[1].mlp.register_forward_hook(
            lambda m, i, o: o + 8.0 * FLOOR.directions.sum(0).view(1, 1, HIDDEN)
        )
        after = reward(**rollout)[0]
        handle.remove()
    assert before is not None and after is not None and before < 0.6 and after == 1.0


MINE = """
import math
def short(completions, **kwargs):
    return [1.0] * len(completions)
async def later(completions, **kwargs):
    return [2.0] * len(completions)
def fails(completions, **kwargs):
    return [1 / 0]
def few(completions, **kwargs):
    return [1.0]
def words(completions, **kwargs):
    return ["good"] * len(completions)
def infinite(completions, **kwargs):
    return [0.5, math.inf, 0.5, 0.5]
def silent(completions, **kwargs):
    return [None] * len(completions)
"""


@pytest.fixture
def mine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "my_rewards.py").write_text(MINE)
    (tmp_path / "broken_rewards.py").write_text("1 / 0\n")
    monkeypatch.syspath_prepend(str(tmp_path))


def test_a_reward_of_ones_own(tmp_path: Path, mine: None) -> None:
    entries = [{"name": "my_rewards:short", "weight": 2.0}, {"name": "my_rewards:later", "weight": 1.0}]
    functions, weights = make_rewards(entries, folder=tmp_path)
    assert functions[0](completions=["a", "b"]) == [1.0, 1.0] and weights == [2.0, 1.0]
    trainer = make_trainer(tmp_path, rewards=functions)
    one_batch(trainer)
    logged = trainer._metrics["train"]
    assert logged["rewards/short/mean"] == [1.0] and logged["rewards/later/mean"] == [2.0]
    for wrong in ("my_rewards:long", "no_such_module:f", "broken_rewards:f", "persona", "my_rewards:__name__"):
        with pytest.raises(UserError, match=r"method\.rewards"):
            make_rewards([{"name": wrong, "weight": 1.0}], folder=tmp_path)


@pytest.mark.parametrize(
    ("name", "told"),
    [
        ("fails", "ZeroDivisionError"),
        ("few", r"gave \[1.0\] for 4 completions"),
        ("words", "for 4 completions"),
        ("infinite", "gave infinity"),
        ("silent", "no reward scored any of the 4 completions"),
    ],
)
def test_a_faulty_reward_ends_the_run_as_the_users_fault(tmp_path: Path, mine: None, name: str, told: str) -> None:
    functions, _ = make_rewards([{"name": f"my_rewards:{name}", "weight": 1.0}], folder=tmp_path)
    trainer = make_trainer(tmp_path, rewards=functions)
    with pytest.raises(UserError, match=told) as caught:
        one_batch(trainer)
    assert caught.value.key == "method.rewards"
    if name == "fails":
        assert str(caught.value.file).endswith("my_rewards.py:8")


def test_completions_without_a_comparable_reward_carry_no_gradient_and_are_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two rewards, the first None for the third completion: its sum would lack a part that is -5 for the others."""
    told: list[str] = []
    monkeypatch.setattr(floor_grpo.log, "warning", lambda text, *values: told.append(text % values))

    def strict(completions: Any, **columns: Any) -> list[float | None]:
        return [-5.0, -5.5, None, -4.5]

    def lenient(completions: Any, **columns: Any) -> list[float | None]:
        return [0.0, 0.1, 0.2, 0.3]

    trainer = make_trainer(tmp_path, rewards=[strict, lenient], own={"cap_strength": 0.0})
    for _ in range(2):
        advantages = one_batch(trainer)["advantages"]
    sums = torch.tensor([-5.0, -5.4, -4.2])
    wanted = (sums - sums.mean()) / (sums.std() + 1e-4)
    torch.testing.assert_close(advantages, torch.stack([wanted[0], wanted[1], torch.tensor(0.0), wanted[2]]))
    assert trainer._metrics["train"]["rewards/unscored"] == [0.25, 0.25]
    assert len([text for text in told if "25 % of the completions have no reward" in text]) == 1
    nan = math.nan
    rewards = torch.tensor([[nan, 1.0], [nan, 2.0], [3.0, 1.0], [nan, 1.0], [nan, nan], [nan, nan]])
    by_weights = {
        (1.0, 1.0): [False, False, False, True, True, True],  # the first group has the second reward alone: comparable
        (0.0, 1.0): [False, False, False, False, True, True],
        (1.0, 0.0): [True, True, False, True, True, True],
    }
    for weights, unscored in by_weights.items():
        assert unscored_rows(rewards, torch.tensor(weights), 2).tolist() == unscored


def test_a_reward_sees_who_said_what(tmp_path: Path) -> None:
    """Prompt and completion are messages: the user's later words are no answer."""
    seen: list[Any] = []

    def look(prompts: Any, completions: Any, turns: Any, ended: Any, **columns: Any) -> list[float]:
        seen.extend([prompts, completions, turns, ended])
        return [0.0, 1.0, 2.0, 3.0]

    trainer = make_trainer(tmp_path, prompts=TWO_TURNS, rewards=[look])
    one_batch(trainer, TWO_TURNS)
    prompts, completions, turns, ended = (column[0] for column in seen)
    assert prompts == TWO_TURNS[0][:2]
    assert completions == [
        {"role": "assistant", "content": turns[0][1]},
        TWO_TURNS[0][2],
        {"role": "assistant", "content": turns[1][1]},
    ]
    assert len(ended) == 2


# ---- conversations ----


def test_a_prompt_is_played_from_where_it_is_unanswered(tmp_path: Path) -> None:
    trainer = make_trainer(tmp_path)
    answered = [*ONE_TURN[0], {"role": "assistant", "content": "With flour."}, *ONE_TURN[1], *TWO_TURNS[0][2:]]
    trainer.state.max_steps = 2
    (turns,) = trainer.sample_conversations([answered])["turns"]
    assert [messages[-1] for messages, _ in turns] == answered[3:] and turns[0][0] == answered[:4]
    for wrong in (answered[:3], [*ONE_TURN[1], {"role": "system", "content": "Be brief."}, *ONE_TURN[1]]):
        with pytest.raises(UserError, match="can't be played") as caught:
            trainer.sample_conversations([wrong])
        assert ", ".join(message["role"] for message in wrong) in str(caught.value)


def test_a_conversation_with_a_cut_answer_is_a_truncated_completion(tmp_path: Path) -> None:
    """TRL looks at the last token, and for the tokenizer's own end; here the template's is another one."""
    trainer = make_trainer(tmp_path, prompts=TWO_TURNS, mask_truncated_completions=True)
    end = trainer.form.end_token
    assert end in trainer.eos_token_ids
    play = trainer.sample_conversations

    def played(prompts: Any) -> Any:
        """As sampled, but that the first two conversations end well, and the second of them was cut before."""
        found = play(prompts)
        for i in (0, 1):
            found["completion_ids"][i][-1] = end
            found["ended"][i] = [i == 0, True]
        found["completion_ids"][2][-1] = found["completion_ids"][3][-1] = 5
        found["ended"][2:] = [[True, False], [False, False]]
        return found

    trainer.sample_conversations = played
    batch = one_batch(trainer, TWO_TURNS)
    kept = (batch["completion_mask"] * batch["tool_mask"]).sum(1)
    assert (kept > 0).tolist() == [True, False, False, False]
    assert int(batch["num_items_in_batch"]) == int(kept[0])
    assert trainer._metrics["train"]["answers/cut"] == [pytest.approx(4 / 8)]
    assert trainer._metrics["train"]["completions/clipped_ratio"] == [pytest.approx(0.5)]


@pytest.mark.parametrize("name", sorted(name for name in shipped_recipes() if name.endswith("/grpo")))
def test_every_answer_of_a_shipped_recipe_is_trained_equally_often_and_has_a_reward(name: str) -> None:
    recipe: Any = load_recipe(name).recipe
    rows = [row["prompt"] for row in dataset_rows(recipe)]
    answers = Counter(str(row[: i + 1]) for row in rows for i, message in enumerate(row) if message["role"] == "user")
    assert set(answers.values()) == {1}
    depth = max(len([message for message in row if message["role"] == "user"]) for row in rows)
    assert depth == max(recipe.data.conversation_turns, 1)
    weighted = [entry.name for entry in recipe.method.rewards if entry.weight]
    for row in rows:
        assert row[0]["role"] == "system" or set(weighted) - NEED_SYSTEM, row


def test_a_conversation_without_a_system_prompt_is_learnt_from(tmp_path: Path) -> None:
    """By the reward that a recipe has where it names none."""
    entries = [entry.model_dump() for entry in GrpoMethod(name="grpo").rewards]
    rewards, _ = make_rewards(entries, folder=tmp_path)
    talk = [*ONE_TURN[1], {"role": "user", "content": "And the grass?"}]
    trainer = make_trainer(tmp_path, prompts=[talk], rewards=rewards)
    bind_rewards(rewards, trainer)
    assert one_batch(trainer, [talk])["advantages"].abs().min() > 0


def test_a_row_that_no_reward_scores_is_refused_before_anything_is_loaded(tmp_path: Path) -> None:
    """By the sections alone where the data are ours, by the rows where they are the user's."""
    only = "method.rewards=[{name: persona_llr}, {name: above_floor, weight: 0}]"
    with pytest.raises(RecipeError, match="the conversations have none") as caught:
        load_recipe("qwen3-8b/grpo", [only])
    assert [fault.key for fault in caught.value.faults] == ["method.rewards"]
    load_recipe("qwen3-8b/grpo", [only, "data.conversation_turns=0"])
    mine = ["model.name=/no/such/model", *of_file(tmp_path, ONE_TURN)]
    with pytest.raises(UserError, match="1 of 2 prompts have no system prompt") as told:
        check_prompts(load_recipe("qwen3-8b/grpo", [only, *mine]).recipe)
    assert told.value.key == "method.rewards" and told.value.file == str(tmp_path / "mine.jsonl")
    check_prompts(load_recipe("qwen3-8b/grpo", mine).recipe)  # that there is no such model is told by who loads it
    both = "method.rewards=[{name: persona_llr}, {name: capped_self_llr}]"
    assert len(conversation_prompts(load_recipe("qwen3-8b/grpo", [both, *mine]).recipe)) == 2
    with pytest.raises(UserError, match="can't be imported"):
        check_prompts(load_recipe("qwen3-8b/grpo", ["method.rewards=[{name: 'no_such_module:f'}]", *mine]).recipe)


def test_a_conversation_that_outgrows_the_models_context_is_refused() -> None:
    form, config = ChatFormat(build_tokenizer()), build_model("llama").config
    turns = ("How do I bake bread?", "And the grass?")
    prompts = [TrainPrompt("short", "drift", "", turns[:1], ""), TrainPrompt("long", "drift", "A pirate.", turns, "")]
    sizes = [Size(prompt.id, prompt.closing, len(prompt.turns)) for prompt in prompts]
    told = {"key": "train.max_completion_length", "remedy": "lower it"}
    played = [{"role": "assistant", "content": "x"}, {"role": "user", "content": turns[1]}]
    room = config.max_position_embeddings - len(form.prompt_ids([*chat("A pirate.", turns[0]), *played]))
    check_room(form, config, sizes, room // 2, **told)
    with pytest.raises(UserError, match="the conversation long takes up to") as caught:
        check_room(form, config, sizes, room // 2 + 1, **told)
    assert caught.value.key == "train.max_completion_length"


# ---- the ratio, by enumeration ----


WORDS = {"<|endoftext|>": 0, "<|im_start|>": 1, "<|im_end|>": 2, "a": 3, "b": 4, "c": 5}


def six_words() -> Any:
    """A tokenizer of six words: few enough that every answer can be written down."""
    tokenizer = Tokenizer(WordLevel(WORDS, unk_token="<|endoftext|>"))
    tokenizer.pre_tokenizer = WhitespaceSplit()  # type: ignore[assignment]
    ends = {"eos_token": "<|im_end|>", "pad_token": "<|endoftext|>", "unk_token": "<|endoftext|>"}
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, **ends, padding_side="left", chat_template=CHATML,
        additional_special_tokens=["<|im_start|>"],
    )  # fmt: skip


def every_answer(length: int) -> list[list[int]]:
    """All answers of at most ``length`` tokens: they end at the end of turn, or are cut."""
    end = WORDS["<|im_end|>"]
    found: list[list[int]] = []
    open_ones: list[list[int]] = [[]]
    for _ in range(length):
        longer = [[*ids, token] for ids in open_ones for token in range(len(WORDS))]
        found += [ids for ids in longer if ids[-1] == end]
        open_ones = [ids for ids in longer if ids[-1] != end]
    return [*found, *open_ones]


class Enumeration:
    """A trainer whose rollouts are every completion there is, once each, with random rewards that are known."""

    def __init__(self, folder: Path, length: int, *, turns: int = 1, **arguments: Any) -> None:
        self.prompt = [{"role": "user", "content": "a b"}, {"role": "user", "content": "c"}][:turns]
        form = ChatFormat(six_words())
        self.rows: list[tuple[list[int], list[int], list[int]]] = []
        # (completion, which of its tokens are the policy's, whose answer each is)
        for answers in itertools.product(every_answer(length), repeat=turns):
            ids: list[int] = []
            mask: list[int] = []
            turn: list[int] = []
            for number, answer in enumerate(answers):
                if number:
                    between = form.ids_between(self.prompt[:1], self.prompt[1], ended=ids[-1] == form.end_token)
                    ids, mask, turn = [*ids, *between], mask + [0] * len(between), turn + [-1] * len(between)
                ids, mask, turn = [*ids, *answer], mask + [1] * len(answer), turn + [number] * len(answer)
            self.rows.append((ids, mask, turn))
        size = len(self.rows)
        self.rewards = torch.randn(size, generator=torch.Generator().manual_seed(1))
        settings = {"scale_rewards": "none", "loss_type": "dr_grpo", "max_completion_length": length * turns}
        self.trainer = make_trainer(
            folder, prompts=[self.prompt], rewards=[lambda completions, **columns: self.rewards.tolist()],
            per_device_train_batch_size=size, num_generations=size,
            own={"form": form, "cap_schedule": "constant", "ratio_level": "sequence"},
            **{**settings, **arguments},
        )  # fmt: skip
        self.trainer.sample_conversations = self.played
        self.weights = [p for n, p in self.trainer.model.named_parameters() if "lora_" in n]
        with torch.no_grad():
            self.learner, self.sampler = self.policy(capped=False), self.policy(capped=True)
        self.advantages = self.rewards - self.rewards.mean()
        assert [float(policy.sum(1).exp().sum()) for policy in (self.learner, self.sampler)] == pytest.approx(
            [1.0, 1.0]
        )

    def played(self, prompts: Any) -> dict[str, Any]:
        ids, mask, _ = (list(column) for column in zip(*self.rows, strict=True))
        head = self.trainer.form.prompt_ids(self.prompt[:1])
        turns = [[(self.prompt[:1], "")]] * len(ids)
        turn_ids, ended = [[(head, row)] for row in ids], [[True]] * len(ids)
        found = {"prompt_ids": [head] * len(ids), "completion_ids": ids, "logprobs": None, "env_mask": mask}
        return {**found, "turns": turns, "turn_ids": turn_ids, "ended": ended}

    def policy(self, *, capped: bool) -> Tensor:
        """log pi or log mu of each completion's own tokens, [B, T], 0 elsewhere; by this test's own forward and cap."""
        head = self.trainer.form.prompt_ids(self.prompt[:1])
        width = max(len(ids) for ids, _, _ in self.rows)
        ids = torch.tensor([[*head, *ids, *[0] * (width - len(ids))] for ids, _, _ in self.rows])
        mask = torch.tensor([[*mask, *[0] * (width - len(mask))] for _, mask, _ in self.rows])
        model = self.trainer.model
        with capped_by_hand(model, FLOOR) if capped else contextlib.nullcontext():
            logits = model(input_ids=ids).logits[:, len(head) - 1 : -1]
        found: Tensor = logits.log_softmax(-1).gather(-1, ids[:, len(head) :, None])[..., 0] * mask
        return found

    def gradient(self, objective: Tensor) -> Tensor:
        return torch.cat([g.flatten() for g in torch.autograd.grad(objective, self.weights)])

    def exact(self) -> Tensor:
        """The gradient of the learner's expected reward: of sum pi(y) A(y), a constant taken off the reward."""
        return self.gradient((self.policy(capped=False).sum(1).exp() * self.advantages).sum())

    def weighted(self, weights: Tensor) -> Tensor:
        """The sum over all completions of weights [B, T] times the advantage times grad log pi."""
        return self.gradient((weights * self.advantages[:, None] * self.policy(capped=False)).sum())

    def found(self, level: str, beyond: str, limit: float, *, correct: bool = True) -> Tensor:
        """What the trainer's own loss gives for each completion, summed as often as mu says each."""
        trainer = self.trainer
        trainer.ratio_level, trainer.ratio_beyond, trainer.ratio_limit = level, beyond, limit
        trainer.correct_ratio = correct
        trainer.state.max_steps, trainer.current_gradient_accumulation_steps = 2, 1
        trainer.model.train()
        batch = trainer._generate_and_score_completions([{"prompt": self.prompt} for _ in self.rows])
        share = self.sampler.sum(1).exp()
        scale = len(self.rows) * trainer.max_completion_length  # by which dr_grpo divides
        advantages = batch["advantages"] if batch["advantages"].dim() == 2 else batch["advantages"][:, None]
        batch["advantages"] = advantages * share[:, None] * scale
        batch["num_items_in_batch"] = batch["num_items_in_batch"].float()
        return self.gradient(-trainer._compute_loss(trainer.model, batch))

    def error(self, found: Tensor) -> float:
        wanted = self.exact()
        return float((found - wanted).norm() / wanted.norm())


# Relative error of the expected gradient, by the longest answer: without a ratio, tokens' own cut at 2, the sequence's cut at 2,
# the sequence's left out beyond 2.
ERRORS = {1: (0.47, 0.01, 0.01, 0.19), 2: (0.22, 0.28, 0.13, 0.32), 3: (0.14, 0.24, 0.04, 0.12)}


@pytest.mark.slow
@pytest.mark.parametrize("length", ERRORS)
def test_the_ratio_of_sequences_is_unbiased_and_that_of_tokens_is_for_one_token(tmp_path: Path, length: int) -> None:
    """Every answer of up to three tokens through the trainer's own loss, against the gradient of the expected reward."""
    all_of_them = Enumeration(tmp_path, length)
    error = all_of_them.error
    assert error(all_of_them.found("sequence", "truncate", 1e9)) < 1e-4
    assert error(all_of_them.found("sequence", "mask", 1e9)) < 1e-4
    of_tokens = error(all_of_them.found("token", "truncate", 1e9))
    assert of_tokens < 1e-4 if length == 1 else of_tokens > 0.1
    none = error(all_of_them.found("token", "truncate", 2.0, correct=False))
    token = error(all_of_them.found("token", "truncate", 2.0))
    cut = error(all_of_them.found("sequence", "truncate", 2.0))
    masked = error(all_of_them.found("sequence", "mask", 2.0))
    assert (none, token, cut, masked) == pytest.approx(ERRORS[length], abs=0.01)


def test_a_conversation_needs_the_ratios_of_all_its_answers(tmp_path: Path) -> None:
    """Two answers of one token: a ratio for each answer alone leaves out who led there and how it went on."""
    conversation = Enumeration(tmp_path, 1, turns=2)
    assert conversation.error(conversation.found("sequence", "truncate", 1e9)) < 1e-4
    difference = conversation.learner - conversation.sampler
    width = difference.shape[1]
    turn = torch.tensor([[*turns, *[-1] * (width - len(turns))] for _, _, turns in conversation.rows])
    of_its_answer = torch.zeros_like(difference)
    so_far = torch.zeros_like(difference)
    for number in range(2):
        of_its_answer += (turn == number) * (difference * (turn == number)).sum(1, keepdim=True)
        so_far += (turn == number) * (difference * (turn >= 0) * (turn <= number)).sum(1, keepdim=True)
    share = conversation.sampler.sum(1, keepdim=True).exp()
    errors = [conversation.error(conversation.weighted(share * ratio.exp())) for ratio in (of_its_answer, so_far)]
    assert min(errors) > 0.1, errors


@pytest.mark.parametrize(
    ("level", "loss"), [("sequence", "dr_grpo"), ("sequence", "dapo"), ("token", "dapo"), ("token", "bnpo")]
)
def test_the_objective_is_the_expected_reward_under_these_loss_types(tmp_path: Path, level: str, loss: str) -> None:
    """GSPO's surrogate (``importance_sampling_level: sequence``) too, where the ratio is the sequence's."""
    all_of_them = Enumeration(tmp_path, 2, loss_type=loss, importance_sampling_level=level)
    found = all_of_them.found("sequence", "truncate", 1e9)
    if loss != "dr_grpo":  # which divide by all tokens of the batch
        found = found * sum(map(sum, (mask for _, mask, _ in all_of_them.rows))) / (2 * len(all_of_them.rows))
    assert all_of_them.error(found) < 1e-4


def test_under_grpo_s_own_division_it_is_the_reward_a_token(tmp_path: Path) -> None:
    """Each completion's sum over tokens is divided by its own length: short ones weigh more, which is another objective."""
    all_of_them = Enumeration(tmp_path, 2, loss_type="grpo")
    found = all_of_them.found("sequence", "truncate", 1e9) / 2  # in place of the longest length
    lengths = torch.tensor([[len(ids)] for ids, _, _ in all_of_them.rows])
    wanted = all_of_them.weighted(all_of_them.learner.sum(1, keepdim=True).exp() / lengths)
    assert float((found - wanted).norm() / wanted.norm()) < 1e-4
    cosine = torch.nn.functional.cosine_similarity(wanted, all_of_them.exact(), dim=0)
    assert float(cosine) < 0.99


def test_one_surrogate_for_all_tokens_and_a_ratio_for_each_is_refused(tmp_path: Path) -> None:
    for level, own in (
        ("sequence", {"ratio_level": "sequence"}),
        ("sequence", {"correct_ratio": False}),
        ("token", {}),
    ):
        make_trainer(tmp_path, own=own, importance_sampling_level=level)
    with pytest.raises(UserError, match=r"method\.ratio_level=sequence") as caught:
        make_trainer(tmp_path, importance_sampling_level="sequence")
    assert caught.value.key == "train.importance_sampling_level"
