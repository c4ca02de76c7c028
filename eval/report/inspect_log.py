"""Export to the log format of inspect_ai, one log an arm, for its viewer and whatever reads its logs.

A sample is a transcript of the report: the arm's own messages, scored by its mean z. The metrics of the whole evaluation stand as
the log's results, each with its interval.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from trimtab.axis.errors import UserError
from trimtab.eval.schema import Estimate, Report, Transcript


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
    samples = [sample for sample in samples if sample is not None]
    resolved = repeat.get("resolved") or {}
    return EvalLog(
        status="success",
        eval=EvalSpec(
            created=report.created,
            task="trimtab",
            dataset=EvalDataset(name="trimtab transcripts", samples=len(samples)),
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
    from inspect_ai.log import EvalSample
    from inspect_ai.model import ChatMessageAssistant, ChatMessageSystem, ChatMessageUser, ModelOutput
    from inspect_ai.scorer import Score

    turns = [(turn.user, turn.answers[arm]) for turn in transcript.turns if arm in turn.answers]
    if not turns:
        return None
    messages: list[Any] = [ChatMessageSystem(content=transcript.system)] if transcript.system else []
    for user, answer in turns:
        messages += [ChatMessageUser(content=user), ChatMessageAssistant(content=answer.text)]
    z = [answer.z for _, answer in turns]
    return EvalSample(
        id=f"{number} {transcript.id}",
        epoch=1,
        input=messages[:-1],
        target="",
        messages=messages,
        output=ModelOutput.from_content(arm, turns[-1][1].text),
        scores={"z": Score(value=sum(z) / len(z), metadata={"by_turn": z})},
        metadata={"kind": transcript.kind, "note": transcript.note},
    )
