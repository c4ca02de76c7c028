"""Kinds of adapters under the penalty: they learn from it, they are merged for sampling, and come back bit by bit."""

from __future__ import annotations

import contextlib
import copy
import logging
from pathlib import Path
from typing import Any

import datasets
import pytest
import torch
from conftest import LAYERS, VOCAB, build_floor, build_model, build_tokenizer
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file
from test_floor_sft import make_rows, make_trainer, wake
from trl import DPOConfig, GRPOConfig

from trimtab.axis import ActivationController, UserError, base_check
from trimtab.axis.adapters import as_base, can_merge, merged, merged_weights
from trimtab.axis.chat_format import ChatFormat
from trimtab.axis.models import load_model
from trimtab.train.floor_distill import FloorDistillTrainer
from trimtab.train.floor_dpo import FloorDPOTrainer
from trimtab.train.floor_grpo import FloorGRPOTrainer
from trimtab.train.floor_sft import FloorSFTTrainer

IDS = torch.randint(3, VOCAB, (2, 9), generator=torch.Generator().manual_seed(0))
KINDS: dict[str, dict[str, Any]] = {
    "lora": {},
    "rslora": {"use_rslora": True},
    "dora": {"use_dora": True},
    "window only": {"layers_to_transform": [0, 1, 2], "target_modules": ["q_proj", "v_proj", "down_proj"]},
    "embedding": {"target_modules": ["q_proj", "embed_tokens"]},
    "rows of tokens": {"trainable_token_indices": [5, 80, 254]},
}


def lora(kind: str) -> dict[str, Any]:
    return {"r": 4, "lora_dropout": 0.0, "target_modules": "all-linear", **KINDS[kind]}


@pytest.mark.slow
@pytest.mark.parametrize("kind", list(KINDS))
@pytest.mark.parametrize("trainer", [FloorSFTTrainer, FloorDistillTrainer])
def test_the_penalty_trains_it(tmp_path: Path, kind: str, trainer: Any) -> None:
    rows = make_rows(4) * 8
    made = make_trainer(
        tmp_path, rows, kind=trainer, lora=lora(kind), max_steps=8, extra={"floor_weight": 1.0, "benign_kl_weight": 0.0}
    )
    made.train()
    history = [row["floor_penalty"] for row in made.state.log_history if "floor_penalty" in row]
    assert history[-1] < 0.8 * history[0]
    made.save_model(str(tmp_path / "adapter"))
    base = build_model("llama")
    again = PeftModel.from_pretrained(base, str(tmp_path / "adapter")).eval()
    with torch.no_grad():
        wanted = again(input_ids=IDS).logits
        plain = again.merge_and_unload()(input_ids=IDS).logits
    torch.testing.assert_close(plain, wanted, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("kind", list(KINDS))
def test_merged_for_a_while_and_given_back(kind: str) -> None:
    model = get_peft_model(build_model("llama"), LoraConfig(task_type="CAUSAL_LM", **lora(kind))).eval()
    wake(model)
    assert can_merge(model)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    with torch.no_grad():
        wanted = model(input_ids=IDS).logits
        with merged(model):
            torch.testing.assert_close(model(input_ids=IDS).logits, wanted, atol=1e-5, rtol=1e-4)
        assert model(input_ids=IDS).logits.equal(wanted)
    assert all(value.equal(before[name]) for name, value in model.state_dict().items())


@pytest.mark.slow
@pytest.mark.parametrize("kind", [*KINDS, "another head"])
def test_weights_one_by_one_are_those_of_the_merged_model(kind: str) -> None:
    """And those of the base, which a hundred rounds leave as it was, in bfloat16 too."""
    chosen = (
        lora("lora") | {"target_modules": ["q_proj"], "modules_to_save": ["lm_head"]}
        if kind == "another head"
        else lora(kind)
    )
    plain = build_model("llama").bfloat16()
    model = get_peft_model(copy.deepcopy(plain), LoraConfig(task_type="CAUSAL_LM", **chosen)).eval()
    wake(model)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    for _ in range(100 if kind in ("lora", "dora", "another head") else 3):
        found = {name: weight.clone() for name, weight in merged_weights(model)}
    assert all(value.equal(before[name]) for name, value in model.state_dict().items())
    wanted = copy.deepcopy(model).merge_and_unload().state_dict()
    assert found.keys() == wanted.keys()
    for name, weight in found.items():
        torch.testing.assert_close(weight, wanted[name], atol=0, rtol=0)
    assert sum(not found[name].equal(value) for name, value in plain.state_dict().items()) >= 4
    for name, weight in merged_weights(model, base=True):
        assert weight.equal(plain.state_dict()[name]), name


def dpo(folder: Path, lora: dict[str, Any]) -> Any:
    answer = [{"role": "assistant", "content": "Bake it."}]
    row = {"prompt": [{"role": "user", "content": "How?"}], "chosen": answer, "rejected": answer}
    return FloorDPOTrainer(
        model=build_model("llama"), args=DPOConfig(str(folder), use_cpu=True, bf16=False, report_to="none"),
        peft_config=LoraConfig(task_type="CAUSAL_LM", **lora),
        train_dataset=datasets.Dataset.from_list([row] * 2), processing_class=build_tokenizer(), floor=build_floor(),
    )  # fmt: skip


def grpo(folder: Path, lora: dict[str, Any]) -> Any:
    settings = {
        "use_cpu": True,
        "bf16": False,
        "report_to": "none",
        "num_generations": 2,
        "per_device_train_batch_size": 2,
    }
    tokenizer = build_tokenizer()
    return FloorGRPOTrainer(
        model=build_model("llama"), args=GRPOConfig(str(folder), **settings),
        peft_config=LoraConfig(task_type="CAUSAL_LM", **lora),
        reward_funcs=[lambda completions, **columns: [0.0] * len(completions)], floor=build_floor(),
        train_dataset=datasets.Dataset.from_list([{"prompt": [{"role": "user", "content": "How?"}]}] * 2),
        processing_class=tokenizer, form=ChatFormat(tokenizer),
    )  # fmt: skip


def sft(folder: Path, lora: dict[str, Any]) -> Any:
    return make_trainer(folder, make_rows(4), lora=lora)


def distill(folder: Path, lora: dict[str, Any]) -> Any:
    return make_trainer(folder, make_rows(4), kind=FloorDistillTrainer, lora=lora)


@pytest.mark.parametrize("trainer", [sft, distill, grpo, dpo])
def test_with_the_adapter_off_every_trainer_has_the_base(tmp_path: Path, trainer: Any) -> None:
    """PiSSA puts the main part of a weight into the adapter and leaves the rest below it."""
    config = {"r": 4, "target_modules": ["q_proj"], "lora_dropout": 0.0}
    with torch.no_grad():
        wanted = build_model("llama")(input_ids=IDS).logits
        model = trainer(tmp_path / "plain", config).model.eval()
        with model.disable_adapter():
            assert model(input_ids=IDS).logits.equal(wanted)
    with pytest.raises(UserError, match="init_lora_weights: pissa rewrites"):
        trainer(tmp_path / "pissa", config | {"init_lora_weights": "pissa"})


def qwen2(**changes: Any) -> Any:
    """A model with biases, and embedding and head in one."""
    return build_model("qwen2", **{"tie_word_embeddings": True, **changes})


# options -> what is said, key and weight
NOT_THE_BASE: list[tuple[dict[str, Any], str]] = [
    ({"init_lora_weights": "olora"}, "lora.init_lora_weights: olora rewrites"),
    ({"init_lora_weights": "pissa_niter_2"}, "lora.init_lora_weights: pissa_niter_2 rewrites"),
    ({"kasa_config": {"beta": 1e-4}}, "lora.kasa_config"),
    ({"layer_replication": [[0, 3], [1, 4]]}, "lora.layer_replication"),
    ({"bias": "all"}, "lora.bias: .*q_proj.base_layer.bias is the base's own"),
    ({"bias": "lora_only"}, "lora.bias: .*q_proj.base_layer.bias is the base's own"),
    ({"modules_to_save": ["norm"]}, "lora.modules_to_save: .*norm.modules_to_save"),
    ({"modules_to_save": ["lm_head"]}, "lora.modules_to_save: the head would be tuned"),
    ({"modules_to_save": ["embed_tokens"]}, "lora.modules_to_save: this model's embedding and head are one"),
    ({"target_modules": ["q_proj", "embed_tokens"]}, "lora.target_modules: this model's embedding and head are one"),
    ({"target_modules": r".*(q_proj|embed_tokens)"}, "lora.target_modules: this model's embedding and head are one"),
    ({"trainable_token_indices": [5]}, "lora.trainable_token_indices: the head would be tuned.*\n.*remedy.*one weight"),
    ({"target_modules": ["q_proj"], "layers_to_transform": [0, 9]}, "lora.layers_to_transform: there is no layer 9"),
]


@pytest.mark.parametrize(("options", "said"), NOT_THE_BASE)
def test_what_the_base_could_not_be_told_from_is_refused(tmp_path: Path, options: dict[str, Any], said: str) -> None:
    lora = {"r": 4, "target_modules": ["q_proj", "v_proj"], **options}
    with pytest.raises(UserError, match=said):
        make_trainer(tmp_path, make_rows(4), model=qwen2(), lora=lora)


def test_what_rewrites_weights_is_seen_by_the_weights(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever it is called: the first weight that is another is named. A change that no weight shows is seen by the logits."""
    monkeypatch.setattr(base_check, "REWRITING", ())
    with pytest.raises(UserError, match=r"no longer the base: model\.layers\.0\.self_attn\.q_proj\.weight has changed"):
        make_trainer(tmp_path, make_rows(4), lora={"r": 4, "target_modules": ["q_proj"], "init_lora_weights": "pissa"})
    model = build_model("llama")
    before = base_check.record_base(model)
    adapted = get_peft_model(model, LoraConfig(r=4, target_modules=["q_proj"]))
    base_check.check_base(adapted, before, key="lora", remedy="none")
    model.model.layers[1].mlp.register_forward_hook(lambda module, inputs, output: 1.5 * output)
    with pytest.raises(UserError, match="weights are the same, and its logits are not"):
        base_check.check_base(adapted, before, key="lora", remedy="none")


def test_a_model_that_can_not_be_run_yet_is_told_by_its_weights() -> None:
    """As one with Flash Attention, which lies on the CPU until the trainer places it."""

    def on_a_gpu_alone(module: Any, inputs: Any) -> None:
        raise RuntimeError("FlashAttention only supports GPUs")

    lora: dict[str, Any] = {"r": 4, "target_modules": ["q_proj"]}
    for changes, whole in (({}, True), ({"init_lora_weights": "pissa"}, False)):
        model = build_model("llama")
        model.model.register_forward_pre_hook(on_a_gpu_alone)
        before = base_check.record_base(model)
        assert before is not None and before.logits is None and model.training is False
        adapted = get_peft_model(model, LoraConfig(**lora, **changes))
        with contextlib.nullcontext() if whole else pytest.raises(UserError, match=r"q_proj\.weight has changed"):
            base_check.check_base(adapted, before, key="lora", remedy="none")


def test_a_name_that_no_module_has_is_told(caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(logging.getLogger("trimtab"), "propagate", True)
    lora = {"target_modules": ["q_proj", "v_prj"], "rank_pattern": {"q_proj": 2, "o_proj": 3}}
    base_check.check_adapters(get_peft_model(build_model("llama"), LoraConfig(**lora)))
    assert "lora.target_modules: no adapted module is called v_prj" in caplog.text
    assert "lora.rank_pattern: no adapted module is called o_proj" in caplog.text and "q_proj" not in caplog.text


def test_experts_are_sent_as_the_checkpoint_has_them(tmp_path: Path) -> None:
    """One weight in transformers, under two adapters, and many in the file: readers of files know them by no other name."""
    plain = build_model("qwen3_moe", moe_intermediate_size=16, num_experts=4, num_experts_per_tok=2, mlp_only_layers=[])
    plain.save_pretrained(tmp_path / "plain")
    experts = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]
    config = LoraConfig(r=4, target_modules=["q_proj"], target_parameters=experts, task_type="CAUSAL_LM")
    model = get_peft_model(plain, config).eval()
    wake(model)
    base, found = (
        {name: weight.clone() for name, weight in merged_weights(model, base=which)} for which in (True, False)
    )
    model.merge_and_unload().save_pretrained(tmp_path / "merged")
    for weights, folder in ((base, "plain"), (found, "merged")):
        wanted = load_file(tmp_path / folder / "model.safetensors")
        assert weights.keys() == wanted.keys()
        assert all(weight.equal(wanted[name]) for name, weight in weights.items())
    assert sum(not found[name].equal(weight) for name, weight in base.items()) == LAYERS * (1 + 4 * 3)


def test_adapters_above_the_floor_are_told(tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: Any) -> None:
    monkeypatch.setattr(logging.getLogger("trimtab"), "propagate", True)
    with caplog.at_level(logging.INFO, logger="trimtab"):
        make_trainer(tmp_path, make_rows(4))
    assert "gradient ends at layer 2; adapters above it, up to layer 3" in caplog.text


@pytest.mark.slow
@pytest.mark.parametrize("quantization", ["nf4", "int8"])
@pytest.mark.parametrize("trainer", [FloorSFTTrainer, FloorDistillTrainer])
def test_qlora(tmp_path: Path, quantization: str, trainer: Any) -> None:
    """bitsandbytes works on a CPU. The base stays quantised, the adapter learns, and the capped self is the quantised base."""
    # 4-bit blocks are of 64 weights
    build_model("llama", hidden_size=64, intermediate_size=128, head_dim=16).save_pretrained(tmp_path / "model")
    build_tokenizer().save_pretrained(tmp_path / "model")
    loaded = load_model(str(tmp_path / "model"), dtype="float32", device="cpu", quantization=quantization)
    kinds = {type(module).__name__ for module in loaded.model.modules()}
    assert kinds & {"Linear4bit", "Linear8bitLt"}
    made = make_trainer(
        tmp_path, make_rows(4) * 8, kind=trainer, model=loaded.model, floor=build_floor((1, 2), tau=2.0, hidden=64),
        lora={"r": 4, "lora_dropout": 0.0, "target_modules": "all-linear"}, max_steps=8,
        extra={"floor_weight": 1.0},
    )  # fmt: skip
    assert not can_merge(made.model)
    made.train()
    history = [row["floor_penalty"] for row in made.state.log_history if "floor_penalty" in row]
    assert history[-1] < 0.8 * history[0]
    assert {type(m).__name__ for m in made.model.modules()} & {"Linear4bit", "Linear8bitLt"}


def test_the_base_has_no_dropout_in_training() -> None:
    """Else teacher, reference and barrier would be others at every forward."""
    model: Any = get_peft_model(build_model("llama", attention_dropout=0.5), LoraConfig(r=2, target_modules=["o_proj"]))
    model.train()
    ids = torch.arange(3, 12)[None]
    assert not torch.equal(model(input_ids=ids).logits, model(input_ids=ids).logits)
    with as_base(model, ActivationController.of(model)) as base:
        assert torch.equal(base(input_ids=ids).logits, base(input_ids=ids).logits)
    assert model.training and all(module.training for module in model.modules())
