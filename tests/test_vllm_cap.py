"""The cap of the vLLM plugin without vLLM: its arithmetic and its switch on transformers' layers. With vLLM: tests/vllm_job."""

from __future__ import annotations

import math
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from conftest import HIDDEN, LAYERS, build_floor, build_model, capped_by_hand
from test_grpo import letters, logprobs, make_trainer, one_batch, rows_of
from torch import Tensor, nn

from trimtab.axis import ActivationController, UserError
from trimtab.axis import vllm_cap as plugin
from trimtab.train.vllm_rollouts import VLLMRollouts

FLOOR = build_floor((1, 2), tau=2.0)
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


def test_each_way_in_which_a_layer_returns_the_stream() -> None:
    generator = torch.Generator().manual_seed(0)
    hidden, residual = torch.randn(2, 5, HIDDEN, generator=generator), torch.randn(2, 5, HIDDEN, generator=generator)
    layer = nn.Identity()
    layer.add_module("trimtab_cap", own := plugin.LayerCap(HIDDEN, torch.device("cpu")))
    own.direction.copy_(FLOOR.directions[0])
    own.tau.fill_(2.0)
    own.strength.fill_(1.0)

    def projection(stream: Tensor) -> Tensor:
        return stream @ FLOOR.directions[0]

    lifted, same, more = plugin._capped(layer, (), (hidden, residual, "more"))
    assert same is residual and more == "more"
    torch.testing.assert_close(projection(lifted + residual), projection(hidden + residual).clamp(min=2.0))
    alone, none = plugin._capped(layer, (), (hidden, None))
    assert none is None and torch.equal(alone, plugin._capped(layer, (), hidden))
    torch.testing.assert_close(projection(alone), projection(hidden).clamp(min=2.0))
    half = plugin._capped(layer, (), hidden.bfloat16())
    assert half.dtype == torch.bfloat16


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


class HuggingFaceBehindVLLM(VLLMRollouts):
    """Stands where vLLM does and answers by the trainer's own model; what it says of its tokens is true of the capped, or not."""

    def __init__(self, trainer: Any, *, honest: bool) -> None:
        self.trainer, self.honest, self.strengths = trainer, honest, []

    def _set_strength(self, strength: float) -> None:
        self.strengths.append(strength)

    def sample(self, prompts: Any) -> Any:
        answers = []
        for index, prompt in enumerate(prompts):
            trainer = self.trainer
            vllm, trainer.vllm = trainer.vllm, None
            with trainer._sampler() as sample:
                (answer,) = sample([prompt], [index])
            trainer.vllm = vllm
            ids = [*answer.ids, trainer.form.end_token] if answer.ended else answer.ids
            with torch.no_grad():
                said = logprobs(trainer.model, torch.tensor([*prompt, *ids]), len(ids), capped=self.honest)
            changed = {**vars(answer), "index": index, "logprobs": said.tolist()}
            answers.append(type(answer)(**changed))
        return answers


@pytest.mark.parametrize("turns", [1, 2])
def test_the_ratio_is_of_what_the_sampler_says(tmp_path: Path, turns: int) -> None:
    prompt = [{"role": "user", "content": "Why is the sky blue?"}, {"role": "user", "content": "And the grass?"}][
        :turns
    ]
    trainer = make_trainer(tmp_path, prompts=[prompt], own={"ratio_limit": 1.5, "cap_schedule": "constant"})
    trainer.vllm = HuggingFaceBehindVLLM(trainer, honest=True)
    batch = one_batch(trainer, [prompt])
    assert trainer.vllm.strengths == [1.0, 0.0]
    texts = trainer.processing_class.batch_decode(batch["completion_ids"], skip_special_tokens=True)
    rewards = torch.tensor(letters([[{"content": text}] for text in texts]))
    advantages = (rewards - rewards.mean()) / (rewards.std() + 1e-4)
    for i, (ids, count, said) in enumerate(rows_of(batch)):
        with torch.no_grad():
            learner = logprobs(trainer.model, ids, count, capped=False)
            sampler = logprobs(trainer.model, ids, count, capped=True)
        wanted = (learner - sampler).exp().clamp(max=1.5) * advantages[i]
        mine = said.bool()
        torch.testing.assert_close(batch["advantages"][i, :count][mine], wanted[mine], atol=1e-4, rtol=1e-3)
        assert batch["sampling_per_token_logps"].isfinite().all()
    assert trainer._metrics["train"]["vllm/distance"] == [pytest.approx(0.0, abs=1e-4)]


def test_a_sampler_that_does_not_cap_is_found_out(tmp_path: Path) -> None:
    trainer = make_trainer(tmp_path, own={"cap_schedule": "constant"})
    trainer.vllm = HuggingFaceBehindVLLM(trainer, honest=False)
    with pytest.raises(UserError, match="as if it did not cap"):
        one_batch(trainer)


def test_ends_that_are_not_the_templates_carry_no_ratio(form: Any) -> None:
    """TRL's generation, of a given outcome: what comes of it here."""
    form.tokenizer.add_special_tokens({"additional_special_tokens": ["<|eot_id|>"]})
    other_end = form.tokenizer.convert_tokens_to_ids("<|eot_id|>")
    assert set(form.end_ids) == {form.end_token, other_end}
    ids = [[5, 6, form.end_token], [7, 8, 9], [5, other_end], [5]]
    told = [[[-0.5], [None], [-0.25]], [[-1.0], [-2.0], [-3.0]], [[-1.0], [-2.0]], [[-1.0]]]
    generation = SimpleNamespace(generate=lambda prompts, images, number: (prompts, ids, told, None))
    rollouts = object.__new__(VLLMRollouts)
    rollouts.generation, rollouts.form, rollouts.most = generation, form, lambda number: number + 1
    ended, cut, other = rollouts.sample([[3], [4], [5]])
    assert (ended.ids, ended.ended, cut.ids, cut.ended) == ([5, 6], True, [7, 8, 9], False)
    assert ended.logprobs[0] == -0.5 and math.isnan(ended.logprobs[1]) and ended.logprobs[2] == -0.25
    assert cut.logprobs == [-1.0, -2.0, -3.0]
    assert other.ended and other.ids == [5] and other.logprobs[0] == -1.0 and math.isnan(other.logprobs[1])
