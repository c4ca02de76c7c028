"""The reader: what it makes of states whose speakers are known, and which states it reads."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import HIDDEN, LAYERS, build_tokenizer
from sklearn.metrics import roc_auc_score

from trimtab.axis.chat_format import ChatFormat, chat
from trimtab.axis.models import Loaded
from trimtab.axis.reader import Reader, fit_reader, layers_to_read, left_out_scores, read_states, rows_to_read

QUESTIONS = ["How do I bake bread at home?", "Why is the sky blue?", "Who are you?", "x"]
ANSWERS = ["Arr, the oven be small.", "", "The grass is green and the sky is blue, my child, é.", "B"]


def synthetic(n: int, *, gap: float, seed: int = 0, groups: int = 40) -> tuple[torch.Tensor, list[bool], list[str]]:
    """States [n, 2, 6] of two speakers, ``gap`` standard deviations apart in one direction, with questions of their own noise."""
    random = np.random.default_rng(seed)
    labels = random.integers(0, 2, n).astype(bool)
    group = random.integers(0, groups, n)
    of_question = random.normal(0, 0.5, (groups, 2, 6))
    states = random.normal(0, 1, (n, 2, 6)) + of_question[group]
    states[:, :, 0] += gap * (labels[:, None] - 0.5)
    return torch.tensor(states).float(), labels.tolist(), [f"question {k}" for k in group]


def fitted_on(states: torch.Tensor, labels: list[bool], groups: list[str], layers: list[int]) -> Reader:
    """Fitted, and calibrated on scores that were left out."""
    return fit_reader(states, labels, left_out_scores(states, labels, groups), layers)


def test_speakers_that_can_be_told_are_told_on_states_that_were_not_fitted() -> None:
    fitted = fitted_on(*synthetic(600, gap=4.0), layers=[3, 5])
    states, labels, _ = synthetic(400, gap=4.0, seed=1)
    scores = fitted.log_odds(states)
    assert fitted.layers == (3, 5) and fitted.weights.shape == (2, 6)
    assert roc_auc_score(labels, scores) > 0.98
    assert np.mean([(score > 0) == label for score, label in zip(scores, labels, strict=True)]) > 0.93
    assert fitted.slope > 0, "more is more of a persona"


def test_what_cannot_be_told_is_not_told() -> None:
    states, labels, groups = synthetic(600, gap=0.0)
    held = left_out_scores(states, labels, groups)
    assert 0.4 < roc_auc_score(labels, held) < 0.6
    assert max(map(abs, fitted_on(states, labels, groups, [0, 1]).log_odds(states))) < 2


def test_log_odds_are_near_the_true_ones() -> None:
    """One layer of unit noise around +-gap/2: the true log-odds are gap * x, of whom both are as likely."""
    random, gap = np.random.default_rng(3), 2.0

    def drawn(n: int, share: float) -> tuple[torch.Tensor, list[bool]]:
        labels = random.random(n) < share
        x = random.normal(0, 1, n) + gap * (labels - 0.5)
        return torch.tensor(np.stack([x, random.normal(0, 1, n)], 1)[:, None]).float(), labels.tolist()

    # three texts of four are a persona's, and both speakers weigh the same all the same
    states, labels = drawn(4000, 0.75)
    fitted = fitted_on(states, labels, [str(i) for i in range(4000)], [0])
    new, told = drawn(4000, 0.5)
    found, true = np.array(fitted.log_odds(new)), gap * new[:, 0, 0].numpy()
    assert np.abs(found - true).mean() < 0.2
    for low, high in ((-3, -1), (-1, 0), (0, 1), (1, 3)):
        inside = (found > low) & (found <= high)
        meant = (1 / (1 + np.exp(-found[inside]))).mean()
        assert np.array(told)[inside].mean() == pytest.approx(meant, abs=0.05)


def test_what_is_saved_comes_back(tmp_path: Path) -> None:
    states, labels, groups = synthetic(200, gap=2.0)
    fitted = fitted_on(states, labels, groups, [1, 2])
    with_facts = Reader(**{**vars(fitted), "facts": {"texts": 200, "gallery": {"bland": -1.5}}})
    with_facts.save(tmp_path / "reader.safetensors")
    found = Reader.load(tmp_path / "reader.safetensors")
    assert (found.layers, found.slope, found.intercept) == ((1, 2), fitted.slope, fitted.intercept)
    assert found.facts == {"texts": 200, "gallery": {"bland": -1.5}}
    assert found.log_odds(states) == with_facts.log_odds(states)


def test_left_out_scores_never_see_their_own_group() -> None:
    """Each question's texts are told by a direction of their own, which says nothing of another question's."""
    groups, each = 12, 8
    random = np.random.default_rng(0)
    states = random.normal(0, 0.1, (groups * each, 1, groups))
    labels = [k % 2 == 0 for k in range(groups * each)]
    names = [f"question {k // each}" for k in range(groups * each)]
    for k, label in enumerate(labels):
        states[k, 0, k // each] += 3 if label else -3
    tensor = torch.tensor(states).float()
    inside = fitted_on(tensor, labels, names, [0])
    probe = ((tensor - inside.mean) / inside.scale * inside.weights).sum(-1).mean(1)
    assert roc_auc_score(labels, probe) == 1.0, "fitted on, each of them is told"
    held = left_out_scores(tensor, labels, names)
    assert abs(roc_auc_score(labels, held) - 0.5) < 0.2
    alone = left_out_scores(tensor, labels, [str(k) for k in range(len(labels))])
    assert roc_auc_score(labels, alone) == 1.0, "where each text is a group, others of its question are fitted on"


def test_a_group_s_scores_do_not_depend_on_its_own_labels() -> None:
    states, labels, groups = synthetic(120, gap=1.0, groups=10)
    before = left_out_scores(states, labels, groups)
    own = [k for k, group in enumerate(groups) if group == groups[0]]
    changed = [not label if k in own else label for k, label in enumerate(labels)]
    after = left_out_scores(states, changed, groups)
    assert after[own] == pytest.approx(before[own]) and not np.allclose(after, before)


@pytest.mark.parametrize("n_layers", range(1, 81))
def test_the_layers_that_are_read_are_there_each_once_in_order(n_layers: int) -> None:
    layers = layers_to_read(n_layers)
    assert list(layers) == sorted(set(layers)) and 1 <= len(layers) <= 5
    assert layers[0] >= 0 and layers[-1] < n_layers
    if n_layers >= 8:
        assert len(layers) == 5 and layers[0] > 0 and layers[-1] < n_layers - 1


def test_the_layers_of_smollm2() -> None:
    assert layers_to_read(30) == (8, 12, 16, 20, 24)


def by_hand(model: Any, ids: list[int], count: int, layers: list[int]) -> torch.Tensor:
    """Mean output of layers over a row's last ``count`` tokens, [L, D], by the model's own hidden states."""
    with torch.no_grad():
        hidden = model(input_ids=torch.tensor([ids]), output_hidden_states=True).hidden_states
    return torch.stack([hidden[layer + 1][0, -count:].mean(0) for layer in layers])


@pytest.mark.parametrize("batch_size", [1, 3, 16])
def test_states_are_the_means_over_the_answer_s_tokens(loaded: Loaded, form: ChatFormat, batch_size: int) -> None:
    layers = [0, 2]
    given = rows_to_read(loaded.tokenizer, form, QUESTIONS, ANSWERS)
    found = read_states(loaded.model, loaded.tokenizer, given, layers, batch_size=batch_size)
    assert found.shape == (4, 2, HIDDEN) and found.dtype == torch.float32
    assert torch.isnan(found[1]).all() and torch.isfinite(found[[0, 2, 3]]).all()
    for k in (0, 2, 3):
        own = form.answer_ids(ANSWERS[k])
        ids = [*form.prompt_ids(chat("", QUESTIONS[k])), *own]
        torch.testing.assert_close(found[k], by_hand(loaded.model, ids, len(own), layers), rtol=1e-4, atol=1e-5)


def test_a_rank_that_has_fewer_batches_reads_as_much_beside_the_others(loaded: Loaded, form: ChatFormat) -> None:
    """Two batches more than there are, as on a rank that waits for others."""
    given = rows_to_read(loaded.tokenizer, form, QUESTIONS, ANSWERS)
    alone = read_states(loaded.model, loaded.tokenizer, given, [1], batch_size=2)
    beside = read_states(loaded.model, loaded.tokenizer, given, [1], batch_size=2, most=lambda count: count + 2)
    torch.testing.assert_close(beside, alone, equal_nan=True)


def test_the_question_is_read_and_the_answer_s_tokens_alone_are_averaged(loaded: Loaded, form: ChatFormat) -> None:
    given = rows_to_read(loaded.tokenizer, form, ["Who are you?", "Why is the sky blue?"], ["B", "B"])
    one, other = read_states(loaded.model, loaded.tokenizer, given, [1])
    assert given.counts([0, 1]) == [1, 1] and not torch.allclose(one, other)


def test_nothing_but_empty_answers_reads_as_nothing(loaded: Loaded, form: ChatFormat) -> None:
    given = rows_to_read(loaded.tokenizer, form, QUESTIONS[:2], ["", ""])
    states = read_states(loaded.model, loaded.tokenizer, given, [1, 2])
    assert torch.isnan(states).all()
    fitted = fitted_on(torch.randn(40, 2, HIDDEN), [True, False] * 20, [str(k % 10) for k in range(40)], [1, 2])
    assert all(math.isnan(value) for value in fitted.log_odds(states))


def test_a_model_without_a_chat_template_reads_plain_text(loaded: Loaded) -> None:
    plain = build_tokenizer(template=None)
    given = rows_to_read(plain, None, QUESTIONS, ANSWERS)
    assert plain.decode(given.prompts[0]) == "Question: How do I bake bread at home?\nAnswer:"
    assert plain.decode(given.answers[0]) == " Arr, the oven be small." and given.answers[1] == []
    found = read_states(loaded.model, plain, given, [1], batch_size=3)
    ids = plain("Question: Who are you?\nAnswer:").input_ids
    own = plain(f" {ANSWERS[2]}", add_special_tokens=False).input_ids
    torch.testing.assert_close(found[2], by_hand(loaded.model, [*ids, *own], len(own), [1]), rtol=1e-4, atol=1e-5)
    assert torch.isnan(found[1]).all()


def test_hooks_are_gone_after_reading(loaded: Loaded, form: ChatFormat) -> None:
    before = loaded.model(input_ids=torch.tensor([[5, 6, 7]])).logits
    read_states(loaded.model, loaded.tokenizer, rows_to_read(loaded.tokenizer, form, ["x"], ["y"]), range(LAYERS))
    assert torch.equal(loaded.model(input_ids=torch.tensor([[5, 6, 7]])).logits, before)
