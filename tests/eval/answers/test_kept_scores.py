"""Scores are worked out once, over a restart too."""

from __future__ import annotations

import math
from pathlib import Path

from trimtab.eval.answers.kept_scores import KeptScores


def test_the_same_text_is_scored_once_and_read_again_from_the_file(tmp_path: Path) -> None:
    asked: list[tuple[str, str]] = []

    def score(keys: list[tuple[str, str]]) -> list[float]:
        asked.extend(keys)
        return [len(text) if text else math.nan for _, text in keys]

    a, b, empty = ("q", "one"), ("q", "three"), ("q", "")
    scores = KeptScores(tmp_path / "scores.jsonl", score)
    assert scores.of([a, b, a]) == [3, 5, 3] and asked == [a, b]
    assert math.isnan(scores.of([empty])[0]) and scores.of([b]) == [5] and asked == [a, b, empty]
    again = KeptScores(tmp_path / "scores.jsonl", score)
    assert again.of([b, a, ("other q", "one")]) == [5, 3, 3] and asked[3:] == [("other q", "one")]


def test_a_torn_line_costs_its_score_alone(tmp_path: Path) -> None:
    path = tmp_path / "scores.jsonl"
    KeptScores(path, lambda keys: [1.0] * len(keys)).of(["a", "b"])
    path.write_bytes(path.read_bytes()[:-3])
    again = KeptScores(path, lambda keys: [2.0] * len(keys))
    assert again.of(["a", "b"]) == [1, 2]
    assert KeptScores(path, lambda keys: [3.0] * len(keys)).of(["a", "b"]) == [1, 2]
