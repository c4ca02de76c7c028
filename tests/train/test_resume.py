"""A run that is killed at any moment, or whose disk is full, ends with the same adapter after the same command again."""

from __future__ import annotations

import json
import random
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from conftest import save_model
from tiny_recipe import FORKS, adapter, arguments_of, largest_difference, small_disk, train_here, write_recipe

from trimtab.axis.errors import UserError
from trimtab.axis.files import load_tensors, read_jsonl
from trimtab.pipeline.run import open_run
from trimtab.recipes.loader import load_recipe
from trimtab.train.job import last_checkpoint, naming_a_full_disk, whole_checkpoints

pytestmark = pytest.mark.slow  # of a whole run, killed and resumed

PATIENCE = 300.0


class Job:
    """A recipe, its folder, and its command."""

    def __init__(self, folder: Path, recipe: Path, method: str = "sft") -> None:
        self.folder = folder
        self.method = method
        self.log = folder.with_name(f"{folder.name}.log")
        self.arguments = arguments_of(recipe, folder)

    def start(self) -> Any:
        """Start the command."""
        process = FORKS.Process(target=train_here, args=(self.arguments, self.log, self.method))
        process.start()
        return process

    def finish(self) -> int:
        """Run the command to its end; its exit code."""
        process = self.start()
        process.join(PATIENCE)
        assert process.exitcode is not None, self.tail()
        return int(process.exitcode)

    def kill_when(self, moment: Callable[[Path], bool], delay: float) -> None:
        """Start the command and kill it ``delay`` seconds after ``moment`` has come, or earlier where it is about to end."""
        process = self.start()
        until = time.monotonic() + PATIENCE
        while process.is_alive() and not moment(self.folder) and time.monotonic() < until:
            time.sleep(0.002)
        until = time.monotonic() + delay
        while time.monotonic() < until and not (self.folder / ".adapter.unfinished").exists():
            time.sleep(0.002)
        process.kill()
        process.join()
        assert process.exitcode == -9, self.tail()

    def tail(self) -> str:
        """The end of what the command has said."""
        return self.log.read_text(encoding="utf-8", errors="replace")[-4000:]

    @property
    def facts(self) -> dict[str, Any]:
        """What the training stage has recorded."""
        found: dict[str, Any] = json.loads((self.folder / "stages" / "train.json").read_text(encoding="utf-8"))["facts"]
        return found


@pytest.fixture(scope="module")
def recipe(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """6 steps, a checkpoint and a round every 2, answers sampled with random numbers, dropout in the learner."""
    folder = tmp_path_factory.mktemp("recipe")
    save_model(folder / "model")
    path = write_recipe(folder / "resume.yaml", folder / "model", max_steps=6)
    text = path.read_text(encoding="utf-8")
    assert "temperature: 0\n" in text and "lora_dropout: 0.0\n" in text
    text = text.replace("temperature: 0\n", "temperature: 1.0\n").replace("lora_dropout: 0.0\n", "lora_dropout: 0.1\n")
    path.write_text(text, encoding="utf-8")
    return path


@pytest.fixture(scope="module")
def unbroken(recipe: Path, tmp_path_factory: pytest.TempPathFactory) -> Job:
    """The run that nothing happens to."""
    job = Job(tmp_path_factory.mktemp("unbroken") / "run", recipe)
    assert job.finish() == 0, job.tail()
    assert job.facts["resumed_from"] is None and job.facts["steps"] == 6
    return job


def assert_same_run(job: Job, unbroken: Job) -> None:
    """Same adapter, same rollouts, and a log of each step once."""
    assert largest_difference(adapter(job.folder), adapter(unbroken.folder)) <= 1e-6
    for path in sorted((unbroken.folder / "rollouts").iterdir()):
        assert read_jsonl(job.folder / "rollouts" / path.name) == read_jsonl(path)
    ours, theirs = read_jsonl(job.folder / "metrics.jsonl"), read_jsonl(unbroken.folder / "metrics.jsonl")
    assert [row["step"] for row in ours] == [row["step"] for row in theirs] == [1, 2, 3, 4, 5, 6]
    assert [row["loss"] for row in ours] == pytest.approx([row["loss"] for row in theirs], rel=1e-6)
    assert job.facts["train_loss"] == pytest.approx(unbroken.facts["train_loss"], abs=1e-4)
    for name in ("axis.safetensors", "floor.safetensors"):
        (found, facts), (wanted, known) = load_tensors(job.folder / name), load_tensors(unbroken.folder / name)
        assert facts == known and found.keys() == wanted.keys()
        assert all(found[key].equal(wanted[key]) for key in found)
    assert not [path.name for path in job.folder.glob(".adapter*")]


@pytest.mark.parametrize("method", ["distill", "grpo", "dpo"])
def test_every_method_resumes(method: str, tmp_path: Path) -> None:
    """Killed after a checkpoint at a random moment, twice, and between the last step and its record: the same adapter as of the
    run that was not. The last step is not the end of an epoch."""
    save_model(tmp_path / "model")
    recipe = write_recipe(tmp_path / "recipe.yaml", tmp_path / "model", method, max_steps=7, save_steps=2)
    whole, broken = Job(tmp_path / "whole", recipe, method), Job(tmp_path / "broken", recipe, method)
    assert whole.finish() == 0, whole.tail()
    for step in (2, 5):
        broken.kill_when(lambda folder, step=step: logged(folder, step), random.random() * 0.2)  # type: ignore[misc]
    assert broken.finish() == 0, broken.tail()
    assert broken.facts["resumed_from"] is not None
    assert largest_difference(adapter(broken.folder), adapter(whole.folder)) <= 1e-6
    ours, theirs = read_jsonl(broken.folder / "metrics.jsonl"), read_jsonl(whole.folder / "metrics.jsonl")
    assert [row["step"] for row in ours] == [row["step"] for row in theirs] == list(range(1, 8))
    assert [row["loss"] for row in ours] == pytest.approx([row["loss"] for row in theirs], rel=1e-5, abs=1e-7)
    files = {path.name for path in (whole.folder / "adapter").iterdir()}
    shutil.rmtree(broken.folder / "adapter")
    (broken.folder / "stages" / "train.json").unlink()
    assert broken.finish() == 0, broken.tail()
    assert broken.facts["steps"] == 7 and broken.facts["resumed_from"] == "checkpoint-7"
    assert broken.facts["train_loss"] == pytest.approx(whole.facts["train_loss"], abs=1e-4)
    assert largest_difference(adapter(broken.folder), adapter(whole.folder)) <= 1e-6
    assert {path.name for path in (broken.folder / "adapter").iterdir()} == files


def logged(folder: Path, step: int) -> bool:
    """Whether the log has come to a step."""
    path = folder / "metrics.jsonl"
    return path.exists() and len(read_jsonl(path)) >= step


MOMENTS: dict[str, tuple[Callable[[Path], bool], float]] = {
    "axis": (lambda folder: (folder / "axis" / "state.safetensors").exists(), 0.2),
    "floor": (lambda folder: (folder / "stages" / "axis.json").exists(), 0.1),
    "writing a checkpoint": (lambda folder: (folder / "checkpoints" / "checkpoint-2").exists(), 0.0),
    # round 1 is sampled when step 3 begins, after the checkpoint of step 2
    "rollout round": (
        lambda folder: logged(folder, 2) and not (folder / "rollouts/round-0001-of-rank-0.jsonl").exists(),
        0.2,
    ),
    "after a checkpoint": (lambda folder: last_checkpoint(folder / "checkpoints") is not None, 0.5),
    "writing the adapter": (lambda folder: (folder / ".adapter.unfinished").exists(), 0.0),
}


def test_killed_in_every_stage(recipe: Path, unbroken: Job, tmp_path: Path) -> None:
    chance = random.Random()
    seed = chance.randrange(1 << 30)
    print(f"seed of the moments: {seed}")
    chance.seed(seed)
    job = Job(tmp_path / "run", recipe)
    for name, (moment, spread) in MOMENTS.items():
        print(f"kill: {name}")
        job.kill_when(moment, chance.random() * spread)
        assert not (job.folder / "stages" / "train.json").exists()
    assert job.finish() == 0, job.tail()
    assert job.facts["resumed_from"] is not None
    assert_same_run(job, unbroken)
    # and once more: nothing is done again
    before = {path: path.stat().st_mtime_ns for path in job.folder.rglob("*") if path.is_file()}
    assert job.finish() == 0, job.tail()
    assert {path: path.stat().st_mtime_ns for path in job.folder.rglob("*") if path.is_file()} == before


def test_a_resume_takes_the_intervals_of_the_recipe_and_refuses_another_training(
    recipe: Path, unbroken: Job, tmp_path: Path
) -> None:
    """Killed after checkpoint 4: another rate is another training; another interval of checkpoints is the same one."""
    job = Job(tmp_path / "run", recipe)
    shutil.copytree(unbroken.folder, job.folder)
    shutil.rmtree(job.folder / "adapter")
    (job.folder / "stages" / "train.json").unlink()
    shutil.rmtree(job.folder / "checkpoints" / "checkpoint-6")
    job.arguments = [*job.arguments, "train.learning_rate=0.02"]
    assert job.finish() == 2
    assert "stage train is begun there: train.learning_rate was 0.01 and is 0.02 now" in job.tail()
    assert not (job.folder / "adapter").exists()
    job.arguments = [*job.arguments[:-1], "train.save_steps=5"]
    assert job.finish() == 0, job.tail()
    assert job.facts["resumed_from"] == "checkpoint-4"
    left = {Path(path).name for path in whole_checkpoints(job.folder / "checkpoints")}
    assert left == {"checkpoint-5", "checkpoint-6"}
    assert_same_run(job, unbroken)


# ---- a full disk ----


def pages(folder: Path) -> int:
    """Bytes that a folder takes on a tmpfs."""
    return sum(-(-path.stat().st_size // 4096) * 4096 for path in folder.rglob("*") if path.is_file())


def test_a_full_disk_is_told_and_damages_nothing(recipe: Path, unbroken: Job, tmp_path: Path) -> None:
    checkpoint = pages(unbroken.folder / "checkpoints" / "checkpoint-4")
    # What lies there when checkpoint-4 is begun: all but this checkpoint, the next, the adapter and the last records.
    before = pages(unbroken.folder) - 2 * checkpoint - pages(unbroken.folder / "adapter") + checkpoint
    with small_disk(tmp_path / "disk", before + checkpoint // 8) as resize:
        job = Job(tmp_path / "disk" / "run", recipe)
        job.log = tmp_path / "log"
        for eighths in (1, 3, 5, 7):
            resize(before + checkpoint * eighths // 8)
            assert job.finish() == 2, job.tail()
            said = job.tail()
            assert "the disk is full" in said and "remedy: free some space and run the same command again" in said
            assert not (job.folder / "adapter").exists() and not (job.folder / "stages" / "train.json").exists()
            found = [path.name for path in (job.folder / "checkpoints").glob("checkpoint-*")]
            assert (
                found == [Path(path).name for path in whole_checkpoints(job.folder / "checkpoints")] == ["checkpoint-2"]
            )
            job.log.unlink()
        resize(16 << 20)
        assert job.finish() == 0, job.tail()
        assert job.facts["resumed_from"] == "checkpoint-2"
        assert_same_run(job, unbroken)


def test_other_errors_are_not_taken_for_a_full_disk(tmp_path: Path) -> None:
    torn = tmp_path / "checkpoint-4"
    torn.mkdir()
    for error in (RuntimeError("out of memory"), OSError(13, "Permission denied"), UserError("x", remedy="y")):
        with pytest.raises(type(error)) as caught, naming_a_full_disk(tmp_path, tmp_path / "unfinished"):
            raise error
        assert caught.value is error and torn.exists()
    for error in (
        OSError(28, "No space left on device"),
        RuntimeError("I/O error: No space left on device (os error 28)"),
    ):
        torn.mkdir(exist_ok=True)
        with pytest.raises(UserError, match="disk is full"), naming_a_full_disk(tmp_path, tmp_path / "unfinished"):
            raise error
        assert not torn.exists()


# ---- what a kill leaves behind ----


def test_a_checkpoint_that_was_cut_short_is_passed_over(tmp_path: Path) -> None:
    assert last_checkpoint(tmp_path) is None
    for step, text in ((2, "{}"), (10, '{"global_step": 10}'), (12, '{"global_st'), (14, "")):
        (tmp_path / f"checkpoint-{step}").mkdir()
        (tmp_path / f"checkpoint-{step}" / "trainer_state.json").write_text(text, encoding="utf-8")
    (tmp_path / "checkpoint-16").mkdir()
    assert last_checkpoint(tmp_path) == str(tmp_path / "checkpoint-10")
    assert whole_checkpoints(tmp_path) == [str(tmp_path / "checkpoint-2"), str(tmp_path / "checkpoint-10")]


def test_a_run_folder_that_a_kill_left_half_made_is_taken_up(recipe: Path, tmp_path: Path) -> None:
    loaded = load_recipe(recipe)
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / ".run.json.k1ll3d.json").write_text(
        '{"reci', encoding="utf-8"
    )  # killed while the marker was written
    run = open_run(loaded, output_dir=str(tmp_path / "a"))
    (run.folder / "recipe.yaml").unlink()  # killed right after it
    assert open_run(loaded, output_dir=str(tmp_path / "a")).folder == run.folder
    assert (run.folder / "recipe.yaml").read_text(encoding="utf-8") == loaded.text


def test_a_folder_of_another_recipe_or_of_somebody_else_is_refused(recipe: Path, tmp_path: Path) -> None:
    run = open_run(load_recipe(recipe), output_dir=str(tmp_path / "a"))
    run.record("train", run.inputs("train"), {}, seconds=0.0)
    before = (run.folder / "run.json").read_bytes()
    for change in ("train.learning_rate=0.5", "eval.control=true"):
        with pytest.raises(UserError, match="another recipe"):
            open_run(load_recipe(recipe, [change]), output_dir=str(tmp_path / "a"))
    assert (run.folder / "run.json").read_bytes() == before
    # what is measured is no part of it: a trained run may be measured again
    assert open_run(load_recipe(recipe, ["eval.roles=7"]), output_dir=str(tmp_path / "a")).recipe.eval.roles == 7
    (tmp_path / "b").mkdir()
    (tmp_path / "b" / "thesis.txt").write_text("mine", encoding="utf-8")
    with pytest.raises(UserError, match="not a run folder"):
        open_run(load_recipe(recipe), output_dir=str(tmp_path / "b"))
    assert [path.name for path in (tmp_path / "b").iterdir()] == ["thesis.txt"]
