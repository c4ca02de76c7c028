"""One process = two processes, on every engine that a CPU can run, through the real launcher and the real entry script."""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from conftest import build_model, build_tokenizer
from tiny_recipe import SCRIPT, adapter, command, environment, largest_difference, run, write_recipe

from trimtab.axis.files import read_jsonl
from trimtab.cli.launch import resolve_accelerate_config

PROBE = Path(__file__).resolve().parent / "engine_probe.py"
TWO = {"per_device_train_batch_size": 4, "gradient_accumulation_steps": 1}  # 2 x 4 x 1 rows a step, as 1 x 4 x 2

Launch = Callable[..., tuple[Path, list[dict[str, Any]]]]


@pytest.fixture(scope="module")
def launch(tmp_path_factory: pytest.TempPathFactory) -> Launch:
    """Train under one of the shipped accelerate files; the run folder, and what each rank ran on."""
    folder = tmp_path_factory.mktemp("engines")
    model = folder / "model"
    build_model("llama", max_position_embeddings=2048).save_pretrained(model)
    build_tokenizer().save_pretrained(model)

    def start(engine: str, **train: Any) -> tuple[Path, list[dict[str, Any]]]:
        notes = folder / f"{engine}-notes"
        notes.mkdir()
        recipe = write_recipe(folder / f"{engine}.yaml", model, **train)
        config = resolve_accelerate_config(engine, into=folder)
        launcher = [sys.executable, "-m", "accelerate.commands.launch", "--config_file", str(config)]
        arguments = command(recipe, folder / engine, script=PROBE, launcher=launcher)
        done = run(arguments, env=environment(TRIMTAB_PROBE=str(notes)), cwd=folder)
        assert done.returncode == 0, done.stderr[-6000:]
        return folder / engine, [json.loads(path.read_text(encoding="utf-8")) for path in sorted(notes.iterdir())]

    return start


@pytest.fixture(scope="module")
def one_process(launch: Launch) -> Path:
    """The run folder of one process."""
    folder, notes = launch("cpu")
    assert [(note["distributed_type"], note["processes"], note["zero_stage"]) for note in notes] == [("NO", 1, None)]
    return folder


def rollouts(folder: Path) -> list[dict[str, Any]]:
    """All rows of all rounds and ranks, in order, without what names the rank's share."""
    rows = [row for path in (folder / "rollouts").glob("*.jsonl") for row in read_jsonl(path)]
    return [{k: v for k, v in row.items() if k != "identity"} for row in sorted(rows, key=lambda row: row["row"])]


@pytest.mark.distributed
@pytest.mark.parametrize(
    ("engine", "kind", "wrapper", "stage"),
    [
        ("ddp-cpu", "MULTI_CPU", "DistributedDataParallel", None),
        ("zero2-cpu", "DEEPSPEED", "DeepSpeedEngine", 2),
        ("zero3-cpu", "DEEPSPEED", "DeepSpeedEngine", 3),
    ],
)
def test_two_processes_train_the_adapter_of_one(
    launch: Launch, one_process: Path, engine: str, kind: str, wrapper: str, stage: int | None
) -> None:
    if stage is not None:
        pytest.importorskip("deepspeed")
        if shutil.which("c++") is None:
            pytest.skip("DeepSpeed compiles its shared-memory operator with c++")
    folder, notes = launch(engine, **TWO)
    assert len(notes) == 2
    for note in notes:
        assert note["processes"] == 2
        assert (note["distributed_type"], note["wrapper"], note["zero_stage"]) == (kind, wrapper, stage)
        assert note["sharded"] == (note["weights"] if stage == 3 else 0)
    record = json.loads((folder / "stages" / "train.json").read_text(encoding="utf-8"))["facts"]
    assert (record["processes"], record["steps"]) == (2, 4)
    # the same text, sampled by two ranks with the weights of the moment, capped and not ...
    assert rollouts(folder) == rollouts(one_process)
    # ... the same figures ...
    ours, theirs = read_jsonl(folder / "metrics.jsonl"), read_jsonl(one_process / "metrics.jsonl")
    for name in (
        "loss",
        "grad_norm",
        "floor_penalty",
        "floor_violation_rate",
        "floor_z/layer_1",
        "benign_kl",
        "benign_axis",
    ):
        assert [row[name] for row in ours] == pytest.approx([row[name] for row in theirs], rel=1e-3, abs=1e-5), name
    # ... and the same adapter
    assert largest_difference(adapter(folder), adapter(one_process)) < 1e-4


def test_one_process_by_accelerate_is_the_plain_script(one_process: Path, tmp_path: Path) -> None:
    shutil.copytree(one_process, tmp_path / "copy")
    recipe = one_process.parent / "cpu.yaml"
    arguments = command(recipe, tmp_path / "copy", script=SCRIPT)
    shutil.rmtree(tmp_path / "copy" / "adapter")
    shutil.rmtree(tmp_path / "copy" / "checkpoints")
    shutil.rmtree(tmp_path / "copy" / "rollouts")
    (tmp_path / "copy" / "stages" / "train.json").unlink()
    done = run(arguments, env=environment())
    assert done.returncode == 0, done.stderr[-6000:]
    assert largest_difference(adapter(tmp_path / "copy"), adapter(one_process)) == 0.0
    assert rollouts(tmp_path / "copy") == rollouts(one_process)
