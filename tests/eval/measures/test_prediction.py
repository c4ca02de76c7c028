"""R2 of an answer's position from the message before it: planted, absent, and not to be had from knowing the conversation."""

from __future__ import annotations

import numpy as np
import torch

from trimtab.eval.measures.prediction import position_r2

TALKS, TURNS, WIDTH = 24, 5, 12


def planted(noise: float) -> tuple[torch.Tensor, np.ndarray, list[str]]:
    random = np.random.default_rng(4)
    rows = random.normal(size=(TALKS * TURNS, WIDTH))
    z = rows @ random.normal(size=WIDTH)
    z = z / z.std() + noise * random.normal(size=len(z))
    return torch.tensor(rows, dtype=torch.float32), z, [f"t{i // TURNS}" for i in range(len(z))]


def test_what_is_planted_is_found_with_its_share() -> None:
    rows, z, talks = planted(1.0)  # half of the variance is noise
    found = position_r2(rows, z.tolist(), talks, bootstrap=800, seed=0)
    assert found is not None and 0.3 < found.value < 0.55 and found.low < 0.5 < found.high + 0.1
    assert found.n == TALKS * TURNS
    clear = position_r2(*planted(0.0), bootstrap=800, seed=0)
    assert clear is not None and clear.value > 0.98


def test_noise_is_not_predicted() -> None:
    rows, z, talks = planted(1.0)
    found = position_r2(rows, np.random.default_rng(1).permutation(z).tolist(), talks, bootstrap=800, seed=0)
    assert found is not None and found.value < 0.15 and found.low < 0


def test_to_know_the_conversation_is_no_foretelling() -> None:
    """Every talk has a level and a mark of its own: within talks it could be learnt, across them there is nothing to learn."""
    random = np.random.default_rng(2)
    level, mark = random.normal(size=TALKS), random.normal(size=(TALKS, WIDTH * 4))
    talk = np.repeat(np.arange(TALKS), TURNS)
    found = position_r2(torch.tensor(mark[talk]), level[talk].tolist(), [f"t{i}" for i in talk], bootstrap=400, seed=0)
    assert found is not None and found.value < 0.2


def test_empty_answers_are_left_out_and_too_little_gives_nothing() -> None:
    rows, z, talks = planted(0.5)
    z[:7] = np.nan
    found = position_r2(rows, z.tolist(), talks, bootstrap=200, seed=0)
    assert found is not None and found.n == TALKS * TURNS - 7
    few = slice(7 * TURNS)  # seven conversations
    assert position_r2(rows[few], np.arange(35.0).tolist(), talks[few], bootstrap=200, seed=0) is None
    assert position_r2(rows[:50], [1.0] * 50, talks[:50], bootstrap=200, seed=0) is None
