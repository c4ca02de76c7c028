"""A model on whose layers no axis is defined, or whose numbers are broken, is refused by name before anything is sampled."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import ARCHITECTURES, HIDDEN, LAYERS, VOCAB, build_floor, build_model
from test_calibration import rows
from test_extraction import run as extract_here
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel
from transformers.modeling_outputs import CausalLMOutput
from transformers.utils import ModelOutput

from trimtab.axis import ActivationController, Axis, UserError
from trimtab.axis.calibration import calibrate, response_projections
from trimtab.axis.chat_format import ChatFormat, chat
from trimtab.axis.compass import project_transcript
from trimtab.axis.models import Loaded
from trimtab.axis.sampling import SamplingOptions, sample_answers
from trimtab.axis.scoring import answer_logprobs
from trimtab.axis.soundness import check_model
from trimtab.losses.injection import floor_gradients

FLOOR = build_floor(tau=1.0)
IDS = torch.arange(3, 13).view(2, 5)
TEXT = {
    "vocab_size": VOCAB,
    "hidden_size": HIDDEN,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": 4,
    "pad_token_id": 0,
}


class OddLayer(nn.Module):
    """Adds something of each token, and of those before it, to the stream; returns it in one of many ways."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.kind = kind
        self.linear = nn.Linear(HIDDEN, HIDDEN)

    def forward(self, state: Any, mask: Tensor) -> Any:
        hidden = state
        if self.kind == "dict":
            hidden = state["hidden_states"] if isinstance(state, dict) else state
        past = torch.cumsum(hidden, -2) if self.kind != "reads ahead" else hidden.sum(-2, keepdim=True)
        hidden = hidden + 0.1 * self.linear(past).tanh()
        match self.kind:
            case "dict":
                return ModelOutput(hidden_states=hidden)
            case "second of a tuple":
                return hidden * 0.5, hidden
            case "nothing":
                state.copy_(hidden)
                return None
            case "a narrow stream":
                return hidden[..., : HIDDEN // 2]
        return hidden


class Odd(PreTrainedModel):
    """A decoder that is sound but for one thing."""

    config_class = type(AutoConfig.for_model("llama"))

    def __init__(self, config: Any, kind: str) -> None:
        super().__init__(config)
        self.kind = kind
        self.embed_tokens = nn.Embedding(VOCAB, HIDDEN)
        self.layers = nn.ModuleList(OddLayer(kind) for _ in range(LAYERS))
        self.head = nn.Linear(HIDDEN, VOCAB)
        self.post_init()

    def forward(self, input_ids: Tensor, attention_mask: Tensor | None = None, **_: Any) -> CausalLMOutput:
        state: Any = self.embed_tokens(input_ids)
        if self.kind == "streams side by side":
            state = torch.stack([state, 2 * state], 1)
        elif self.kind == "streams in the batch":
            state = torch.cat([state, 2 * state])
        elif self.kind == "flat tokens":
            state = state.flatten(0, 1)
        order = [*self.layers] * (2 if self.kind == "a loop" else 1)
        for layer in order[: -1 if self.kind == "a layer that is left out" else None]:
            given = layer(state, attention_mask)
            state = state if given is None else given[1] if isinstance(given, tuple) else given
            if self.kind == "a narrow stream":
                state = torch.cat([state, state], -1)
            elif self.kind == "something between":
                state = state + 1.0
        last = state["hidden_states"] if isinstance(state, dict) else state
        if self.kind.startswith("streams"):
            last = last[:, 0] if last.dim() == 4 else last[: len(input_ids)]
        return CausalLMOutput(logits=self.head(last.reshape(*input_ids.shape, HIDDEN)))


def odd(kind: str) -> Any:
    torch.manual_seed(0)
    return Odd(AutoConfig.for_model("llama", **TEXT), kind).eval()


# kind -> what is said of it at the first hooked forward
WRONG_OUTPUTS = {
    "streams side by side": r"layer 1 returns a tensor of shape \(2, 2, 5, 32\), .*\[batch, tokens, 32\].*several residual",
    "dict": "layer 1 returns a ModelOutput",
    "nothing": "layer 1 returns a NoneType",
    "a narrow stream": r"layer 1 returns a tensor of shape \(2, 5, 16\)",
    "flat tokens": r"layer 1 returns a tensor of shape \(10, 32\)",
}
HOOKED: dict[str, Callable[[ActivationController], Any]] = {
    "capping": lambda controller: controller.capping(FLOOR),
    "recording": lambda controller: controller.recording((1,)),
    "reading": lambda controller: controller.reading((1,), lambda layer, hidden: None),
}


@pytest.mark.parametrize("mode", HOOKED)
@pytest.mark.parametrize("kind", WRONG_OUTPUTS)
def test_no_hook_takes_another_tensor_for_the_stream(kind: str, mode: str) -> None:
    model = odd(kind)
    controller = ActivationController(model, layers=[*model.layers][1:])  # so that layer 1 is the first to be asked
    with (
        HOOKED[mode](controller),
        torch.no_grad(),
        pytest.raises(UserError, match=WRONG_OUTPUTS[kind].replace("1", "0", 1)),
    ):
        model(IDS)


def test_nor_does_the_injected_penalty() -> None:
    model = odd("streams side by side")
    with (
        floor_gradients(model, FLOOR, weight=1.0, accumulation=1),
        pytest.raises(UserError, match="several residual streams"),
    ):
        model(IDS)
    with (
        pytest.raises(UserError, match="beyond the model"),
        floor_gradients(odd("sound"), build_floor((1, 9)), weight=1.0, accumulation=1),
    ):
        pass


# kind -> what is said of it when the model is loaded
UNSOUND = {
    **{
        kind: says.replace("layer 1", "layer 0").replace("(2, 2, 5,", r"(2, 2, \d+,")
        for kind, says in WRONG_OUTPUTS.items()
    },
    "a narrow stream": "layer 0 returns a tensor of shape",
    "flat tokens": "layer 0 returns a tensor of shape",
    "streams in the batch": "several residual streams",
    "a loop": "layer 0 runs 2 times a forward",
    "a layer that is left out": "layer 3 runs 0 times a forward",
    "second of a tuple": "layer 1 does not get the stream that layer 0 returns; it gets another part of the tuple",
    "something between": "layer 1 does not get the stream that layer 0 returns",
    "reads ahead": "it reads later tokens",
}


@pytest.mark.parametrize("kind", UNSOUND)
def test_an_unsound_model_is_refused_when_it_is_loaded(kind: str, tokenizer: Any) -> None:
    with pytest.raises(UserError, match=UNSOUND[kind]) as caught:
        check_model(Loaded(odd(kind), tokenizer, {}))
    assert caught.value.key == "model.name" and caught.value.remedy


EXPERTS = {"moe_intermediate_size": 16, "n_routed_experts": 4, "num_local_experts": 4, "num_experts_per_tok": 2}
# families of transformers on whose layers no axis is defined -> settings of a tiny one, and what is said of it
FAMILIES: dict[str, tuple[dict[str, Any], str]] = {
    "deepseek_v4": (
        {
            "num_key_value_heads": 1,
            "head_dim": 8,
            "qk_rope_head_dim": 4,
            "q_lora_rank": 8,
            "o_lora_rank": 8,
            "o_groups": 2,
        }
        | EXPERTS,
        r"returns a tensor of shape \(2, \d+, 4, 32\)",
    ),
    "dory": ({"intermediate_size": 48, "num_key_value_heads": 2, "head_dim": 8}, "layer 0 runs 2 times a forward"),
    "bert": ({"intermediate_size": 48}, "it reads later tokens"),
}


@pytest.mark.parametrize("architecture", FAMILIES)
def test_families_without_one_causal_stream_are_refused(architecture: str, tokenizer: Any) -> None:
    settings, says = FAMILIES[architecture]
    torch.manual_seed(0)
    config = AutoConfig.for_model(architecture, **TEXT, **settings)
    with pytest.raises(UserError, match=says):
        check_model(Loaded(AutoModelForCausalLM.from_config(config).eval(), tokenizer, {}))


@pytest.mark.parametrize("architecture", [*ARCHITECTURES, "sound"])
def test_a_sound_model_is_left_as_it_was(architecture: str, tokenizer: Any) -> None:
    model = odd("sound") if architecture == "sound" else build_model(architecture)
    model.train()
    check_model(Loaded(model, tokenizer, {}))
    assert model.training
    layers = model.layers if architecture == "sound" else model.model.layers
    assert not any(layer._forward_hooks or layer._forward_pre_hooks for layer in layers)


def test_a_loop_has_no_answer_means(form: ChatFormat) -> None:
    """Where nobody has called :func:`check_model`: in a program of one's own."""
    model = build_model("llama")
    first, second = model.model.layers[:2]
    once = second.forward
    second.forward = lambda *args, **more: first(once(*args, **more), **more)
    with pytest.raises(UserError, match="layer 0 runs more than once a token"):
        sample_answers(model, form, [chat("", "Hi")], SamplingOptions(max_new_tokens=3), means=True)


def broken(kind: str) -> tuple[Any, str]:
    """A model that gives NaN or infinity, and what is to be said of it."""
    model = build_model("llama", max_position_embeddings=2048)
    match kind:
        case "NaN in a weight":
            model.model.layers[2].mlp.down_proj.weight.data[3, 4] = float("nan")
            return model, r"the weight model\.layers\.2\.mlp\.down_proj\.weight holds NaN or infinity"
        case "infinity in the head":
            model.lm_head.weight.data[:, 4] = float("inf")
            return model, r"the weight lm_head\.weight holds NaN or infinity"
        case "float16 overflows":
            model.model.layers[1].mlp.down_proj.weight.data *= 1e5
            return (
                model.half(),
                r"decoder layer 1 is the first to give NaN or infinity, in float16; no weight is damaged",
            )
    model.model.layers[1].mlp.down_proj.weight.data *= 1e38
    return model, "decoder layer 1 is the first to give NaN or infinity, in float32; no weight is damaged"


BROKEN = ["NaN in a weight", "infinity in the head", "float16 overflows", "float32 overflows"]


def damaged_later(model: Any) -> str:
    """Break a weight that the probe at loading may not meet, such as an expert's; says what is to be said of it."""
    model.model.layers[1].self_attn.v_proj.weight.data[0, 0] = float("nan")
    return r"the weight model\.layers\.1\.self_attn\.v_proj\.weight holds NaN or infinity"


@pytest.mark.parametrize("kind", BROKEN)
def test_numbers_that_are_not_finite_are_told_when_the_model_is_loaded(kind: str, tokenizer: Any) -> None:
    model, says = broken(kind)
    with pytest.raises(UserError, match=says) as caught:
        check_model(Loaded(model, tokenizer, {}))
    if "float16" in kind:
        assert caught.value.key == "model.dtype" and "bfloat16" in caught.value.remedy


@pytest.mark.parametrize("kind", BROKEN)
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_sampling_stops_at_the_first_batch_that_is_not_finite(kind: str, temperature: float, form: ChatFormat) -> None:
    model, says = broken(kind)
    options = SamplingOptions(max_new_tokens=3, temperature=temperature, batch_size=1)
    with pytest.raises(UserError, match=says):
        sample_answers(model, form, [chat("", "Hi"), chat("", "Hello")], options)


def test_extraction_stops_at_the_first_batch(loaded: Loaded, tmp_path: Path) -> None:
    """It went on to the end, and then asked for more questions."""
    says = damaged_later(loaded.model)
    with pytest.raises(UserError, match=says):
        extract_here(loaded, tmp_path)
    assert not (tmp_path / "rollouts.jsonl").exists(), "nothing was kept of it"


def test_calibration_scores_and_the_compass_stop_too(loaded: Loaded, form: ChatFormat) -> None:
    axis = Axis(torch.randn(LAYERS, HIDDEN))
    says = damaged_later(loaded.model)
    answer = rows(1)[0]
    for read in (
        lambda: calibrate(loaded, form, axis, rows(8), rows(2), layers=[3]),
        lambda: response_projections(loaded, form, rows(2), {"axis": axis.directions[3:]}, (3,)),
        lambda: answer_logprobs(loaded.model, form, [answer["prompt"]], [answer["completion"][0]["content"]]),
        lambda: project_transcript(loaded.model, form, build_floor((2, 3)), [*answer["prompt"], *answer["completion"]]),
    ):
        with pytest.raises(UserError, match=says):
            read()


def test_an_overflow_under_the_cap_alone_is_found_there(form: ChatFormat) -> None:
    model = build_model("llama").half()
    floor = replace(FLOOR, tau=torch.full((2,), 1e6))
    with pytest.raises(UserError, match="decoder layer 2 is the first to give NaN or infinity, in float16"):
        sample_answers(model, form, [chat("", "Hi")], SamplingOptions(max_new_tokens=3), floor=floor)
    assert sample_answers(model, form, [chat("", "Hi")], SamplingOptions(max_new_tokens=3))[0].ids
