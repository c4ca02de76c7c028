"""The whole job by the real command, on a tiny chat model with random weights.

Such a model has no Assistant, so no number means anything here: what is asserted is that the job ends, that its files are
whole and say the same after a kill, and that nothing is called good which is not.
"""

from __future__ import annotations

import csv
import json
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import yaml
from conftest import save_model
from quick_python import quick_python
from safetensors.torch import load_file
from tiny_recipe import environment, run, write_recipe
from transformers import AutoModelForCausalLM

from trimtab.axis.errors import UserError
from trimtab.cli.main import main
from trimtab.eval.schema import ARMS, Report
from trimtab.eval.stages import eval_stage
from trimtab.pipeline.run import open_run
from trimtab.recipes.loader import load_recipe

pytestmark = pytest.mark.slow  # of a whole run

EVAL = {
    "roles": 3,
    "questions": 2,
    "conversations": 2,
    "turns": 2,
    "benign": 4,
    "benign_systems": 3,
    "lookalikes": 2,
    "professional": 4,
    # too short for any 4-gram of words: that side effect can't be measured here, and must not stop the report
    "sampling": {"max_new_tokens": 8, "batch_size": 8},
    "reextract_roles": 2,
    "reextract_questions": 1,
    "capability": ["instructions"],
    "capability_limit": 2,
    "control": True,
    "bootstrap": 200,
    "transcripts": 4,
}


@dataclass(frozen=True)
class Job:
    """A finished run: its recipe, its folder, and what it printed."""

    recipe: Path
    folder: Path
    printed: str

    @property
    def report(self) -> dict[str, Any]:
        found: dict[str, Any] = json.loads((self.folder / "report.json").read_text(encoding="utf-8"))
        return found


def trimtab(*arguments: str | Path, python: str | None = None) -> subprocess.CompletedProcess[str]:
    """Run the command, by :func:`quick_python` if no other is named."""
    return run([python or quick_python(), "-m", "trimtab.cli.main", *map(str, arguments)], env=environment())


@pytest.fixture(scope="module")
def job(tmp_path_factory: pytest.TempPathFactory) -> Job:
    """The recipe with a control, run once from nothing."""
    folder = tmp_path_factory.mktemp("job")
    save_model(folder / "model")
    path = write_recipe(folder / "tiny.yaml", folder / "model")
    content = yaml.safe_load(path.read_text(encoding="utf-8"))
    path.write_text(yaml.safe_dump({**content, "eval": EVAL}, sort_keys=False), encoding="utf-8")
    result = trimtab("run", path, "--output-dir", folder / "run", "--quiet", python=sys.executable)
    assert result.returncode == 0, result.stderr[-4000:]
    return Job(path, folder / "run", result.stdout)


def stamps(folder: Path) -> dict[str, int]:
    """When each file was written; the page and the card are written again from the report at every call."""
    again = {"report.html", "README.md"}
    return {str(p): p.stat().st_mtime_ns for p in sorted(folder.rglob("*")) if p.is_file() and p.name not in again}


def numbers(report: dict[str, Any]) -> dict[str, Any]:
    """The report without the time of day and the seconds that stages took."""
    rest = {key: value for key, value in report.items() if key != "created"}
    return {**rest, "repeat": {key: value for key, value in report["repeat"].items() if key != "stage_seconds"}}


def unevaluated(job: Job, folder: Path) -> Path:
    """A copy of the run as it was after training."""
    shutil.copytree(job.folder, folder)
    shutil.rmtree(folder / "eval")
    for name in ("report.json", "report.html", "stages/eval.json"):
        (folder / name).unlink()
    return folder


def estimates(part: Any) -> Iterator[tuple[float, ...]]:
    """Every estimate within a part of a report."""
    if isinstance(part, dict):
        if part.keys() >= {"value", "low", "high", "n"}:
            yield tuple(float(part[key]) for key in ("value", "low", "high", "n"))
        for inner in part.values():
            yield from estimates(inner)
    elif isinstance(part, list):
        for inner in part:
            yield from estimates(inner)


def test_the_report_in_other_forms(job: Job, tmp_path: Path) -> None:
    places = [tmp_path / name for name in ("card.md", "figures.csv", "logs")]
    options = [
        word
        for option, place in zip(("--card", "--csv", "--inspect"), places, strict=True)
        for word in (option, str(place))
    ]
    assert main(["report", str(job.recipe), "--output-dir", str(job.folder), *options, "--quiet"]) == 0
    card, figures, logs = places
    assert card.read_text(encoding="utf-8") == (job.folder / "adapter" / "README.md").read_text(encoding="utf-8")
    assert "reader_score,retention" in figures.read_text(encoding="utf-8")
    rows = csv.DictReader(figures.read_text(encoding="utf-8").splitlines())
    in_table = {tuple(float(row[key]) for key in ("value", "low", "high", "n")) for row in rows if row["n"]}
    missing = [estimate for estimate in estimates(job.report) if estimate not in in_table]
    assert in_table and not missing
    assert (logs / "base-cap.json").exists()


def test_the_report_is_whole(job: Job) -> None:
    report = Report.model_validate(job.report)
    assert f"verdict ({report.verdict.status}): {report.verdict.headline}" in job.printed
    page = (job.folder / "report.html").read_text(encoding="utf-8")
    assert page.rstrip().endswith("</html>") and report.verdict.headline.split(" keeps ")[0] in page
    metrics = {metric.id: metric for metric in report.metrics}
    assert [metric.id for metric in report.metrics if metric.primary] == ["reader_score"]
    on_axes = {"z_training", "z_held_out", "z_reextracted_tuned", "z_reextracted_base"}
    assert on_axes | {"kl_capped_self", "z_same_text", "z_conversations"} <= metrics.keys()
    assert metrics["z_same_text"].cap_effect.value > 0  # on the same words the hook can only lift
    given = {"kl_capped_self", "z_same_text"}  # texts that are read, which the capped, tuned model does not
    for metric in metrics.values():
        assert set(metric.arms) == {*ARMS, "control"} - ({"tuned+cap"} if metric.id in given else set())
        assert all(e.low <= e.value <= e.high for e in metric.arms.values())
        assert metric.control_retention is not None and (metric.retention.estimate is not None or metric.retention.why)
    assert metrics["reader_score"].arms["base"].n == 6 and metrics["z_conversations"].arms["base"].n == 4
    capped_self = metrics["kl_capped_self"].arms["base+cap"]
    assert (capped_self.value, capped_self.low, capped_self.high) == (0.0, 0.0, 0.0)
    assert metrics["z_training"].cap_effect.value > 0  # the cap lifts what it caps, whatever the model
    effects = {effect.id: effect for effect in report.side_effects}
    assert report.rerouting is not None and set(report.rerouting.cosines) == {"base", "base+cap", "tuned"}
    assert len(report.axis["cosine_reextracted_base+cap"]) == len(report.axis["cosine_reextracted_base"])
    assert {"benign_kl", "default_z_shift", "default_z_shift_same_text", "benign_kl_control"} <= effects.keys()
    for name in ("benign_kl", "benign_kl_own"):
        assert effects[name].estimate.value > 0 and effects[name].ok is not None
        assert effects[f"{name}_worst"].estimate.value >= effects[name].estimate.value
    assert [(row.task, row.difference.n) for row in report.capability] == [("instructions", 2)]
    assert len(report.transcripts) == 4
    assert {row["step"] for row in report.training["log"]} == {1, 2, 3, 4}
    for transcript in report.transcripts:
        for turn in transcript.turns:
            for answer in turn.answers.values():
                assert "".join(piece for piece, _ in answer.pieces) == answer.text


def test_the_adapter_loads_with_peft_alone(job: Job) -> None:
    code = """
import sys, torch
from peft import PeftModel
from transformers import AutoModelForCausalLM
base = AutoModelForCausalLM.from_pretrained(sys.argv[1])
ids = torch.tensor([[5, 80, 120, 33]])
with torch.no_grad():
    before = base(input_ids=ids).logits
    model = PeftModel.from_pretrained(base, sys.argv[2]).eval()
    adapted = model(input_ids=ids).logits
    merged = model.merge_and_unload()(input_ids=ids).logits
assert (before - adapted).abs().max() > 1e-3 and torch.allclose(adapted, merged, atol=1e-3)
assert not [name for name in sys.modules if name.startswith("trimtab")]
"""
    model = job.recipe.parent / "model"
    result = run([sys.executable, "-c", code, str(model), str(job.folder / "adapter")], env=environment())
    assert result.returncode == 0, result.stderr[-4000:]
    assert (job.folder / "control" / "adapter" / "adapter_model.safetensors").exists()


def test_a_second_call_does_nothing(job: Job) -> None:
    before = stamps(job.folder)
    result = trimtab("run", job.recipe, "--output-dir", job.folder, "--quiet")
    assert result.returncode == 0, result.stderr[-4000:]
    assert stamps(job.folder) == before
    assert result.stdout.splitlines()[-2:] == job.printed.splitlines()[-2:]


def test_a_changed_recipe_is_refused(job: Job) -> None:
    before = stamps(job.folder)
    result = trimtab("run", job.recipe, "--output-dir", job.folder, "--quiet", "train.learning_rate=0.02")
    assert result.returncode == 2
    assert "another recipe" in result.stderr and "remedy" in result.stderr and "Traceback" not in result.stderr
    assert stamps(job.folder) == before


def test_a_killed_evaluation_goes_on_to_the_same_numbers(job: Job, tmp_path: Path) -> None:
    folder = unevaluated(job, tmp_path / "killed")
    arguments = ["eval", str(job.recipe), "--output-dir", str(folder), "--quiet"]
    process = subprocess.Popen(
        [sys.executable, "-m", "trimtab.cli.main", *arguments],
        env=environment(), stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    until = time.monotonic() + 300
    mark = folder / "eval" / "default-base.safetensors"
    while process.poll() is None and not mark.exists() and time.monotonic() < until:
        time.sleep(0.002)
    process.kill()
    _, errors = process.communicate()
    assert mark.exists() and process.returncode == -signal.SIGKILL, errors[-4000:]
    assert not (folder / "report.json").exists() and not (folder / "stages" / "eval.json").exists()
    kept = mark.stat().st_mtime_ns
    assert main(arguments) == 0
    assert mark.stat().st_mtime_ns == kept
    found = json.loads((folder / "report.json").read_text(encoding="utf-8"))
    assert numbers(found) == numbers(job.report)


def test_answers_of_another_adapter_are_refused(job: Job, tmp_path: Path) -> None:
    """They would be mixed with those of the new one."""
    folder = tmp_path / "other"
    shutil.copytree(job.folder, folder)
    (folder / "stages" / "eval.json").unlink()
    shutil.copy(folder / "control/adapter/adapter_model.safetensors", folder / "adapter/adapter_model.safetensors")
    with pytest.raises(UserError, match="other weights"):
        eval_stage(open_run(load_recipe(str(job.recipe)), output_dir=str(folder)))


@pytest.mark.usefixtures("quick_children")
def test_training_that_changes_nothing_is_never_good(job: Job, tmp_path: Path) -> None:
    """Learning rate 0: base against base."""
    changes = ["train.learning_rate=0", "train.max_steps=1", "eval.control=false"]
    assert main(["run", str(job.recipe), "--output-dir", str(tmp_path / "run"), "--quiet", *changes]) == 0
    adapter = load_file(tmp_path / "run" / "adapter" / "adapter_model.safetensors")
    assert all(float(value.abs().max()) == 0.0 for name, value in adapter.items() if "lora_B" in name)
    report = Report.model_validate_json((tmp_path / "run" / "report.json").read_text(encoding="utf-8"))
    assert report.verdict.status in ("bad", "unclear")
    for metric in report.metrics:
        if metric.id == "z_reextracted_tuned":
            continue
        assert metric.tuned_effect.value == pytest.approx(0.0, abs=1e-6), metric.id
        if metric.id in (
            "text_llr",
            "reader_score",
        ):  # equal texts share one score, or float noise would pass for an effect
            assert (metric.tuned_effect.low, metric.tuned_effect.high) == (0.0, 0.0)
        # elsewhere the same texts may be scored in batches of other widths, so the last digits may differ
        tuned, base = metric.arms["tuned"], metric.arms["base"]
        assert [tuned.value, tuned.low, tuned.high] == pytest.approx([base.value, base.low, base.high], abs=1e-5), (
            metric.id
        )
        kept = metric.retention.estimate
        assert kept is None or [kept.value, kept.low, kept.high] == pytest.approx([0.0] * 3, abs=1e-3), metric.id
    effects = {effect.id: effect.estimate.value for effect in report.side_effects}
    changes_at_all = (
        "benign_kl", "benign_kl_own", "benign_kl_own_worst", "default_z_shift", "default_z_shift_same_text",
        "benign_nll_change", "length_change", "benign_length_change", "hollow_change",
    )  # fmt: skip
    assert [effects[name] for name in changes_at_all] == pytest.approx([0.0] * 9, abs=1e-5)
    assert effects["professional_missed_change"] == 0


@pytest.mark.usefixtures("quick_children")
@pytest.mark.parametrize("method", ["distill", "grpo", "dpo"])
def test_every_method_ends_in_a_report(method: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """With its control, by ``trimtab run``, which picks the entry script; then the merged weights give the figures again."""
    save_model(tmp_path / "model")
    path = write_recipe(tmp_path / "tiny.yaml", tmp_path / "model", method, max_steps=2)
    content = yaml.safe_load(path.read_text(encoding="utf-8"))
    path.write_text(yaml.safe_dump({**content, "eval": {**EVAL, "reextract_roles": 0}}), encoding="utf-8")
    folder = tmp_path / "run"
    assert main(["run", str(path), "--output-dir", str(folder), "--quiet"]) == 0
    report = Report.model_validate_json((folder / "report.json").read_text(encoding="utf-8"))
    assert report.training["steps"] == 2 and report.training["peak_gib"] > 0
    for place in (folder, folder / "control"):
        tensors = load_file(place / "adapter" / "adapter_model.safetensors")
        assert any(float(value.abs().max()) > 0 for name, value in tensors.items() if "lora_B" in name)
        assert (place / "adapter" / "floor.safetensors").exists()
    logged = {key for row in report.training["log"] for key in row}
    wanted = {"distill": "distill_jsd", "grpo": "off_policy/sample_size", "dpo": "rewards/margins"}[method]
    assert {wanted, "floor_penalty", "floor_violation_rate", "floor_z/layer_1"} <= logged
    if method == "dpo":
        row = json.loads((folder / "pairs.jsonl").read_text(encoding="utf-8").splitlines()[0])
        assert {"prompt", "chosen", "rejected"} <= row.keys() and (folder / "control" / "pairs.jsonl").exists()
    capsys.readouterr()
    assert main(["merge", str(path), "--output-dir", str(folder), "--quiet"]) == 0
    assert "merged:" in capsys.readouterr().out
    rows = json.loads((folder / "merged.json").read_text(encoding="utf-8"))
    assert {row["figure"] for row in rows} == {"reader_score", "z_training", "benign_kl", "default_z_shift"}
    for row in rows:
        assert row["agrees"] and row["merged"] == pytest.approx(row["report"][0], abs=1e-4), row
        assert row["difference"] is None or max(map(abs, row["difference"])) < 1e-4, row
    config = json.loads((folder / "merged" / "config.json").read_text(encoding="utf-8"))
    assert (
        config["rope_theta"] == config["rope_parameters"]["rope_theta"]
    )  # transformers 4 would take 10000 without a word
    named = json.loads((folder / "merged" / "tokenizer_config.json").read_text(encoding="utf-8"))
    assert named["tokenizer_class"] == "PreTrainedTokenizerFast"
    again = AutoModelForCausalLM.from_pretrained(folder / "merged")  # plain weights, nothing of PEFT or ours
    assert not any("lora" in name for name, _ in again.named_parameters())


def test_a_script_refuses_a_recipe_of_another_method(job: Job, capsys: pytest.CaptureFixture[str]) -> None:
    from trimtab.train.distill import main as distill

    assert distill(["--config", str(job.recipe), "--output_dir", str(job.folder)]) == 2
    said = capsys.readouterr().err
    assert "trains distill, and the recipe says sft" in said and "trimtab.train.sft" in said


def test_what_can_t_be_merged_is_told(job: Job, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "notes.txt").write_text("mine")
    command = ["merge", str(job.recipe), "--output-dir", str(job.folder), "--to", str(tmp_path / "full")]
    assert main(command) == 2 and "not empty" in capsys.readouterr().err
    assert (tmp_path / "full" / "notes.txt").read_text() == "mine"
    fresh = ["merge", str(job.recipe), "--output-dir", str(tmp_path / "fresh")]
    assert main(fresh) == 2 and "there is no run of this recipe here" in capsys.readouterr().err
    assert not (tmp_path / "fresh").exists()
