"""The cap of the vLLM plugin without vLLM: its arithmetic and its switch on transformers' layers. With vLLM: tests/vllm_job."""

from __future__ import annotations

import math
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from conftest import HIDDEN, LAYERS, build_floor, build_model, build_tokenizer, capped_by_hand
from stand_in_vllm import StandIn
from test_grpo import letters, logprobs, make_trainer, one_batch, rows_of
from test_rollouts import make_trainer as make_rows_trainer
from test_rollouts import shake
from torch import Tensor, nn

from trimtab.axis import ActivationController, Floor, UserError
from trimtab.axis import vllm_cap as plugin
from trimtab.axis.chat_format import ChatFormat
from trimtab.axis.files import read_jsonl
from trimtab.axis.sampling import SamplingOptions
from trimtab.train.rollouts import RolloutPlan, RolloutSource, TrainPrompt
from trimtab.train.vllm_rollouts import VLLMRollouts

FLOOR = build_floor((1, 2), tau=2.0)
STRONG = build_floor((1, 2), tau=6.0)
IDS = torch.arange(3, 33).view(2, 15)


class Worker:
    """What a worker method sees of a worker."""

    def __init__(self, model: nn.Module) -> None:
        self.model = model

    def get_model(self) -> nn.Module:
        return self.model


def logits(model: Any) -> Tensor:
    with torch.no_grad():
        found: Tensor = model(input_ids=IDS).logits
    return found


@pytest.mark.parametrize("strength", [1.0, 0.4])
def test_loaded_and_switched_on_it_is_the_cap(strength: float) -> None:
    model, plain = build_model("llama"), build_model("llama")
    assert plugin.add_caps(model) == LAYERS
    worker = Worker(model)
    uncapped = logits(plain)
    assert torch.equal(logits(model), uncapped)
    assert plugin._load_floor(worker, plugin.floor_payload(FLOOR)) == {"layers": [1, 2]}
    assert torch.equal(logits(model), uncapped), "a loaded floor caps nothing before its strength is set"
    assert plugin._set_strength(worker, str(strength)) == {"strength": [pytest.approx(strength)]}
    with ActivationController.of(plain).capping(FLOOR, strength):
        wanted = logits(plain)
    assert not torch.allclose(wanted, uncapped, atol=0.1)
    torch.testing.assert_close(logits(model), wanted, atol=1e-5, rtol=1e-5)
    plugin._set_strength(worker, "0.0")
    assert torch.equal(logits(model), uncapped)


def test_another_floor_takes_the_place_of_the_first() -> None:
    model, plain = build_model("llama"), build_model("llama")
    plugin.add_caps(model)
    other = build_floor((0, 2), tau=1.0, seed=3)
    for floor in (FLOOR, other):
        plugin._load_floor(Worker(model), plugin.floor_payload(floor))
        plugin._set_strength(Worker(model), "1.0")
        with capped_by_hand(plain, floor):
            torch.testing.assert_close(logits(model), logits(plain), atol=1e-5, rtol=1e-5)


class Summing(nn.Module):
    """As Llama's layers in vLLM: the addition is left to the next layer's norm."""

    def forward(self, hidden: Tensor, residual: Tensor | None) -> Any:
        residual = hidden if residual is None else hidden + residual
        return 0.3 * residual.roll(1, -1), residual


class Whole(nn.Module):
    """As Cohere's: the stream is returned whole, and beside it the one that the layer began from."""

    def forward(self, hidden: Tensor, residual: Tensor | None) -> Any:
        residual = hidden
        return residual + 0.3 * hidden.roll(1, -1), residual


class Deaf(Whole):
    """As a layer that takes a residual for the sake of the interface alone."""

    def forward(self, hidden: Tensor, residual: Tensor | None) -> Any:
        return hidden + 0.3 * hidden.roll(1, -1), hidden


class Alone(nn.Module):
    def forward(self, hidden: Tensor, residual: Tensor | None) -> Any:
        return hidden + 0.3 * hidden.roll(1, -1), None


class Bare(nn.Module):
    def forward(self, hidden: Tensor, residual: Tensor | None) -> Any:
        return hidden + 0.3 * hidden.roll(1, -1)


class OfVllm(Bare):
    """A layer of vLLM's own, whose tokens come flat: with three dimensions it has several streams side by side."""

    __module__ = "vllm.model_executor.models.several"


class Unnamed(nn.Module):
    def forward(self, x: Tensor, r: Tensor | None) -> Any:
        r = x if r is None else x + r
        return 0.3 * r.roll(1, -1), r


class Toy(nn.Module):
    """A model of vLLM's make: what a layer returns goes into the next, and the stream comes out."""

    def __init__(self, kind: type[nn.Module]) -> None:
        super().__init__()
        self.config = SimpleNamespace(num_hidden_layers=LAYERS, hidden_size=HIDDEN)
        self.layers = nn.ModuleList(kind() for _ in range(LAYERS))
        for layer in self.layers:
            layer.weight = nn.Parameter(torch.zeros(1))  # so that it is one that this rank holds

    def forward(self, hidden: Tensor) -> Tensor:
        residual = None
        for layer in self.layers:
            given = layer(hidden, residual)
            hidden, residual = given if isinstance(given, tuple) else (given, None)
        whole = isinstance(self.layers[0], Whole)
        return hidden if residual is None or whole else hidden + residual


@pytest.mark.parametrize("kind", [Summing, Whole, Deaf, Alone, Bare])
@pytest.mark.parametrize("shape", [(200, HIDDEN), (4, 50, HIDDEN)], ids=["flat", "batch"])
def test_no_token_is_left_under_the_floor_however_a_layer_returns_the_stream(
    kind: type[nn.Module], shape: tuple[int, ...]
) -> None:
    floor = build_floor((1, LAYERS - 1), tau=0.5)
    hidden = torch.randn(*shape, generator=torch.Generator().manual_seed(0))
    model, plain = Toy(kind), Toy(kind)
    assert plugin.add_caps(model) == LAYERS
    assert torch.equal(model(hidden), plain(hidden)), "caps that are off change nothing"
    plugin._load_floor(Worker(model), plugin.floor_payload(floor))
    plugin._set_strength(Worker(model), "1.0")
    direction, tau = floor.directions[1], float(floor.tau[1])
    before, after = plain(hidden) @ direction, model(hidden) @ direction
    assert (before < tau).float().mean() > 0.3, "the floor must have something to lift"
    assert (after < tau - 1e-5).float().mean() == 0
    # all layers compute the same of the same stream: so must their capped selves, whatever they return
    wanted = Toy(Bare)
    plugin.add_caps(wanted)
    plugin._load_floor(Worker(wanted), plugin.floor_payload(floor))
    plugin._set_strength(Worker(wanted), "1.0")
    torch.testing.assert_close(model(hidden), wanted(hidden), atol=1e-5, rtol=1e-5)


def test_bfloat16_stays_bfloat16() -> None:
    model = Toy(Summing).bfloat16()
    plugin.add_caps(model)
    assert model(torch.randn(5, HIDDEN).bfloat16()).dtype == torch.bfloat16


def test_what_a_layer_returns_and_nobody_can_tell_is_refused() -> None:
    model = Toy(Unnamed)
    plugin.add_caps(model)
    with pytest.raises(UserError, match="its code does not tell whether their sum is the stream") as caught:
        model(torch.randn(5, HIDDEN))
    assert caught.value.key == "train.use_vllm" and "use_vllm=false" in caught.value.remedy
    several = Toy(Bare)
    plugin.add_caps(several)
    for shape in ((5, 2, 4, HIDDEN), (5, HIDDEN // 2)):
        with pytest.raises(UserError, match="where one residual stream is expected"):
            several(torch.randn(*shape))
    plugin.add_caps(flat := Toy(OfVllm))
    flat(torch.randn(5, HIDDEN))
    with pytest.raises(UserError, match=r"returns \(5, 2, 32\), where one residual stream"):
        flat(torch.randn(5, 2, HIDDEN))


def test_a_floor_of_another_model_is_refused() -> None:
    model = build_model("llama")
    plugin.add_caps(model)
    with pytest.raises(ValueError, match="wide"):
        plugin._load_floor(Worker(model), plugin.floor_payload(build_floor(hidden=HIDDEN + 1)))
    beyond = build_floor((1, LAYERS + 2))
    answers = [plugin._load_floor(Worker(model), plugin.floor_payload(beyond))]
    with pytest.raises(UserError, match=rf"\[{LAYERS + 2}\]"):
        plugin.check_loaded(beyond, answers)
    plugin.check_loaded(FLOOR, [{"layers": [1]}, {"layers": [2]}])  # two pipeline ranks


def test_without_vllm_the_remedy_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(plugin.SWITCH, raising=False)
    plugin.register()  # not asked for: nothing is imported, nothing changed
    monkeypatch.setenv(plugin.SWITCH, "0")
    with pytest.raises(UserError, match="use_vllm") as caught:
        make_trainer(tmp_path, use_vllm=True)
    assert "install it beside trimtab" in str(caught.value.remedy)


def with_vllm(trainer: Any, floor: Floor, **options: bool) -> StandIn:
    """Give a trainer a vLLM; returns what stands there for TRL's."""
    generation = StandIn(trainer, **options)
    trainer.vllm = VLLMRollouts(generation, ChatFormat(build_tokenizer()), floor, most=trainer.most)
    return generation


@pytest.mark.parametrize(("turns", "level"), [(1, "token"), (2, "token"), (2, "sequence")])
def test_the_ratio_is_of_what_the_sampler_says(tmp_path: Path, turns: int, level: str) -> None:
    prompt = [{"role": "user", "content": "Why is the sky blue?"}, {"role": "user", "content": "And the grass?"}][
        :turns
    ]
    given: list[float] = []

    def remembered(completions: Any, **columns: Any) -> list[float]:
        given.extend(letters(completions))
        return given

    own = {"ratio_limit": 1.5, "cap_schedule": "constant", "ratio_level": level}
    trainer = make_trainer(tmp_path, prompts=[prompt], rewards=[remembered], own=own)
    with_vllm(trainer, FLOOR)
    batch = one_batch(trainer, [prompt])
    rewards = torch.tensor(given)
    advantages = (rewards - rewards.mean()) / (rewards.std() + 1e-4)
    for i, (ids, count, said) in enumerate(rows_of(batch)):
        with torch.no_grad():
            learner = logprobs(trainer.model, ids, count, capped=False)
            sampler = logprobs(trainer.model, ids, count, capped=True)
        mine = said.bool()
        ratio = (learner - sampler).exp() if level == "token" else (learner - sampler)[mine].sum().exp().expand(count)
        wanted = ratio.clamp(max=1.5) * advantages[i]
        found = batch["advantages"].expand(-1, batch["completion_ids"].shape[1])[i, :count]
        torch.testing.assert_close(found[mine], wanted[mine], atol=1e-4, rtol=1e-3)
        assert batch["sampling_per_token_logps"].isfinite().all()
    assert trainer.vllm.distances == [pytest.approx(0.0, abs=1e-4)] * turns
    trainer.log({})
    assert trainer.state.log_history[-1]["vllm/distance"] == pytest.approx(0.0, abs=1e-4)


def test_a_sampler_that_does_not_cap_is_found_out(tmp_path: Path) -> None:
    trainer = make_trainer(tmp_path, own={"cap_schedule": "constant"})
    with_vllm(trainer, FLOOR, caps=False)
    with pytest.raises(UserError, match="as if it did not cap"):
        one_batch(trainer)


@pytest.mark.slow
@pytest.mark.parametrize("sleeps", [False, True])
def test_it_samples_for_every_sampler_what_transformers_samples(tmp_path: Path, form: Any, sleeps: bool) -> None:
    """Greedy: capped, student, capped self, base, several turns, another step's weights; awake or asleep in between."""
    order = [
        TrainPrompt(f"d{i}", "drift", "You are a ghost.", ("Who are you?", "And then?")[: 1 + i % 2], "")
        for i in range(6)
    ]
    order += [TrainPrompt(f"b{i}", "benign", "", (f"request {i}",), "") for i in range(2)]
    options = SamplingOptions(max_new_tokens=6, temperature=0.0, batch_size=4)
    for share in (None, 0.5):
        plan = RolloutPlan(
            order=order * 2, rows_a_step=8, batch_size=8, every=1, total_steps=2, strength=1.0, schedule="constant",
            options=options, seed=0, student_share=share, benign_student_share=0.5,
        )  # fmt: skip
        rounds = []
        for behind in (False, True):
            trainer = make_rows_trainer()
            generation = with_vllm(trainer, STRONG, sleeps=sleeps) if behind else None
            folder = tmp_path / f"{share}-{behind}"
            source = RolloutSource(plan, form, STRONG, folder, max_length=None)
            source.bind(trainer)
            for step in range(2):
                trainer.state.global_step = step
                shake(trainer.model, step)
                source({"row": list(range(8 * step, 8 * step + 8))})
            rounds.append([row for path in sorted(folder.iterdir()) for row in read_jsonl(path)])
            if generation is not None and not sleeps:
                assert generation.sent == 4, "the current weights and the base's, each step"
        assert rounds[0] == rounds[1]
        assert {row["sampler"] for row in rounds[0]} == {
            "student",
            "base",
            "capped" if share is None else "capped_self",
        }
        assert len({row["completion"][0]["content"] for row in rounds[0]}) >= 5
        assert trainer.vllm.distances == pytest.approx([0.0] * len(trainer.vllm.distances), abs=1e-4)


def test_sampling_the_base_in_between_takes_nothing_from_the_learner(tmp_path: Path) -> None:
    """GRPO's benign rows are the base's: the next rollouts of the same step are the learner's again."""
    trainer = make_trainer(tmp_path, own={"cap_schedule": "constant"})
    generation = with_vllm(trainer, FLOOR)
    options = SamplingOptions(max_new_tokens=4, temperature=0.0)
    said = []
    for step in (0, None, 0, 0):
        with trainer.vllm.sampling(step, 0.0, options) as sample:
            said.append(sample([[5, 6, 7]], [0])[0].ids)
    assert said[0] == said[2] == said[3] != said[1]
    assert generation.sent == 3


def test_ends_that_are_not_the_templates_carry_no_ratio(form: Any) -> None:
    """TRL's generation, of a given outcome: what comes of it here."""
    form.tokenizer.add_special_tokens({"additional_special_tokens": ["<|eot_id|>"]})
    other_end = form.tokenizer.convert_tokens_to_ids("<|eot_id|>")
    form = ChatFormat(form.tokenizer, ends=[other_end])
    assert set(form.end_ids) == {form.end_token, other_end}
    ids = [[5, 6, form.end_token], [7, 8, 9], [5, other_end], [5]]
    told = [[[-0.5], [None], [-0.25]], [[-1.0], [-2.0], [-3.0]], [[-1.0], [-2.0]], [[-1.0]]]
    generation = SimpleNamespace(generate=lambda prompts, images, number: (prompts, ids, told, None))
    rollouts = object.__new__(VLLMRollouts)
    rollouts.generation, rollouts.form, rollouts.most = generation, form, lambda number: number + 1
    ended, cut, other = rollouts.sample([[3], [4], [5]], SamplingOptions())
    assert (ended.ids, ended.ended, cut.ids, cut.ended) == ([5, 6], True, [7, 8, 9], False)
    assert ended.logprobs[0] == -0.5 and math.isnan(ended.logprobs[1]) and ended.logprobs[2] == -0.25
    assert cut.logprobs == [-1.0, -2.0, -3.0]
    assert other.ended and other.ids == [5] and other.logprobs[0] == -1.0 and math.isnan(other.logprobs[1])
