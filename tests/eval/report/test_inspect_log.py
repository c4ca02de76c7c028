"""The export is what inspect_ai itself reads back."""

from __future__ import annotations

from pathlib import Path

import pytest
from inspect_ai.log import read_eval_log
from test_report import build_answers, build_report

from trimtab.eval.report.inspect_log import write_inspect_logs


def test_logs_are_read_back_by_inspect(tmp_path: Path) -> None:
    report = build_report()
    report.answers = build_answers()
    report.answers[0].answers.pop("control")
    report.answers[1].answers["tuned"].relevance = None
    report.transcripts[0].turns[0].answers["tuned"].persona = 0.75
    paths = write_inspect_logs(report, tmp_path / "logs")
    assert sorted(path.stem for path in paths) == ["base", "base-cap", "control", "tuned", "tuned-cap"]
    log = read_eval_log(str(tmp_path / "logs" / "tuned.json"))
    assert log.status == "success" and log.eval.metadata is not None and log.eval.metadata["arm"] == "tuned"
    assert log.samples is not None and len(log.samples) == len(report.transcripts) + 36
    first, transcript = log.samples[0], report.transcripts[0]
    answer = transcript.turns[-1].answers["tuned"]
    assert first.output.completion == answer.text and first.messages[0].text == transcript.system
    assert first.scores is not None
    mean = sum(turn.answers["tuned"].z for turn in transcript.turns) / len(transcript.turns)
    assert first.scores["z"].value == pytest.approx(mean)
    assert log.results is not None
    kept = next(score for score in log.results.scores if score.name == "text_llr")
    assert kept.metrics["low"].value == pytest.approx(report.metrics[0].arms["tuned"].low)
    assert first.scores["persona"].value == 0.75
    read = {sample.id: sample for sample in log.samples}["roles item-000 turn 1"]
    assert read.output.completion == report.answers[0].answers["tuned"].text and read.scores is not None
    assert {name: score.value for name, score in read.scores.items()} == {"persona": -1.9, "relevance": 0.5, "z": -1.9}
    assert read.metadata == {"suite": "roles", "kind": "mystical", "cluster": "vampire", "turn": 1}
    partly = {sample.id: sample for sample in log.samples}["conversations item-001 turn 2"]
    assert partly.scores is not None and set(partly.scores) == {"persona", "z"}
    control = read_eval_log(str(tmp_path / "logs" / "control.json"))
    assert control.samples is not None and len(control.samples) == len(report.transcripts) + 35
