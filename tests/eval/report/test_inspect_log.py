"""The export is what inspect_ai itself reads back."""

from __future__ import annotations

from pathlib import Path

import pytest
from inspect_ai.log import read_eval_log
from test_report import build_report

from trimtab.eval.report.inspect_log import write_inspect_logs


def test_logs_are_read_back_by_inspect(tmp_path: Path) -> None:
    report = build_report()
    paths = write_inspect_logs(report, tmp_path / "logs")
    assert sorted(path.stem for path in paths) == ["base", "base-cap", "control", "tuned", "tuned-cap"]
    log = read_eval_log(str(tmp_path / "logs" / "tuned.json"))
    assert log.status == "success" and log.eval.metadata is not None and log.eval.metadata["arm"] == "tuned"
    assert log.samples is not None and len(log.samples) == len(report.transcripts)
    first, transcript = log.samples[0], report.transcripts[0]
    answer = transcript.turns[-1].answers["tuned"]
    assert first.output.completion == answer.text and first.messages[0].text == transcript.system
    assert first.scores is not None
    mean = sum(turn.answers["tuned"].z for turn in transcript.turns) / len(transcript.turns)
    assert first.scores["z"].value == pytest.approx(mean)
    assert log.results is not None
    kept = next(score for score in log.results.scores if score.name == "text_llr")
    assert kept.metrics["low"].value == pytest.approx(report.metrics[0].arms["tuned"].low)
