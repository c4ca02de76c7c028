"""Capability of every arm by lm-eval: what the tuning must not cost. Capped arms run under the hooks."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from trimtab.axis import ActivationController, UserError
from trimtab.axis.chat_format import ChatFormat, Message
from trimtab.axis.files import file_fingerprint, fingerprint, read_json, read_jsonl, write_json
from trimtab.eval.answers.arms import Arms
from trimtab.eval.answers.evaluation import Evaluation
from trimtab.eval.grading import Light, worst
from trimtab.eval.intervals import ClusterBootstrap, holm
from trimtab.eval.measures.capability_tasks import OWN, OWN_ANSWER, Task, task_manager, tasks_of
from trimtab.eval.measures.instruction_rules import follows
from trimtab.eval.measures.suite import Evidence, Measure, Suite
from trimtab.eval.schema import Capability, Claim
from trimtab.eval.wording import estimate_text, number
from trimtab.recipes.data import FOLDER

log = logging.getLogger("trimtab")

MARGIN = 0.05  # of a task's highest score: what capability may lose
DOCUMENTS = 60  # 3 / MARGIN: where none of fewer changed, a loss of the margin is not ruled out (the rule of three)


@dataclass(frozen=True)
class Scores:
    """Scores of one task, one a document, by arm.

    Attributes:
        task: the task.
        metric: the metric's name.
        ids: the document of each score; IFEval's instructions are scores of one document.
        by_arm: arm -> scores, in the order of ``ids``.
    """

    task: Task
    metric: str
    ids: list[str]
    by_arm: dict[str, list[float]]


def measure(evaluation: Evaluation) -> Suite:
    """Scores of every arm on the recipe's tasks, and what the tuning changed."""
    section = evaluation.section
    scores = measure_capability(
        evaluation.arms,
        tasks_of(section.capability, section.capability_limit),
        batch_size=section.capability_batch,
        task_folder=Path(section.capability_folder) if section.capability_folder else None,
    )
    return Suite(capability=compared(scores, bootstrap=section.bootstrap, seed=section.seed))


def compared(scores: Sequence[Scores], *, bootstrap: int, seed: int) -> list[Capability]:
    """The arms on each task, tuned minus base paired by document, p-values corrected for the number of tasks."""
    found = []
    for row in scores:
        resample = ClusterBootstrap(row.ids, bootstrap, seed)
        arrays = {arm: np.asarray(values) for arm, values in row.by_arm.items()}
        difference = arrays["tuned"] - arrays["base"]
        found.append(
            Capability(
                task=row.task.name,
                metric=row.metric,
                chance=row.task.chance,
                scale=row.task.scale,
                arms={arm: resample.estimate(values, most=row.task.scale) for arm, values in arrays.items()},
                difference=resample.estimate(difference),
                cap_difference=resample.estimate(arrays["base+cap"] - arrays["base"]),
                p_holm=resample.p_value(difference),
                detectable=resample.detectable(difference),
            )
        )
    corrected = holm([row.p_holm for row in found])
    return [row.model_copy(update={"p_holm": p}) for row, p in zip(found, corrected, strict=True)]


def measure_capability(arms: Arms, tasks: Sequence[Task], *, batch_size: int, task_folder: Path | None) -> list[Scores]:
    """Run every task in every arm; what is done is kept in the evaluation's folder.

    Args:
        arms: the arms.
        tasks: see :func:`tasks_of`.
        batch_size: rows a forward.
        task_folder: lm-eval task files of the user's own.

    Raises:
        UserError: if lm-eval is missing, does not know a task, or can't get its documents.
    """
    found = []
    for task in tasks:
        by_arm = {arm: _stored(arms, arm, task, batch_size, task_folder) for arm in arms.names}
        first = by_arm["base"]
        if any(row["ids"] != first["ids"] for row in by_arm.values()):
            raise UserError(
                f"the arms were scored on different documents of {task.name!r}",
                file=arms.folder,
                key="eval.capability",
                remedy="delete its capability-*.json files and evaluate again",
            )
        if task.chance is None:
            task = replace(task, chance=first["chance"])
        found.append(Scores(task, first["metric"], first["ids"], {arm: row["scores"] for arm, row in by_arm.items()}))
    return found


def _stored(arms: Arms, arm: str, task: Task, batch_size: int, task_folder: Path | None) -> dict[str, Any]:
    path = arms.path(f"capability-{task.name.replace('/', '-')}", arm, ".json")
    given = arms.form.template_kwargs if task.chat else {}
    identity = fingerprint([task.__dict__, _sources(task, task_folder), given])
    if path.exists() and (kept := read_json(path))["identity"] == identity:
        found: dict[str, Any] = kept
        return found
    log.info("capability: %s, %s", task.name, arm)
    found = {"identity": identity, **_run(arms, arm, task, batch_size, task_folder)}
    write_json(path, found)
    return found


def _sources(task: Task, task_folder: Path | None) -> dict[str, str]:
    """The files that decide a task's documents, by content: our own rows, or the user's folder."""
    if task.name in OWN:
        return {task.name: file_fingerprint(FOLDER / "capability" / f"{task.name}.jsonl")}
    files = sorted(path for path in task_folder.rglob("*") if path.is_file()) if task_folder is not None else []
    return {str(path): file_fingerprint(path) for path in files}


def _run(arms: Arms, arm: str, task: Task, batch_size: int, task_folder: Path | None) -> dict[str, Any]:
    try:
        import lm_eval
        from lm_eval.models import huggingface
    except ImportError as error:
        raise UserError(
            "capability needs lm-eval", key="eval.capability", remedy="pip install 'trimtab[eval]'"
        ) from error
    own = task.name in OWN
    # Their decorators hide the signatures from the type checkers.
    make_harness: Any = _through(arms.form, huggingface.HFLM) if task.chat else huggingface.HFLM
    run_tasks: Any = lm_eval.simple_evaluate
    with arms.weights(arm) as model:
        harness = make_harness(
            pretrained=model, tokenizer=arms.form.tokenizer, batch_size=batch_size,
            **({"chat_template_args": arms.form.template_kwargs, "add_bos_token": False} if task.chat else {}),
        )  # fmt: skip
        capped = ActivationController.of(model).capping(arms.floor, enabled=arms.floor_of(arm) is not None)
        try:
            with capped:
                result = run_tasks(
                    harness,
                    tasks=[_own_task(task.name) if own else task.name],
                    num_fewshot=0,
                    limit=task.limit,
                    apply_chat_template=task.chat,
                    task_manager=task_manager(None if own else task_folder, own),
                    bootstrap_iters=0,
                    verbosity="ERROR",
                )
        except UserError:
            raise
        except (KeyError, ValueError, OSError, ConnectionError) as error:
            raise UserError(
                f"lm-eval can't run {task.name!r}: {str(error).splitlines()[0] if str(error) else type(error).__name__}",
                key="eval.capability",
                remedy=f"name a task that `lm-eval ls tasks` lists and whose documents can be reached, or {', '.join(OWN)}",
            ) from error
    metric = task.metric or _first_metric(result, task.name)
    scored = [(name, score) for name, row in _samples(result, task) for score in _scores(row[metric])]
    return {
        "metric": metric,
        "ids": [name for name, _ in scored],
        "scores": [score for _, score in scored],
        "chance": _chance(result, task),
    }


def _through(form: ChatFormat, harness: Any) -> Any:
    """lm-eval's class for models of transformers, with prompts rendered and answers ended as everywhere here.

    By itself it leaves out a system prompt that the template refuses, adds a beginning of the text to one that has its own, and
    knows no end of an answer that only the template names.
    """

    class Harness(harness):  # type: ignore[misc]
        eot_token_id = form.end_token

        def apply_chat_template(self, chat_history: Sequence[Message], add_generation_prompt: bool = True) -> str:
            # without a generation prompt the last message is the beginning of the answer
            return form.prompt_text(chat_history)

        def chat_template(self, chat_template: bool | str = False) -> str:
            return form.template.source if chat_template else ""

        def _model_generate(self, context: Any, max_length: int, stop: list[str], **settings: Any) -> Any:
            settings["eos_token_id"] = form.ends_with(self.model)
            return super()._model_generate(context, max_length, stop, **settings)

        def tok_decode(self, tokens: Any, skip_special_tokens: bool = True) -> str:
            said = tokens[form.thought_length(tokens) :] if isinstance(tokens, list) else tokens
            return str(super().tok_decode(said, skip_special_tokens=skip_special_tokens))

    return Harness


def _samples(result: Any, task: Task) -> Iterator[tuple[str, dict[str, Any]]]:
    """Each document's name and logged row, of all subtasks, through one answer filter."""
    for name, rows in sorted(result["samples"].items()):
        filters = dict.fromkeys(row.get("filter", "none") for row in rows)
        chosen = task.filter if task.filter in filters else next(iter(filters), "none")
        for row in sorted(rows, key=lambda row: row["doc_id"]):
            if row.get("filter", "none") == chosen:
                yield f"{name}/{row['doc_id']}", row


def _first_metric(result: Any, name: str) -> str:
    """The first metric that is a mean over documents of which more is better.

    Raises:
        UserError: if a task has none, such as a perplexity.
    """
    known = next(iter(result["configs"].values())).get("metric_list") or []
    fit = [row["metric"] for row in known if row.get("higher_is_better") and row.get("aggregation") in (None, "mean")]
    if not fit:
        names = ", ".join(str(row.get("metric")) for row in known) or "none"
        raise UserError(
            f"lm-eval's task {name!r} has no score that is a mean over documents of which more is better (its metrics: {names})",
            key="eval.capability",
            remedy="name a task that is scored by accuracy or exact match",
        )
    return str(fit[0])


def _chance(result: Any, task: Task) -> float | None:
    """What guessing scores: of multiple choice, the mean of one over the number of choices; None where nobody can say."""
    config = next(iter(result["configs"].values()))
    if config.get("output_type") != "multiple_choice":
        return None
    choices = [len(row.get("filtered_resps") or row.get("resps") or ()) for _, row in _samples(result, task)]
    return sum(1 / count for count in choices if count) / len(choices) if choices and all(choices) else None


def _scores(value: Any) -> list[float]:
    """A document's scores: one, or of IFEval one for each instruction, as its ``inst_level`` metrics count them."""
    return [float(part) for part in value] if isinstance(value, list | tuple) else [float(value)]


def _own_task(name: str) -> dict[str, Any]:
    """lm-eval's configuration of a task of our own."""
    rows = read_jsonl(FOLDER / "capability" / f"{name}.jsonl")

    def documents(**_: Any) -> dict[str, Any]:
        from datasets import Dataset

        # Rules are of several kinds, with keys of their own, which one table can't hold.
        return {"test": Dataset.from_list([{**row, "rules": None} for row in rows])}

    common = {"task": name, "custom_dataset": documents, "test_split": "test"}
    if name == "everyday_choice":
        return {
            **common,
            "output_type": "multiple_choice",
            "doc_to_text": "Question: {{question}}\nAnswer:",
            "doc_to_choice": "{{choices}}",
            "doc_to_target": "answer",
            "metric_list": [{"metric": "acc", "aggregation": "mean", "higher_is_better": True}],
        }
    rules = {row["id"]: row["rules"] for row in rows}

    def check(doc: dict[str, Any], results: Sequence[str]) -> dict[str, float]:
        return {"strict_acc": float(follows(results[0], rules[doc["id"]]))}

    return {
        **common,
        "output_type": "generate_until",
        "doc_to_text": "{{prompt}}",
        "doc_to_target": "",
        "generation_kwargs": {"until": [], "do_sample": False, "max_gen_toks": OWN_ANSWER},
        "process_results": check,
        "metric_list": [{"metric": "strict_acc", "aggregation": "mean", "higher_is_better": True}],
    }


def _is_kept(evidence: Evidence) -> Claim:
    """Non-inferiority by the margin, on the tasks that the base does better than by guessing."""
    tasks = evidence.capability
    judged = [task for task in tasks if task.chance is None or task.arms["base"].low > task.chance]
    lights: list[Light] = []
    for task in judged:
        lost = task.difference.value / task.scale
        inside = task.difference.low / task.scale > -MARGIN and task.difference.n >= DOCUMENTS
        lights.append("green" if inside else "amber" if lost > -MARGIN else "red")
    said = [
        f"{task.task} {estimate_text(task.difference)} (base {number(task.arms['base'].value, 3)}, n = {task.difference.n})"
        for task in judged
    ]
    guessed = [task.task for task in tasks if task not in judged]
    says = f"Tuned minus base: {'; '.join(said)}." if said else "Not measured." if not tasks else ""
    if guessed:
        says = f"{says} Not judged, since the base is not above guessing: {', '.join(guessed)}.".strip()
    rule = (
        f"Green: on every task the interval of tuned minus base lies above a loss of {100 * MARGIN:.0f} % of the highest score. "
        f"Amber: the value does, or there are fewer than {DOCUMENTS} documents. Red: it does not."
    )
    return Claim(
        id="capability",
        name="Capability is kept",
        light=worst(lights),
        says=says,
        rule=rule,
        decides=True,
        measured=bool(tasks),
    )


MEASURE = Measure(measure, claims=(_is_kept,))
