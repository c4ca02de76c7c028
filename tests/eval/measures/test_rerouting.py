"""Probe and persona components on activations whose structure is known."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from trimtab.axis import Axis
from trimtab.eval.measures.rerouting import components, probe_auc

SIZE = 12


def answers(
    shift: float, n: int = 60, seed: int = 0, topic: float = 0.0
) -> tuple[torch.Tensor, list[bool], list[str], list[str]]:
    """Half of the answers in role: shifted along one direction; six questions, each with a direction of its own."""
    generator = torch.Generator().manual_seed(seed)
    means = torch.randn(n, SIZE, generator=generator)
    labels = [i < n // 2 for i in range(n)]
    means[: n // 2, 3] += shift
    for i in range(n):
        means[i, 4 + i % 6] += topic
    return (
        means,
        labels,
        [f"q{i % 6}" for i in range(n)],
        [f"r{i % 10}" if label else f"d{i}" for i, label in enumerate(labels)],
    )


def test_probe_finds_what_is_there_and_nothing_else() -> None:
    there = probe_auc(*answers(4.0), bootstrap=200, seed=0)
    assert there is not None and there.value > 0.97 and there.low > 0.9 and there.n == 60
    nothing = probe_auc(*answers(0.0, n=200), bootstrap=200, seed=0)
    assert nothing is not None and nothing.low < 0.5 < nothing.high + 0.06
    topics = probe_auc(*answers(0.0, n=200, topic=6.0), bootstrap=200, seed=0)
    assert topics is not None and abs(topics.value - 0.5) < 0.15  # questions that can be told apart are no persona
    means, labels, questions, clusters = answers(4.0)
    shuffled = list(np.random.default_rng(1).permutation(labels))
    random = probe_auc(means, shuffled, questions, clusters, bootstrap=200, seed=0)
    assert random is not None and random.low < 0.55
    means[5] = float("nan")
    fewer = probe_auc(means, labels, questions, clusters, bootstrap=200, seed=0)
    assert fewer is not None and fewer.n == 59


def test_probe_is_not_asked_where_it_can_not_be_tested() -> None:
    means, labels, questions, clusters = answers(4.0)
    assert probe_auc(means, labels, ["one"] * len(labels), clusters, bootstrap=50, seed=0) is None
    assert probe_auc(means, [True] * len(labels), questions, clusters, bootstrap=50, seed=0) is None
    apart = [f"{label}{question}" for label, question in zip(labels, questions, strict=True)]
    assert probe_auc(means, labels, apart, clusters, bootstrap=50, seed=0) is None  # no question in both classes


def test_components_tell_along_which_direction_answers_moved() -> None:
    """Roles differ along e0 (much) and e1 (less); the cap moves answers along e0, the tuning along e1."""
    generator = torch.Generator().manual_seed(3)
    roles = torch.zeros(8, 2, SIZE)
    roles[:, 1] = 0.01 * torch.randn(8, SIZE, generator=generator)
    roles[:, 1, 0] += torch.linspace(-4, 4, 8)
    roles[:, 1, 1] += torch.tensor([1.0, -1.0] * 4)
    axis = Axis(torch.eye(SIZE)[:2].flip(0) + 1e-3, torch.zeros(2, SIZE), roles, torch.ones(8, dtype=torch.int64), {})
    base = torch.randn(40, SIZE, generator=generator)
    base[:, 0] -= 2.0
    default = torch.randn(30, SIZE, generator=generator) + torch.tensor([2.0, 0.5, *[0.0] * (SIZE - 2)])
    along = torch.eye(SIZE)
    arms = {"base": base, "base+cap": base + along[0], "tuned": base + 2 * along[1]}
    found = components(axis, 1, arms, default, [f"r{i % 8}" for i in range(40)], bootstrap=200, seed=0)
    assert [c.number for c in found] == list(range(1, 8)) and found[0].variance > found[1].variance > found[2].variance
    first, second = found[0], found[1]
    sigma = torch.cat([base, default])[:, 0].std(correction=0)
    assert first.cap_effect.value == pytest.approx(float(1 / sigma), rel=0.02)  # toward the default: positive
    assert abs(first.tuned_effect.value) < 0.2
    assert abs(second.tuned_effect.value) > 1.5 and abs(second.cap_effect.value) < 0.2
    assert first.cosine_axis == pytest.approx(1, abs=0.02)
    assert components(Axis(axis.directions), 1, arms, default, ["r"] * 40, bootstrap=50, seed=0) == []
