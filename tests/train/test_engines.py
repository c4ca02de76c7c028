"""One process = two processes, on every engine that a CPU can run, through the real launcher and the real entry scripts.

All methods on all engines, and their resumption, are in ``benchmarks/engines.py``; here each engine and each method comes once at
least. Answers are sampled at random where the method does so by itself: the random numbers belong to the row.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import needs
import pytest
from peft import PeftModel
from tiny_recipe import (
    TWO_PROCESSES,
    adapter,
    command,
    environment,
    largest_difference,
    launch,
    run,
    save_small,
    write_recipe,
)
from transformers import AutoModelForCausalLM

from trimtab.axis.adapters import merged_weights
from trimtab.axis.files import read_jsonl

# A figure of the step that must be the same, besides the loss; of every method one that says whether its own part is right.
FIGURES = {
    "sft": ("grad_norm", "floor_violation_rate", "floor_z/layer_1", "benign_axis"),
    "distill": ("grad_norm", "distill_jsd"),
    "grpo": ("grad_norm", "reward", "off_policy/log_ratio", "off_policy/sample_size"),
    "dpo": ("grad_norm", "rewards/margins"),
}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_small(tmp_path_factory.mktemp("engines") / "model")


def one_process(method: str, model: Path) -> Path:
    """The run folder of one process, of the entry script alone."""
    folder = model.parent / f"{method}-alone"
    if not folder.exists():
        recipe = write_recipe(model.parent / f"{method}-alone.yaml", model, method)
        done = run(command(recipe, folder, script=f"trimtab.train.{method}"), env=environment())
        assert done.returncode == 0, done.stderr[-6000:]
    return folder


def rollouts(folder: Path) -> list[dict[str, Any]]:
    """All rows of all rounds and ranks, in order, without what names the rank's share."""
    rows = [row for path in (folder / "rollouts").glob("*.jsonl") for row in read_jsonl(path)]
    return [{k: v for k, v in row.items() if k != "identity"} for row in sorted(rows, key=lambda row: row["row"])]


@pytest.mark.distributed
@pytest.mark.parametrize(
    ("engine", "method", "kind", "wrapper", "stage"),
    [
        ("ddp-cpu", "distill", "MULTI_CPU", "DistributedDataParallel", None),
        ("zero2-cpu", "dpo", "DEEPSPEED", "DeepSpeedEngine", 2),
        ("zero3-cpu", "sft", "DEEPSPEED", "DeepSpeedEngine", 3),
        ("zero3-cpu", "grpo", "DEEPSPEED", "DeepSpeedEngine", 3),
        ("zero3-offload", "sft", "DEEPSPEED", "DeepSpeedEngine", 3),
        ("fsdp2", "sft", "FSDP", "FSDPPeftModelForCausalLM", None),
    ],
)
def test_two_processes_train_the_adapter_of_one(
    model: Path, engine: str, method: str, kind: str, wrapper: str, stage: int | None
) -> None:
    if stage is not None:
        needs.deepspeed()
    alone = one_process(method, model)
    folder, notes = launch(engine, method, model, model.parent)
    assert len(notes) == 2
    for note in notes:
        assert note["processes"] == 2
        assert (note["distributed_type"], note["wrapper"], note["zero_stage"]) == (kind, wrapper, stage)
        # FSDP2 keeps what lies outside of the layers whole after a forward
        share = note["sharded"] / note["weights"]
        assert share > 0.95 if engine.startswith(("zero3", "fsdp2")) else share == 0
        assert note["checkpointing"] == ["non-reentrant"]
    record = json.loads((folder / "stages" / "train.json").read_text(encoding="utf-8"))["facts"]
    assert (record["processes"], record["steps"]) == (2, 4)
    # the same text, sampled by two ranks with the weights of the moment, capped and not ...
    assert rollouts(folder) == rollouts(alone)
    # ... the same figures ...
    ours, theirs = read_jsonl(folder / "metrics.jsonl"), read_jsonl(alone / "metrics.jsonl")
    for name in ("loss", "floor_penalty", "benign_kl", *FIGURES[method]):
        assert [row[name] for row in ours] == pytest.approx([row[name] for row in theirs], rel=1e-3, abs=1e-5), name
    # ... and the same adapter ...
    assert largest_difference(adapter(folder), adapter(alone)) < 1e-4
    # ... which every rank would send to vLLM merged, a layer at a time, from whatever pieces there are
    plain = AutoModelForCausalLM.from_pretrained(model)
    learnt = PeftModel.from_pretrained(plain, folder / "adapter")
    wanted = {name: (float(weight.sum()), float(weight.norm())) for name, weight in merged_weights(learnt)}
    for note in notes:
        assert note["sent"].keys() == wanted.keys()
        for name, figures in wanted.items():
            assert note["sent"][name] == pytest.approx(figures, rel=1e-4, abs=1e-3), name


@pytest.mark.distributed
def test_a_run_goes_on_with_another_number_of_processes(model: Path, tmp_path: Path) -> None:
    """Begun by two and ended by one, and the other way round; with as many rows a step, or not at all."""
    method = "sft"
    alone = one_process(method, model)
    two, _ = launch("ddp-cpu", method, model, tmp_path)

    def half(whole: Path, name: str) -> Path:
        copy = tmp_path / "again" / name
        shutil.copytree(whole, copy, ignore=shutil.ignore_patterns("adapter", "checkpoint-4"))
        (copy / "stages" / "train.json").unlink()
        return copy

    half(two, f"{method}-cpu")
    by_one, notes = launch("cpu", method, model, tmp_path / "again", resume=True)
    assert [(note["from_step"], note["processes"]) for note in notes] == [(2, 1)]
    half(alone, f"{method}-ddp-cpu")
    by_two, notes = launch("ddp-cpu", method, model, tmp_path / "again", resume=True)
    assert [(note["from_step"], note["processes"]) for note in notes] == [(2, 2)] * 2
    for folder in (two, by_one, by_two):
        assert largest_difference(adapter(folder), adapter(alone)) < 1e-4
    wrong = half(two, "wrong")
    recipe = write_recipe(tmp_path / "wrong.yaml", model, method, **TWO_PROCESSES)
    done = run(command(recipe, wrong, script=f"trimtab.train.{method}"), env=environment(), cwd=tmp_path)
    assert done.returncode == 2
    assert "8 rows a step" in done.stderr and "train.gradient_accumulation_steps=2" in done.stderr


@pytest.mark.distributed
def test_a_base_of_4_bits_is_sharded_and_trains_alike(tmp_path: Path) -> None:
    """Adapters are bfloat16 then, TRL's choice, so the steps part by its rounding; the first has the same loss and gradient."""
    needs.package("bitsandbytes", get='pip install "trimtab[qlora]"')
    model = tmp_path / "model"  # wide enough for a block of 64 weights
    save_small(model, hidden_size=64, intermediate_size=128, head_dim=16)
    _, (note, _) = found = launch("fsdp2-qlora", "sft", model, tmp_path, quantization="nf4")
    assert (note["distributed_type"], note["processes"]) == ("FSDP", 2)
    # 0.68 where 4-bit blocks are stored as bytes: FSDP leaves those whole
    assert note["sharded"] / note["weights"] > 0.95
    alone, _ = launch("cpu", "sft", model, tmp_path, quantization="nf4")
    ours, theirs = (read_jsonl(folder / "metrics.jsonl")[0] for folder in (found[0], alone))
    for name in ("loss", "grad_norm", "floor_penalty"):
        assert ours[name] == pytest.approx(theirs[name], rel=0.01), name
    assert any(bool(tensor.any()) for name, tensor in adapter(found[0]).items() if "lora_B" in name)


@pytest.mark.slow
def test_one_process_by_accelerate_is_the_plain_script(model: Path) -> None:
    alone = one_process("sft", model)
    folder, notes = launch("cpu", "sft", model, model.parent)
    assert [(note["distributed_type"], note["processes"], note["zero_stage"]) for note in notes] == [("NO", 1, None)]
    assert largest_difference(adapter(folder), adapter(alone)) == 0.0
    assert rollouts(folder) == rollouts(alone)
