"""The decoder layers are found in any architecture and wrapper, and never a vision tower's."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from conftest import ARCHITECTURES, HIDDEN, LAYERS, build_floor, build_model
from peft import LoraConfig, get_peft_model
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForImageTextToText, PreTrainedModel

from trimtab.axis import ActivationController, UserError, find_decoder_layers
from trimtab.axis.chat_format import ChatFormat, chat
from trimtab.axis.layers import base_model_of, shape_of
from trimtab.axis.sampling import SamplingOptions, sample_answers
from trimtab.losses.injection import floor_gradients
from trimtab.train.penalty import check_reach

TEXT = {"vocab_size": 300, "hidden_size": HIDDEN, "intermediate_size": 48, "num_hidden_layers": LAYERS}
HEADS = {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8}
OTHERS: dict[str, dict[str, Any]] = {
    "mistral": TEXT | HEADS,
    "olmo2": TEXT | HEADS,
    "gpt_neox": TEXT | {"num_attention_heads": 4},
    "gpt2": {"vocab_size": 300, "n_embd": HIDDEN, "n_layer": LAYERS, "n_head": 4},
    "bloom": {"vocab_size": 300, "hidden_size": HIDDEN, "n_layer": LAYERS, "n_head": 4},
    "gptj": {"vocab_size": 300, "n_embd": HIDDEN, "n_layer": LAYERS, "n_head": 4, "rotary_dim": 4},
    "opt": {
        "vocab_size": 300,
        "hidden_size": HIDDEN,
        "num_hidden_layers": LAYERS,
        "ffn_dim": 48,
        "num_attention_heads": 4,
    }
    | {"word_embed_proj_dim": HIDDEN},
    "modernbert-decoder": TEXT | {"num_attention_heads": 4, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2},
    "qwen3_moe": TEXT | HEADS | {"moe_intermediate_size": 16, "num_experts": 4, "num_experts_per_tok": 2},
}
VISION = {"hidden_size": HIDDEN, "intermediate_size": 48, "num_hidden_layers": LAYERS, "num_attention_heads": 4}
MULTIMODAL: dict[str, dict[str, Any]] = {
    "gemma3": {"text_config": TEXT | HEADS, "vision_config": VISION | {"image_size": 32, "patch_size": 8}},
    "llava": {
        "text_config": TEXT | HEADS | {"model_type": "llama"},
        "vision_config": VISION | {"model_type": "clip_vision_model", "image_size": 32, "patch_size": 8},
    },
    "qwen2_5_vl": {
        "text_config": TEXT | HEADS | {"rope_parameters": {"rope_type": "default", "mrope_section": [1, 1, 2]}},
        "vision_config": {"depth": LAYERS, "hidden_size": HIDDEN, "intermediate_size": 48, "num_heads": 4}
        | {"out_hidden_size": HIDDEN},
    },
}


def on_meta(architecture: str) -> Any:
    config = AutoConfig.for_model(architecture, **OTHERS[architecture])
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(config)


def by_hidden_states(model: Any, layers: nn.ModuleList) -> None:
    """The outputs of the found layers are what the model itself calls its hidden states (the last one is normed there)."""
    seen: list[torch.Tensor] = []
    handles = [
        layer.register_forward_hook(lambda m, a, out: seen.append(out[0] if isinstance(out, tuple) else out))
        for layer in layers
    ]
    states = model(input_ids=torch.arange(3, 9)[None], output_hidden_states=True).hidden_states
    for handle in handles:
        handle.remove()
    assert len(seen) == LAYERS == len(states) - 1
    for mine, theirs in zip(seen[:-1], states[1:-1], strict=True):
        assert torch.equal(mine, theirs)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_decoder_layers_of_the_main_architectures(architecture: str) -> None:
    model = build_model(architecture)
    assert shape_of(model) == (LAYERS, HIDDEN)
    by_hidden_states(model, find_decoder_layers(model))


@pytest.mark.parametrize("architecture", OTHERS)
def test_decoder_layers_of_other_architectures(architecture: str) -> None:
    config = AutoConfig.for_model(architecture, **OTHERS[architecture])
    model = AutoModelForCausalLM.from_config(config).eval()
    assert shape_of(model) == (LAYERS, HIDDEN)
    by_hidden_states(model, find_decoder_layers(model))


@pytest.mark.parametrize("architecture", MULTIMODAL)
def test_a_vision_tower_of_the_same_depth_is_never_taken(architecture: str) -> None:
    with torch.device("meta"):
        model = AutoModelForImageTextToText.from_config(AutoConfig.for_model(architecture, **MULTIMODAL[architecture]))
    same_length = [m for m in model.modules() if isinstance(m, nn.ModuleList) and len(m) == LAYERS]
    assert len(same_length) >= 2, "the test needs a vision tower of the decoder's depth"
    found = find_decoder_layers(model)
    name = next(name for name, module in model.named_modules() if module is found)
    assert "language_model" in name and "vis" not in name
    assert shape_of(model) == (LAYERS, HIDDEN)


def test_wrappers_lead_to_the_same_layers() -> None:
    model = build_model("llama")
    layers = list(find_decoder_layers(model))
    adapted = get_peft_model(model, LoraConfig(target_modules="all-linear", r=2))
    assert isinstance(adapted, nn.Module)
    compiled = torch.compile(adapted, backend="eager")
    in_parallel = nn.DataParallel(adapted)
    compiled_bare = torch.compile(build_model("llama"), backend="eager")
    for wrapped in (adapted, compiled, in_parallel, torch.compile(in_parallel, backend="eager")):
        assert all(a is b for a, b in zip(find_decoder_layers(wrapped), layers, strict=True))  # type: ignore[arg-type]
        assert base_model_of(wrapped) is model  # type: ignore[arg-type]
    assert len(find_decoder_layers(compiled_bare)) == LAYERS  # type: ignore[arg-type]


class Odd(PreTrainedModel):
    """A decoder whose layers are not in a list of the right length."""

    config_class = type(AutoConfig.for_model("llama"))

    def __init__(self, config: Any) -> None:
        super().__init__(config)
        self.blocks = nn.ModuleList(nn.Linear(HIDDEN, HIDDEN) for _ in range(LAYERS + 1))
        self.post_init()

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        for block in list(self.blocks)[:LAYERS]:
            hidden = block(hidden)
        return hidden


def test_failure_is_loud_and_its_remedy_works() -> None:
    model = Odd(AutoConfig.for_model("llama", **TEXT, **HEADS))
    with pytest.raises(UserError, match=r"no list of 4 decoder layers in Odd\.\w+; looked at: blocks \[5\]") as caught:
        find_decoder_layers(model)
    assert "ActivationController(model, layers=...)" in caught.value.remedy
    stranger = nn.Linear(HIDDEN, HIDDEN)
    for given in ([], [model.blocks[0], model.blocks[0]], [*model.blocks, stranger]):
        with pytest.raises(UserError, match="these are not the decoder layers of Odd"):
            ActivationController(model, layers=given)
    controller = ActivationController(model, layers=list(model.blocks)[:LAYERS])
    assert ActivationController.of(model) is controller, "sampling and calibration look it up"
    with controller.recording([3]) as recording:
        out = model(torch.randn(1, 2, HIDDEN))
    assert torch.equal(recording.last(3), out)


def test_layers_given_by_hand_count_whatever_the_config_counts(form: ChatFormat) -> None:
    """As the remedy says: where a config counts a draft layer too, or two for one."""
    model, plain = build_model("llama"), build_model("llama")
    model.config.num_hidden_layers = LAYERS + 1
    with pytest.raises(UserError, match="no list of 5 decoder layers"):
        ActivationController.of(model)
    controller = ActivationController(model, layers=list(model.model.layers))
    assert (controller.n_layers, controller.hidden_size) == (LAYERS, HIDDEN)
    last = build_floor((2, LAYERS - 1), tau=2.0)
    options = SamplingOptions(max_new_tokens=4, temperature=0)
    asked = [chat("", "Hi")]
    given, found = (sample_answers(m, form, asked, options, means=True, floor=last)[0] for m in (model, plain))
    assert given.ids == found.ids and given.mean is not None and found.mean is not None
    assert torch.equal(given.mean, found.mean)
    for beyond in (
        lambda: controller.capping(build_floor((1, LAYERS))),
        lambda: floor_gradients(model, build_floor((1, LAYERS)), weight=1.0, accumulation=1),
    ):
        with pytest.raises(UserError, match="floor layer 4 is beyond the model, whose layers are 0 to 3"), beyond():
            pass
    assert check_reach(model, last) == 0
    with pytest.raises(UserError, match="floor layer 4 is beyond the model"):
        check_reach(model, build_floor((1, LAYERS)))
    with floor_gradients(model, last, weight=1.0, accumulation=1) as injection:
        model(input_ids=torch.arange(3, 9)[None]).logits.sum().backward()
    assert injection.figures()["floor_violation_rate"] > 0


def test_a_config_without_a_depth_is_told_so() -> None:
    model = Odd(AutoConfig.for_model("llama", **TEXT, **HEADS))
    model.config = SimpleNamespace(hidden_size=HIDDEN)
    with pytest.raises(UserError, match="SimpleNamespace does not tell num_hidden_layers: None"):
        find_decoder_layers(model)
    assert ActivationController(model, layers=list(model.blocks)).n_layers == LAYERS + 1
    model.config = SimpleNamespace(num_hidden_layers=LAYERS, hidden_size="32")
    with pytest.raises(UserError, match="does not tell hidden_size: '32'"):
        shape_of(model)


def test_two_lists_of_the_same_depth_are_not_guessed() -> None:
    model = Odd(AutoConfig.for_model("llama", **TEXT, **HEADS))
    model.left = nn.ModuleList(nn.Identity() for _ in range(LAYERS))
    model.right = nn.ModuleList(nn.Identity() for _ in range(LAYERS))
    with pytest.raises(UserError, match="more than one list"):
        find_decoder_layers(model)


def test_a_model_without_a_config_is_refused() -> None:
    with pytest.raises(UserError, match="Linear has no config"):
        find_decoder_layers(nn.Linear(2, 2))
