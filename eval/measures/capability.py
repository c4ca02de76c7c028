"""Capability of every arm by lm-eval: what the tuning must not cost. Capped arms run under the hooks.

Two tasks of our own need no network: ``everyday_choice`` (multiple choice by likelihood) and ``instructions`` (rules that a
program checks). ``paper`` stands for the four tasks of arXiv 2601.10387, with its metrics and sample counts; any other name is
lm-eval's.
"""

from __future__ import annotations

import functools
import logging
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from trimtab.axis import ActivationController, UserError
from trimtab.axis.chat import ChatFormat, Message
from trimtab.axis.files import file_fingerprint, fingerprint, read_json, read_jsonl, write_json
from trimtab.eval.answers.arms import Arms
from trimtab.eval.measures.instruction_rules import follows
from trimtab.recipes.data import FOLDER

log = logging.getLogger("trimtab")


@dataclass(frozen=True)
class Task:
    """One task and how it is scored.

    Attributes:
        name: lm-eval's, or one of our own.
        metric: which of the task's metrics; None takes its first.
        limit: documents, for a group of tasks in each of them; None takes all.
        chat: whether the chat template is put round the prompts.
        chance: score of guessing, or None.
        scale: highest score.
        filter: which of the task's answer filters; None takes its first.
    """

    name: str
    metric: str | None = None
    limit: int | None = None
    chat: bool = True
    chance: float | None = None
    scale: float = 1.0
    filter: str | None = None


OWN = {
    "everyday_choice": Task("everyday_choice", metric="acc", chat=False, chance=0.25),
    "instructions": Task("instructions", metric="strict_acc"),
}
# 541, 1,400, 1,000 and 171 documents, no examples in the prompt; MMLU-Pro is a group of 14 tasks.
PAPER = {
    "ifeval": Task("ifeval", metric="inst_level_strict_acc"),
    "mmlu_pro": Task("mmlu_pro", metric="exact_match", limit=100, chance=0.1),
    "gsm8k": Task("gsm8k", metric="exact_match", limit=1000, filter="flexible-extract"),
    "eq_bench": Task("eq_bench", metric="eqbench", scale=100.0),
}


@dataclass(frozen=True)
class Size:
    """How much a task asks, for the estimate of hours.

    Attributes:
        documents: how many it has.
        prompt: tokens of one, about.
        answer: most tokens of a generated answer; 0 where answers are scored by likelihood.
    """

    documents: int = 400
    prompt: int = 200
    answer: int = 256


OWN_ANSWER = 96  # most tokens of an answer to our own instructions
# As lm-eval 0.4.13 has them; another task is taken for one of the default size.
SIZES = {
    "everyday_choice": Size(240, 40, 0),
    "instructions": Size(80, 40, OWN_ANSWER),
    "ifeval": Size(541, 60, 1280),
    "mmlu_pro": Size(1400, 250, 2048),
    "gsm8k": Size(1000, 80, 256),
    "eq_bench": Size(171, 400, 80),
}
GROUPS = {"mmlu_pro": 14}  # tasks of a group, each of which has its own limit


def size_of(task: Task) -> Size:
    """How much a task asks within its limit."""
    size = SIZES.get(task.name, Size())
    if task.limit is None:
        return size
    return replace(size, documents=min(size.documents, task.limit * GROUPS.get(task.name, 1)))


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


def tasks_of(names: Sequence[str], limit: int | None) -> list[Task]:
    """The tasks that a recipe names.

    Args:
        names: names, or ``paper`` for the paper's four.
        limit: most documents of each task; None leaves each task's own.
    """
    found: list[Task] = []
    for name in names:
        known = [*PAPER.values()] if name == "paper" else [OWN.get(name) or PAPER.get(name) or Task(name)]
        found += [task if limit is None else replace(task, limit=min(limit, task.limit or limit)) for task in known]
    return list({task.name: task for task in found}.values())


def check_tasks(names: Sequence[str], folder: Path | None) -> None:
    """Look up the tasks that are neither our own nor the paper's in lm-eval's index, which takes some seconds.

    Args:
        names: of ``eval.capability``.
        folder: lm-eval task files of the user's own.

    Raises:
        UserError: for a name that lm-eval doesn't know.
    """
    foreign = [task.name for task in tasks_of(names, None) if task.name not in {**OWN, **PAPER}]
    for name in foreign:
        index = _task_manager(folder, False)
        if not index.match_tasks([name]):
            raise UserError(
                f"lm-eval has no task {name!r}",
                key="eval.capability",
                remedy=f"name a task that `lm-eval ls tasks` lists, `paper`, or {', '.join(OWN)}",
            )


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
        by_arm = {arm: _kept(arms, arm, task, batch_size, task_folder) for arm in arms.names}
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


def _kept(arms: Arms, arm: str, task: Task, batch_size: int, task_folder: Path | None) -> dict[str, Any]:
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
                    task_manager=_task_manager(None if own else task_folder, own),
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


@functools.cache
def _task_manager(folder: Path | None, own: bool) -> Any:
    """lm-eval's index of tasks, which takes seconds to make; our own tasks need none."""
    from lm_eval.tasks import TaskManager

    return TaskManager(include_path=None if folder is None else str(folder), include_defaults=not own)


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
