"""The stages after training: evaluate the arms, and write the report."""

from __future__ import annotations

import datetime
import importlib.util
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from trimtab.axis import Floor, UserError
from trimtab.axis.chat_format import ChatFormat
from trimtab.axis.files import fingerprint, write_text
from trimtab.axis.judge import check_endpoint
from trimtab.axis.models import EMBEDDED
from trimtab.eval.answers.arms import Arms, arm_names, durability_arm
from trimtab.eval.answers.evaluation import Evaluation
from trimtab.eval.answers.inputs import check_inputs
from trimtab.eval.answers.subjects import check_same_weights, given_files, subjects_of
from trimtab.eval.answers.weights import Weights, open_subjects
from trimtab.eval.measures import all_measures
from trimtab.eval.measures.suite import Suite
from trimtab.eval.measures.unscored import UNSCORED, keep_unscored, scored_since
from trimtab.eval.report.assemble import build_report
from trimtab.eval.report.card import model_card
from trimtab.eval.report.facts import repeat_facts, title_of, training_facts
from trimtab.eval.report.page import load_report, render_html, write_report
from trimtab.eval.report.scored import scored_on_test
from trimtab.eval.schema import Report
from trimtab.pipeline.loading import Prepared, sampling_options
from trimtab.pipeline.run import Run
from trimtab.pipeline.subject import check_subject, find_subject
from trimtab.recipes.schema import deciding


def eval_stage(run: Run, prepared: Prepared | None = None) -> dict[str, Any]:
    """Evaluate base, base+cap, tuned, tuned+cap, and the control where there is one; writes ``report.json``.

    Answers are kept arm by arm in ``eval/``, so a killed evaluation goes on where it was. A report on the test split is recorded.

    Raises:
        UserError: if there is no adapter yet, or ``eval.tuned`` is not a model tuned from this base.
    """
    prepared = prepared or Prepared(run)
    check_files(run)
    subjects = subjects_of(run)
    check_same_weights(run, subjects)

    def work() -> dict[str, Any]:
        loaded, form = prepared()
        upon_tuned = [durability_arm("tuned", tuning.name) for tuning in run.recipe.eval.durability]
        weights = open_subjects(run.recipe.model, loaded, subjects, upon_tuned)
        report = evaluate(evaluation_of(run, weights, form, loaded.facts))
        if run.recipe.eval.split == "test":
            report = scored_on_test(run, report, subjects["tuned"])
        write_report(report, run.folder)
        return {"verdict": report.verdict.headline, "status": report.verdict.status}

    inputs = [
        deciding(run.recipe.eval.model_dump()),
        *(subject.fingerprint() for subject in subjects.values()),
        *given_files(run).values(),
    ]
    record = run.stage_record("eval")
    if record is not None and record["key"] == fingerprint(inputs) and scored_since(run):
        (run.folder / "stages" / "eval.json").unlink()
    return run.stage("eval", inputs, work, remedy="delete this file to evaluate anew; answers that still fit are kept")


def check_files(run: Run) -> None:
    """Look at what the evaluation will need (tuned weights, files, keys, packages): what is wrong is told before anything heavy.

    Raises:
        UserError: naming the file and the row, or the key.
    """
    section = run.recipe.eval
    if section.tuned is not None:
        check_subject(run.recipe.model, find_subject(section.tuned))
    if section.capability and importlib.util.find_spec("lm_eval") is None:
        raise UserError(
            "capability needs lm-eval", key="eval.capability", remedy="pip install 'trimtab[eval]', or set it to []"
        )
    check_inputs(run.recipe)
    if run.stage_record("eval") is None:
        for key, model in (("eval.judge", section.judge), ("eval.user", section.user)):
            check_endpoint(model.model_dump() if model else None, key)


def evaluation_of(run: Run, weights: Weights, form: ChatFormat, model_facts: Mapping[str, Any]) -> Evaluation:
    """The evaluation of a run with its arms."""
    section, floor = run.recipe.eval, Floor.load(run.variant(control=False).floor_path)
    options = sampling_options(section.sampling)
    arms = Arms(weights, form, floor, run.folder / "eval", options, section.seed, names=arm_names(section))
    return Evaluation(run, arms, model_facts)


def evaluate(evaluation: Evaluation) -> Report:
    """Ask every measure, and make the report."""
    run, section = evaluation.run, evaluation.section
    suite = measured(evaluation)
    keep_unscored(evaluation.arms.folder / UNSCORED, suite.unscored)
    return build_report(
        suite,
        title=title_of(run),
        created=datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        bootstrap=section.bootstrap,
        seed=section.seed,
        axis=run.facts_of("axis"),
        floor=run.facts_of("floor"),
        training=training_facts(run),
        repeat=repeat_facts(run, evaluation.model_facts),
    )


def measured(evaluation: Evaluation) -> Suite:
    """What all measures found."""
    suite = Suite()
    for measure in all_measures():
        suite.extend(measure.measure(evaluation))
    return suite


def report_stage(run: Run) -> Path:
    """Write ``report.html`` and the model card from ``report.json``; returns the page's path.

    The card lies in the adapter's folder; of weights that were tuned elsewhere it is ``model_card.md`` in the run folder.

    Raises:
        UserError: if there is no ``report.json`` yet.
    """
    report = load_report(run.folder / "report.json")
    page = run.folder / "report.html"
    write_text(page, render_html(report))
    own = run.recipe.eval.tuned is None
    write_text(
        run.variant(control=False).adapter / "README.md" if own else run.folder / "model_card.md", card_of(run, report)
    )
    return page


def card_of(run: Run, report: Report) -> str:
    """The model card of what a run has evaluated."""
    elsewhere = run.recipe.eval.tuned
    facts = {
        "base_model": run.recipe.model.name,
        "license": EMBEDDED[run.recipe.model.name].license if run.recipe.model.name in EMBEDDED else "other",
        **({"recipe": run.loaded.name, "lora": run.recipe.lora} if elsewhere is None else {"tuned": elsewhere}),
    }
    return model_card(report, adapter_facts=facts, trained_here=elsewhere is None)
