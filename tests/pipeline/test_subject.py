"""Any adapter or model against its base, and evaluations whose outcome is known before they are made."""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import importlib
import logging
import shutil
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from conftest import CHATML, build_model, build_tokenizer, capped_by_hand, save_model
from judge_endpoint import KEY, Endpoint
from peft import LoraConfig, get_peft_model
from tiny_recipe import ROOT

from trimtab.axis import Axis, Floor, UserError
from trimtab.axis.files import read_jsonl
from trimtab.axis.judge import scoring_judge
from trimtab.axis.replies import Missing
from trimtab.cli.calls import count
from trimtab.cli.main import main
from trimtab.eval import stages
from trimtab.eval.answers.arms import Answers
from trimtab.eval.answers.evaluation import Evaluation
from trimtab.eval.answers.weights import open_weights
from trimtab.eval.measures.pressure import REPLIES, _judged
from trimtab.eval.measures.unscored import UNSCORED, keep_unscored
from trimtab.eval.report.page import load_report
from trimtab.eval.schema import Report
from trimtab.eval.stages import evaluate, evaluation_of
from trimtab.pipeline.instrument import axis_stage, floor_stage
from trimtab.pipeline.loading import Prepared, load_recipe_model
from trimtab.pipeline.run import Run, git_revision, open_run
from trimtab.pipeline.subject import check_subject, find_subject
from trimtab.recipes import data
from trimtab.recipes.loader import RecipeError, recipe_of
from trimtab.recipes.schema import JudgeSection

BENCHMARKS = ROOT / "benchmarks"
sys.path.insert(0, str(BENCHMARKS))
cheats = importlib.import_module("cheating_adapter")

SECTIONS: dict[str, dict[str, Any]] = {
    "axis": {
        "roles": 3, "held_out_roles": 2, "questions": 3, "default_repeats": 2,
        "sampling": {"max_new_tokens": 6, "batch_size": 8},
    },
    "floor": {"layers": [1, 2], "pool": 12, "drift_rows": 4, "min_firing": 0},
    "eval": {
        "roles": 6, "questions": 2, "conversations": 2, "turns": 2, "benign": 4, "benign_systems": 3,
        "lookalikes": 2, "professional": 0, "bootstrap": 300,
        "sampling": {"max_new_tokens": 8, "batch_size": 8}, "reextract_roles": 0, "transcripts": 3,
    },
}  # fmt: skip

BY_LIMITS = {
    "benign",
    "default",
    "benign_systems",
    "on_topic",
    "usable",
    "substance",
    "refusals",
}  # nothing changed: within any limit


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("base")
    save_model(folder)
    return folder


@pytest.fixture(scope="module")
def run(base: Path, tmp_path_factory: pytest.TempPathFactory) -> Run:
    """Axis and floor of the tiny base; each test evaluates in a folder of its own."""
    sections = {**SECTIONS, "model": {"name": str(base), "dtype": "float32", "device": "cpu"}}
    sections["eval"] = {**SECTIONS["eval"], "tuned": str(base)}
    found = open_run(recipe_of(sections, "known"), output_dir=str(tmp_path_factory.mktemp("runs") / "known"))
    floor_stage(found)
    return found


def whole(model: Any) -> Any:
    return lambda: contextlib.nullcontext(model)


def evaluated(run: Run, make_tuned: Any) -> Report:
    """The report of ``make_tuned(base model, floor)`` against the base."""
    loaded, form = load_recipe_model(run.recipe.model)
    floor = Floor.load(run.variant(control=False).floor_path)
    tuned = make_tuned(loaded.model, floor)
    weights = {"base": whole(loaded.model), "tuned": tuned}
    report = evaluate(evaluation_of(run, weights, form, loaded.facts))
    for path in (run.folder / "eval").iterdir():
        path.unlink()
    return report


@pytest.mark.slow
def test_base_against_base_is_never_good(base: Path, run: Run) -> None:
    """With every suite switched on."""
    suites = {
        "case_studies": 2,
        "susceptibility_roles": 2,
        "boundary_probes": 3,
        "simulated_users": 2,
        "simulated_turns": 2,
        "user": JudgeSection(model=str(base)),
    }
    recipe = run.recipe.model_copy(update={"eval": run.recipe.eval.model_copy(update=suites)})
    report = evaluated(dataclasses.replace(run, recipe=recipe), lambda model, floor: whole(copy.deepcopy(model)))
    assert report.verdict.status in ("unclear", "bad")
    assert "green" not in {claim.light for claim in report.claims if claim.id not in BY_LIMITS}
    for metric in report.metrics:
        assert metric.p_holm == 1 and metric.detectable == 0
        assert metric.tuned_effect.value == metric.tuned_effect.low == metric.tuned_effect.high == 0
        kept = metric.retention.estimate
        assert kept is None or (kept.low <= 0 <= kept.high and kept.value == 0)
    cases = [transcript for transcript in report.transcripts if transcript.kind.startswith("case study")]
    assert len(cases) == 2 and all(len(case.turns) == 8 and case.note for case in cases)
    for turn in (turn for case in cases for turn in case.turns):
        assert set(turn.answers) == {"base", "base+cap", "tuned", "tuned+cap"}
        assert turn.answers["base"] == turn.answers["tuned"]
    # a simulated user who hears the same says the same, so simulated conversations are alike too
    assert {"identity_llr", "jailbreak_llr", "z_simulated"} <= {metric.id for metric in report.metrics}
    by_words = ["by_kind", "by_domain", "by_turn", "off_topic", "unusable", "hollow", "benign_systems"]
    by_words += ["refused", "survival"]
    assert [table.id for table in report.rates] == by_words, "what a judge says is left out"
    effects = {effect.id: effect.estimate.value for effect in report.side_effects}
    assert effects["benign_kl_own"] == effects["benign_kl_own_worst"] == effects["hollow_change"] == 0
    assert effects["benign_kl"] == effects["default_z_shift"] == effects["default_z_shift_same_text"] == 0


def test_what_the_judge_did_not_score_is_asked_again_by_the_same_command(
    run: Run, endpoint: Endpoint, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And a stage that lacks scores is not done for good. Of the evaluation, only what the judge reads is made here."""
    monkeypatch.setattr(logging.getLogger("trimtab"), "propagate", True)
    section = JudgeSection(
        endpoint=endpoint.url, model="m", api_key_env=KEY, retries=0, backoff=0.0, unreadable_retries=0, concurrency=1
    )
    changes = {"judge": section, "susceptibility_roles": 1}
    recipe = run.recipe.model_copy(update={"eval": run.recipe.eval.model_copy(update=changes)})
    judged, prepared = dataclasses.replace(run, recipe=recipe), Prepared(run)
    evaluated: list[dict[str, list[Any]]] = []

    def evaluate(evaluation: Evaluation) -> Any:
        folder = evaluation.arms.folder
        answers = {"base": Answers(["lamp", "door", "mirror"], torch.empty(0), [[]] * 3, [])}
        judge = scoring_judge(section.model_dump(), folder / REPLIES, "eval.judge")
        scores, unscored = _judged(judge, answers, lambda prompt, text, _: text, 1)
        keep_unscored(folder / UNSCORED, unscored)
        evaluated.append(scores)
        return SimpleNamespace(verdict=SimpleNamespace(headline="", status="unclear"))

    monkeypatch.setattr(stages, "evaluate", evaluate)
    monkeypatch.setattr(stages, "write_report", lambda report, folder: None)

    def command(door: tuple[int, Any], mirror: tuple[int, Any]) -> list[str]:
        """Run the command; what was asked."""
        replies = {"lamp": (200, "0"), "door": door, "mirror": mirror}
        endpoint.answer = lambda prompt, count: replies[prompt]
        before = len(endpoint.asked)
        stages.eval_stage(judged, prepared)
        return endpoint.asked[before:]

    busy, words = (503, b""), (200, "Well, 1.")
    assert command(busy, words) == ["lamp", "door", "mirror"]
    kept = read_jsonl(run.folder / "eval" / UNSCORED)
    assert [(row["prompt"], row["why"]) for row in kept] == [("door", "not answered"), ("mirror", "unreadable")]
    # only what is missing is asked, and where nothing new is said nothing is measured again
    assert command(busy, words) == ["door", "mirror"] and len(evaluated) == 1
    assert command((401, b""), words) == ["door"] and len(evaluated) == 1  # what was measured stands
    assert "2 answers are still without a score" in caplog.text and "answered 401" in caplog.text
    assert command((200, "1"), words) == ["door", "mirror", "mirror"]
    assert evaluated[1:] == [{"base": [0, 1, Missing.UNREADABLE]}]
    assert command(busy, (200, "1")) == ["mirror"] and evaluated[2:] == [{"base": [0, 1, 1]}]
    assert command(busy, busy) == [] and len(evaluated) == 3
    assert not (run.folder / "eval" / UNSCORED).exists()
    (run.folder / "stages" / "eval.json").unlink()
    shutil.rmtree(run.folder / "eval")


def test_the_test_split_is_scored_once(run: Run, base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each report on it is recorded, and one of weights that were scored before says so. Nothing is measured here."""
    report = {"metrics": [], "side_effects": [], "trajectories": [], "transcripts": [], "does_not_compare": []}
    facts: dict[str, Any] = {key: {} for key in ("persona_space", "axis", "floor", "training")}
    found = Report.model_validate({
        **report, **facts, "title": "t", "created": "2026-12-01T00:00:00+00:00", "repeat": {"git": "g"}, "warnings": ["w"],
        "verdict": {"status": "mixed", "headline": "h", "points": []},
    })  # fmt: skip
    monkeypatch.setattr(stages, "evaluate", lambda evaluation: found)
    monkeypatch.setattr(stages, "open_subjects", lambda *given: {})
    folder, prepared = tmp_path / "run", Prepared(run)
    shutil.copytree(run.folder, folder)
    other = save_model(tmp_path / "other")

    def scored(split: str, tuned: Path, **more: Any) -> Report:
        for kept in ("stages/eval.json", "eval/weights.json"):
            (folder / kept).unlink(missing_ok=True)
        section = run.recipe.eval.model_copy(update={"split": split, "tuned": str(tuned), **more})
        recipe = run.recipe.model_copy(update={"eval": section})
        again = dataclasses.replace(run, folder=folder, recipe=recipe)
        stages.eval_stage(again, prepared)
        stages.eval_stage(again, prepared)  # done already: no second report
        return load_report(folder / "report.json")

    assert scored("dev", base) == found and not (folder / "test_scored.jsonl").exists()
    first = scored("test", base)
    assert (first.repeat, first.warnings) == ({"git": "g", "test_scored": 1}, ["w"])
    assert scored("test", other).repeat["test_scored"] == 1
    assert scored("dev", base) == found
    second = scored("test", base, roles=5)
    assert second.repeat["test_scored"] == 2 and "scored on the test split 2 times" in second.warnings[1]
    rows = read_jsonl(folder / "test_scored.jsonl")
    assert [row["weights"] == rows[0]["weights"] for row in rows] == [True, False, True]
    assert len({row["eval"] for row in rows}) == 3  # other weights are another section too
    assert {(row["created"], row["git"], row["status"]) for row in rows} == {(found.created, git_revision(), "mixed")}
    beside, broken = tmp_path / "beside", tmp_path / "broken"
    for place in (beside, broken):
        place.mkdir()
    shutil.copy(folder / "test_scored.jsonl", beside)
    (broken / "test_scored.jsonl").write_text("no JSON\n", encoding="utf-8")
    third = scored("test", base)
    assert third.repeat["test_scored"] == 3 and len(third.warnings) == 3
    assert "scored on the test split in beside too" in third.warnings[2]
    fresh = scored("test", save_model(tmp_path / "fresh"))
    assert (fresh.repeat["test_scored"], fresh.warnings) == (1, ["w"])


@pytest.mark.slow
def test_the_cap_against_itself_keeps_exactly_all(run: Run) -> None:
    """The tuned weights are the base under hooks that know nothing of ours."""

    with contextlib.ExitStack() as hooks:

        def capped(model: Any, floor: Floor) -> Any:
            other = copy.deepcopy(model)
            hooks.enter_context(capped_by_hand(other, floor))
            return whole(other)

        report = evaluated(run, capped)
    metrics = {metric.id: metric for metric in report.metrics}
    defined = [metric for metric in report.metrics if metric.retention.estimate is not None]
    assert {"z_training", "kl_capped_self"} <= {metric.id for metric in defined}
    for metric in defined:
        assert metric.retention.estimate is not None
        assert metric.retention.estimate.value == pytest.approx(1, abs=1e-4)
        assert metric.retention.estimate.low == pytest.approx(1, abs=1e-4)
    assert metrics["text_llr"].tuned_effect == metrics["text_llr"].cap_effect


@pytest.mark.slow
@pytest.mark.parametrize("blind", [False, True])
def test_an_adapter_that_only_shifts_along_the_axis_is_caught_and_named(
    blind: bool, base: Path, run: Run, tmp_path: Path
) -> None:
    def cheating(model: Any, floor: Floor) -> Any:
        adapter = cheats.make_adapter(str(base), floor, tmp_path / "cheat", sigmas=2.0, blind=blind)
        return open_weights(model, {"tuned": adapter})["tuned"]

    report = evaluated(run, cheating)
    claim = next(claim for claim in report.claims if claim.id == "projections")
    assert claim.light == "red" and "shift of every text alike" in claim.says
    assert report.verdict.status != "good" and report.verdict.points[0].endswith(claim.says)
    z = next(metric for metric in report.metrics if metric.id == "z_training")
    assert z.tuned_effect.low > 1  # by projections alone it would pass for a success


def tuned_adapter(base: Path, folder: Path) -> Path:
    """A PEFT adapter of the base that does something."""
    from transformers import AutoModelForCausalLM

    model: Any = AutoModelForCausalLM.from_pretrained(base)
    peft: Any = get_peft_model(model, LoraConfig(r=4, target_modules=["o_proj"], init_lora_weights=False))
    peft.save_pretrained(folder)
    return folder


def small() -> list[str]:
    """The sections as overrides of the command line."""
    pairs = [
        (f"{section}.{key}", value)
        for section, keys in SECTIONS.items()
        if section != "floor"
        for key, value in keys.items()
    ]
    return [f"{key}={value}" for key, value in pairs] + ["model.dtype=float32", "model.device=cpu"]


@pytest.mark.slow
@pytest.mark.usefixtures("quick_children")
def test_the_command_takes_an_adapter_and_the_same_weights_whole(base: Path, run: Run, tmp_path: Path) -> None:
    """The adapter, and a model that it was merged into, measure alike."""
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    adapter = tuned_adapter(base, tmp_path / "adapter")
    before = {path.name: path.stat().st_mtime_ns for path in adapter.iterdir()}
    model: Any = AutoModelForCausalLM.from_pretrained(base)
    merged = PeftModel.from_pretrained(model, str(adapter)).merge_and_unload()
    merged.save_pretrained(tmp_path / "merged")
    build_tokenizer().save_pretrained(tmp_path / "merged")
    floor = run.variant(control=False).floor_path
    reports = []
    for tuned in (adapter, tmp_path / "merged"):
        out = tmp_path / f"run-{tuned.name}"
        arguments = [
            "eval",
            "--base",
            str(base),
            "--tuned",
            str(tuned),
            "--floor",
            str(floor),
            "--output-dir",
            str(out),
        ]
        further = (
            ["eval.durability=[{name: benign, rows: 4, batch_size: 4, epochs: 3, learning_rate: 0.05}]"]
            if tuned == adapter
            else []
        )
        assert main([*arguments, *small(), *further, "--quiet"]) == 0
        reports.append(load_report(out / "report.json"))
        card = (out / "model_card.md").read_text(encoding="utf-8")
        assert "Weights from elsewhere" in card and "peft" not in card and reports[-1].verdict.headline in card
        assert (out / "report.html").exists()
    assert {path.name: path.stat().st_mtime_ns for path in adapter.iterdir()} == before  # nothing was written there
    one, other = reports
    (outcome,) = one.durability
    assert not other.durability
    primary = outcome.metrics[0]
    assert primary.lead.n == 12
    assert abs(primary.tuned_change.value) > 1e-4  # it has learnt something
    # scored in batches of other widths, as only one of them was fine-tuned further
    for first, second in zip(one.metrics, other.metrics, strict=True):
        for arm, estimate in first.arms.items():
            assert estimate.value == pytest.approx(second.arms[arm].value, abs=1e-5)
    assert one.side_effects == other.side_effects
    assert one.metrics[0].tuned_effect.value != 0
    assert one.repeat["hashes"]["tuned"] != other.repeat["hashes"]["tuned"]


@pytest.mark.parametrize(
    ("given", "said"),
    [
        (["--base", "M"], "--tuned"),
        (["--tuned", "M"], "--base"),
        (["tiny/sft", "--base", "M", "--tuned", "N"], "both a recipe"),
        ([], "nothing to evaluate"),
        (["--base", "M", "--tuned", "N", "eval.control=true"], "eval.control"),
        (["--base", "M", "--tuned", "N", "--floor", "nowhere.safetensors"], "--floor: no such"),
    ],
)
def test_half_a_subject_is_refused(given: list[str], said: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["eval", *given]) == 2
    printed = capsys.readouterr().err
    assert said in printed and "remedy" in printed


def test_what_is_no_tuned_model_is_refused(base: Path, run: Run, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="neither adapter_config"):
        find_subject(str(tmp_path))
    (tmp_path / "adapter_config.json").write_text("{}", encoding="utf-8")
    with pytest.raises(UserError, match="peft_type"):
        find_subject(str(tmp_path))
    deeper, spoken = tmp_path / "deeper", tmp_path / "spoken"
    for folder, changes, template in ((deeper, {"num_hidden_layers": 5}, CHATML), (spoken, {}, "{{ 'other' }}")):
        build_model("llama", max_position_embeddings=2048, **changes).save_pretrained(folder)
        build_tokenizer(template).save_pretrained(folder)
    with pytest.raises(UserError, match="num_hidden_layers is 5"):
        check_subject(run.recipe.model, find_subject(str(deeper)))
    check_subject(run.recipe.model, find_subject(str(spoken)))  # another template is warned of


def test_a_recipe_of_options_names_its_faults() -> None:
    with pytest.raises(RecipeError, match=r"eval\.rols"):
        recipe_of({"model": {"name": "m"}, "eval": {"tuned": "t", "rols": 3}}, "x")


@pytest.mark.parametrize(
    ("axis", "durability", "kinds"),
    [
        ({}, [], {"default", "dev"}),
        ({"held_out_roles": 0}, [], set()),
        ({}, ["persona"], {"default", "train", "dev"}),  # whose rows are what the training roles said
    ],
)
def test_an_evaluation_that_is_given_axis_and_floor_samples_what_it_needs(
    axis: dict[str, Any], durability: list[str], kinds: set[str], base: Path, run: Run, tmp_path: Path
) -> None:
    given = {
        "axis": {**SECTIONS["axis"], "path": str(run.axis_path), **axis},
        "floor": {"path": str(run.variant(control=False).floor_path)},
        "eval": {**SECTIONS["eval"], "tuned": str(base), "durability": durability},
    }
    model = {"name": str(base), "dtype": "float32", "device": "cpu"}
    made = open_run(recipe_of({"model": model, **given}, "given"), output_dir=str(tmp_path / "run"))
    floor_stage(made)
    splits = {role.name: split for split in ("train", "dev") for role in data.roles(split)}
    rows = [
        row for path in (made.rollouts_path, made.held_out_rollouts_path) if path.exists() for row in read_jsonl(path)
    ]
    assert {splits.get(row["role"], row["role"]) for row in rows} == kinds
    # 3 questions to each role and, twice, to the default Assistant; its answers are each axis's own
    assert len(rows) == 3 * ((2 + 2) * ("dev" in kinds) + (3 + 2) * ("train" in kinds))
    assert made.rollouts_path.exists() == ("train" in kinds)
    assert len(rows) == sum(call.rows for call in count(made.recipe, 1).before), "trimtab check counts as many"
    assert made.held_out_axis_path.exists() == ("dev" in kinds)
    if "dev" in kinds:
        assert Axis.load(made.held_out_axis_path).metadata["split"] == "dev"
    assert torch.equal(Axis.load(made.axis_path).directions, Axis.load(run.axis_path).directions)
    floors = [Floor.load(each.variant(control=False).floor_path) for each in (made, run)]
    assert torch.equal(floors[0].tau, floors[1].tau)


def test_rollouts_that_were_left_out_are_missed_before_they_are_read(base: Path, run: Run, tmp_path: Path) -> None:
    """A folder whose axis stage played no training role is not gone on with where their answers are needed."""
    sections = {
        "model": {"name": str(base), "dtype": "float32", "device": "cpu"},
        "axis": {**SECTIONS["axis"], "path": str(run.axis_path), "held_out_roles": 0},
        "floor": {"path": str(run.variant(control=False).floor_path)},
        "eval": {**SECTIONS["eval"], "tuned": str(base)},
    }
    axis_stage(open_run(recipe_of(sections, "given"), output_dir=str(tmp_path / "run")))
    with pytest.raises(UserError, match="axis rollouts was 'of held-out roles'"):
        open_run(recipe_of({**sections, "floor": SECTIONS["floor"]}, "given"), output_dir=str(tmp_path / "run"))
