"""One rank of two breaks: the job ends by itself, soon, says why, and goes on from the last checkpoint."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import time
from collections.abc import Mapping
from pathlib import Path
from typing import TextIO

import needs
import pytest
from tiny_recipe import (
    PROBE,
    TWO_PROCESSES,
    both_cores,
    command,
    environment,
    launcher,
    save_small,
    small_disk,
    write_recipe,
)

from trimtab.cli.launch import resolve_accelerate_config
from trimtab.train.job import last_checkpoint

SOON = 60.0  # seconds from the break to the end of the launcher


class Broken:
    """A job of two processes, of which one breaks."""

    def __init__(self, folder: Path, engine: str, how: str, disk: Path | None = None) -> None:
        model = folder / "model"
        save_small(model)
        self.folder, self.notes = (disk or folder) / "run", folder / "notes"
        self.notes.mkdir()
        recipe = write_recipe(folder / "recipe.yaml", model, "sft", **TWO_PROCESSES)
        config = resolve_accelerate_config(engine, into=folder)
        start = [*launcher(config), "--num_processes", "2"]
        self.command = command(recipe, self.folder, script=PROBE, launcher=start)
        self.variables = {"TRIMTAB_PROBE": str(self.notes), "TRIMTAB_ENGINE": engine, "TRIMTAB_METHOD": "sft"}
        self.log = folder / "log"
        code, self.seconds = self.start(TRIMTAB_BREAK=how)
        assert code != 0

    def start(self, **variables: str) -> tuple[int, float]:
        """Run the command; its exit code, and the seconds from the break to its end."""
        with both_cores(), self.log.open("w") as file:
            return self._started(file, variables)

    def _started(self, file: TextIO, variables: Mapping[str, str]) -> tuple[int, float]:
        process = subprocess.Popen(
            self.command, env=environment(**self.variables, **variables), cwd=self.log.parent, stdout=file,
            stderr=file, start_new_session=True,
        )  # fmt: skip
        broken, until = None, time.monotonic() + 300
        while process.poll() is None and time.monotonic() < until:
            # a job that goes on finds the note of the one that broke
            if "TRIMTAB_BREAK" in variables and broken is None and (self.notes / "broken").exists():
                broken = time.monotonic()
                until = broken + SOON
            time.sleep(0.05)
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
            pytest.fail(f"the launcher still ran after {SOON} s: {self.log.read_text()[-3000:]}")
        return process.returncode, time.monotonic() - (broken or time.monotonic())


@pytest.mark.distributed
@pytest.mark.parametrize("engine", ["ddp-cpu", "zero3-cpu"])
def test_a_killed_rank_ends_the_job_and_it_goes_on(tmp_path: Path, engine: str) -> None:
    if engine.startswith("zero"):
        needs.deepspeed()
    job = Broken(tmp_path, engine, "kill:1:3")
    said = job.log.read_text(encoding="utf-8")
    print(f"{engine}: {job.seconds:.1f} s from the kill to the end of the launcher")
    assert "rank      : 1" in said and "SIGKILL" in said
    assert Path(str(last_checkpoint(job.folder / "checkpoints"))).name == "checkpoint-2"
    assert not (job.folder / "adapter").exists()
    if engine == "ddp-cpu":  # under ZeRO-3 the job whose disk was full goes on, below
        assert job.start()[0] == 0, job.log.read_text(encoding="utf-8")[-3000:]
        assert json.loads((job.notes / "rank-0.json").read_text(encoding="utf-8"))["from_step"] == 2


@pytest.mark.distributed
def test_nan_on_one_rank_stops_all_with_the_batch_saved(tmp_path: Path) -> None:
    job = Broken(tmp_path, "ddp-cpu", "nan:1:3")
    said = job.log.read_text(encoding="utf-8")
    print(f"{job.seconds:.1f} s from the NaN to the end of the launcher")
    assert "the loss is nan at step 3 on rank 1" in said and "lower train.learning_rate" in said
    (kept,) = (job.folder / "checkpoints").glob("not-finite-*.json")
    assert kept.name == "not-finite-step-3-rank-1.json"
    found = json.loads(kept.read_text(encoding="utf-8"))
    assert len(found["rows"]) == TWO_PROCESSES["per_device_train_batch_size"]
    assert Path(str(last_checkpoint(job.folder / "checkpoints"))).name == "checkpoint-2"
    assert job.start()[0] == 0, job.log.read_text(encoding="utf-8")[-3000:]


@pytest.mark.distributed
def test_a_full_disk_stops_all_and_damages_nothing(tmp_path: Path) -> None:
    """Every rank writes its part of ZeRO-3's checkpoint, and here finds no room for it."""
    needs.deepspeed()
    with small_disk(tmp_path / "disk", 64 << 20):
        job = Broken(tmp_path, "zero3-cpu", "full:0:3", disk=tmp_path / "disk")
        said = job.log.read_text(encoding="utf-8")
        print(f"{job.seconds:.1f} s from the filling to the end of the launcher")
        assert "the disk is full" in said and "remedy: free some space and run the same command again" in said
        assert [path.name for path in (job.folder / "checkpoints").glob("checkpoint-*")] == ["checkpoint-2"]
        assert not (job.folder / "adapter").exists()
        (tmp_path / "disk" / "filler").unlink()
        assert job.start()[0] == 0, job.log.read_text(encoding="utf-8")[-3000:]
        assert json.loads((job.notes / "rank-0.json").read_text(encoding="utf-8"))["from_step"] == 2
        assert (job.folder / "adapter" / "adapter_model.safetensors").exists()
