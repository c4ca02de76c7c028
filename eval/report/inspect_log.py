"""Export to the log format of inspect_ai, one log an arm, for its viewer and whatever reads its logs.

A sample is a transcript of the report, or an answer that was read: the arm's own messages, scored by what is known of them (mean
z, the reader's log-odds that a persona speaks, relevance). The metrics of the whole evaluation stand as the log's results, each
with its interval.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import fmean
from typing import Any

from trimtab.axis.errors import UserError
from trimtab.eval.schema import AnswerRow, Estimate, Report, Transcript


def write_inspect_logs(report: Report, folder: Path) -> list[Path]:
    """Write ``<arm>.json`` for every arm that the report measured; returns the files.

    Raises:
        UserError: if inspect_ai is not installed.
    """
    try:
        from inspect_ai.log import write_eval_log
    except ImportError as error:
        raise UserError(
            "inspect_ai is not installed", key="--inspect", remedy='pip install "trimtab[inspect]"'
        ) from error
    folder.mkdir(parents=True, exist_ok=True)
    paths = []
    for arm in dict.fromkeys(arm for metric in report.metrics for arm in metric.arms):
        path = folder / f"{arm.replace('+', '-')}.json"
        write_eval_log(_log(report, arm), str(path))
        paths.append(path)
    return paths


def _log(report: Report, arm: str) -> Any:
    from inspect_ai.log import EvalConfig, EvalDataset, EvalLog, EvalResults, EvalScore, EvalSpec

    repeat = report.repeat
    samples = [_sample(transcript, arm, number) for number, transcript in enumerate(report.transcripts, start=1)]
    samples += [_read_sample(row, arm) for row in report.answers]
    samples = [sample for sample in samples if sample is not None]
    resolved = repeat.get("resolved") or {}
    return EvalLog(
        status="success",
        eval=EvalSpec(
            created=report.created,
            task="trimtab",
            dataset=EvalDataset(name="trimtab transcripts and answers", samples=len(samples)),
            model=f"trimtab/{(resolved.get('model') or {}).get('name', 'model')} ({arm})",
            config=EvalConfig(),
            packages={name: str(version) for name, version in (repeat.get("versions") or {}).items()},
            metadata={
                "title": report.title, "arm": arm, "verdict": report.verdict.model_dump(), "command": repeat.get("command"),
            },
        ),
        results=EvalResults(
            total_samples=len(samples),
            completed_samples=len(samples),
            scores=[
                EvalScore(name=metric.id, scorer="trimtab", metrics=_numbers(metric.arms[arm]), metadata={"unit": metric.unit})
                for metric in report.metrics
                if arm in metric.arms
            ],
        ),
        samples=samples,
    )  # fmt: skip


def _numbers(estimate: Estimate) -> dict[str, Any]:
    from inspect_ai.log import EvalMetric

    return {name: EvalMetric(name=name, value=value) for name, value in estimate.model_dump().items()}


def _sample(transcript: Transcript, arm: str, number: int) -> Any:
    turns = [(turn.user, turn.answers[arm]) for turn in transcript.turns if arm in turn.answers]
    if not turns:
        return None
    z = [answer.z for _, answer in turns]
    read = [answer.persona for _, answer in turns if answer.persona is not None]
    return _eval_sample(
        f"{number} {transcript.id}",
        transcript.system,
        [(user, answer.text) for user, answer in turns],
        {"z": (fmean(z), {"by_turn": z})} | ({"persona": (fmean(read), {"by_turn": read})} if read else {}),
        {"kind": transcript.kind, "note": transcript.note},
        arm,
    )


def _read_sample(row: AnswerRow, arm: str) -> Any:
    answer = row.answers.get(arm)
    if answer is None:
        return None
    scores = answer.model_dump(exclude={"text"}, exclude_none=True)
    return _eval_sample(
        f"{row.suite} {row.id} turn {row.turn}",
        row.system,
        [(row.question, answer.text)],
        {name: (score, {}) for name, score in scores.items()},
        row.model_dump(include={"suite", "kind", "cluster", "turn"}),
        arm,
    )


def _eval_sample(
    name: str,
    system: str,
    turns: Sequence[tuple[str, str]],
    scores: Mapping[str, tuple[float, dict[str, Any]]],
    facts: dict[str, Any],
    arm: str,
) -> Any:
    from inspect_ai.log import EvalSample
    from inspect_ai.model import ChatMessageAssistant, ChatMessageSystem, ChatMessageUser, ModelOutput
    from inspect_ai.scorer import Score

    messages: list[Any] = [ChatMessageSystem(content=system)] if system else []
    for user, answer in turns:
        messages += [ChatMessageUser(content=user), ChatMessageAssistant(content=answer)]
    return EvalSample(
        id=name,
        epoch=1,
        input=messages[:-1],
        target="",
        messages=messages,
        output=ModelOutput.from_content(arm, turns[-1][1]),
        scores={key: Score(value=value, metadata=more) for key, (value, more) in scores.items()},
        metadata=facts,
    )
