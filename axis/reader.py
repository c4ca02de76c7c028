"""A reader: who speaks in an answer, an AI assistant or a persona, told from question and answer alone.

A frozen model reads the question, without any system prompt, and the answer. A linear probe over the mean state of the answer's
tokens, at several layers, gives the log-odds that a persona speaks:

    s(y) = slope * mean over layers of ( w_l . (h_l(q, y) - mean_l) / scale_l + b_l ) + intercept        nat

where h_l is the mean output of layer l over the answer's tokens. 0 is as likely one as the other. The probe is fitted on texts
whose speaker is known, so that it depends on the model that reads and on nothing that is measured with it. Slope and intercept
make log-odds of it, by Platt's method (1999) on scores of texts that were left out of the fit.

Shapes: n answers, L layers that are read, D hidden size, T tokens.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from trimtab.axis.chat_format import ChatFormat, chat
from trimtab.axis.files import load_tensors, save_tensors
from trimtab.axis.given import Given
from trimtab.axis.hooks import ActivationController
from trimtab.axis.sampling import pad_left
from trimtab.axis.scoring import SCORE_BATCH

DEPTHS = (0.27, 0.4, 0.53, 0.67, 0.8)  # of the decoder, at which states are read
PENALTY = 0.01  # scikit-learn's C: the inverse of the weight of the probe's L2 penalty, on standardised states
FOLDS = 5
MOST_STEPS = 3000  # of the probe's solver
PLATT_PENALTY = 1e6  # scikit-learn's C of the calibration: next to no penalty


@dataclass(frozen=True)
class Reader:
    """A fitted reader.

    Attributes:
        layers: decoder layers that are read, [L].
        mean: of each state over the fit, [L, D].
        scale: standard deviation of each state over the fit, [L, D].
        weights: of the probes, [L, D].
        bias: of the probes, [L].
        slope: of the calibration.
        intercept: of the calibration, nat.
        facts: of the fit, JSON-able.
    """

    layers: tuple[int, ...]
    mean: Tensor
    scale: Tensor
    weights: Tensor
    bias: Tensor
    slope: float
    intercept: float
    facts: Mapping[str, Any] = field(default_factory=dict)

    def log_odds(self, states: Tensor) -> list[float]:
        """Log-odds that a persona speaks, nat, [n]; NaN for an answer of no words. ``states``: of :func:`read_states`."""
        raw = _raw(states, self.mean, self.scale, self.weights, self.bias)
        return [float(value) for value in raw * self.slope + self.intercept]

    def save(self, path: Path) -> None:
        """Write it as safetensors."""
        tensors = {name: getattr(self, name) for name in ("mean", "scale", "weights", "bias")}
        facts = {
            "layers": list(self.layers),
            "slope": self.slope,
            "intercept": self.intercept,
            "facts": dict(self.facts),
        }
        save_tensors(path, tensors, facts)

    @classmethod
    def load(cls, path: Path) -> Reader:
        """Read what :meth:`save` wrote."""
        tensors, facts = load_tensors(path)
        mean, scale, weights, bias = (tensors[name] for name in ("mean", "scale", "weights", "bias"))
        slope, intercept = float(facts["slope"]), float(facts["intercept"])
        return cls(tuple(facts["layers"]), mean, scale, weights, bias, slope, intercept, facts["facts"])


def fit_settings() -> dict[str, Any]:
    """What a fit depends on beside its texts and the model that reads, JSON-able: a reader kept under others is stale."""
    return {
        "depths": DEPTHS,
        "penalty": PENALTY,
        "folds": FOLDS,
        "most_steps": MOST_STEPS,
        "platt_penalty": PLATT_PENALTY,
    }


def layers_to_read(n_layers: int) -> tuple[int, ...]:
    """The layers at which a model of so many is read: at :data:`DEPTHS`, each once."""
    return tuple(dict.fromkeys(min(n_layers - 1, round(depth * n_layers)) for depth in DEPTHS))


def rows_to_read(tokenizer: Any, form: ChatFormat | None, questions: Sequence[str], answers: Sequence[str]) -> Given:
    """Question and answer as the tokens that are read.

    Args:
        tokenizer: of the model that reads.
        form: its chat format; None for a model without one, which reads plain text.
        questions: the user's last message before each answer.
        answers: the answers.
    """
    if form is not None:
        return Given.of(form, [chat("", question) for question in questions], answers)
    before = [tokenizer(f"Question: {question}\nAnswer:").input_ids for question in questions]
    return Given(
        before, [tokenizer(f" {text}", add_special_tokens=False).input_ids if text else [] for text in answers]
    )


@torch.no_grad()
def read_states(
    model: Any,
    tokenizer: Any,
    given: Given,
    layers: Sequence[int],
    *,
    batch_size: int = SCORE_BATCH,
    title: str = "reading",
    most: Callable[[int], int] = int,
    after_cap: bool = False,
) -> Tensor:
    """Mean state of each answer's tokens at the given layers, [n, L, D] float32; NaN for an answer of no words.

    Args:
        model: the frozen model that reads, as it is now: switch adapters and caps outside.
        tokenizer: its tokenizer.
        given: from :func:`rows_to_read`.
        layers: decoder layers.
        batch_size: rows a forward.
        title: label of the progress bar.
        most: as of :func:`~trimtab.axis.sampling.batches_on_all_ranks`.
        after_cap: read what the next layer sees, under a cap that is on.
    """
    controller = ActivationController.of(model)
    found = torch.full((len(given), len(layers), controller.hidden_size), float("nan"))
    device, pad = next(model.parameters()).device, tokenizer.pad_token_id or 0
    states: dict[int, Tensor] = {}
    for batch in given.batches(batch_size, title, most):
        ids, mask = pad_left(given.rows(batch) or [[pad]], pad, device)
        with controller.reading(layers, states.__setitem__, after_cap=after_cap):
            model(input_ids=ids, attention_mask=mask, logits_to_keep=1)
        for k, (i, count) in enumerate(zip(batch, given.counts(batch), strict=True)):
            found[i] = torch.stack([states[layer][k, -count:].float().mean(0).cpu() for layer in layers])
    return found


def fit_reader(
    states: Tensor, personas: Sequence[bool], left_out: np.ndarray[Any, Any], layers: Sequence[int]
) -> Reader:
    """Fit a reader on texts whose speaker is known.

    Both speakers weigh the same, however many texts each has.

    Args:
        states: of each text, [n, L, D].
        personas: whether a persona speaks in it.
        left_out: of :func:`left_out_scores`, which calibrates, [n].
        layers: that were read.
    """
    labels = np.asarray(personas)
    slope, intercept = _platt(left_out, labels)
    found = _probes(states.double().numpy(), labels)
    mean, scale, weights, bias = (torch.from_numpy(array).float() for array in found)
    return Reader(tuple(layers), mean, scale, weights, bias, slope, intercept)


def left_out_scores(states: Tensor, personas: Sequence[bool], groups: Sequence[str]) -> np.ndarray[Any, Any]:
    """Uncalibrated score of each text by probes that were fitted without its group, [n].

    Args:
        states: of each text, [n, L, D].
        personas: whether a persona speaks in it.
        groups: of each text, such as its question: a group is never on both sides.
    """
    from sklearn.model_selection import GroupKFold

    rows, labels = states.double().numpy(), np.asarray(personas)
    scores = np.zeros(len(labels))
    for inside, outside in GroupKFold(FOLDS).split(rows, groups=groups):
        scores[outside] = _raw(rows[outside], *_probes(rows[inside], labels[inside]))
    return scores


def _raw(states: Any, mean: Any, scale: Any, weights: Any, bias: Any) -> Any:
    """Score before calibration, mean over the layers' probes, [n]; of tensors or of arrays."""
    return (((states - mean) / scale * weights).sum(-1) + bias).mean(1)


def _probes(rows: np.ndarray[Any, Any], labels: np.ndarray[Any, Any]) -> tuple[np.ndarray[Any, Any], ...]:
    """Mean [L, D], scale [L, D], weights [L, D] and bias [L] of one probe a layer."""
    from sklearn.linear_model import LogisticRegression

    mean, scale = rows.mean(0), rows.std(0) + 1e-6
    weights, bias = np.zeros(mean.shape), np.zeros(len(mean))
    for layer in range(len(mean)):
        probe = LogisticRegression(C=PENALTY, class_weight="balanced", max_iter=MOST_STEPS)
        probe.fit((rows[:, layer] - mean[layer]) / scale[layer], labels)
        weights[layer], bias[layer] = np.asarray(probe.coef_)[0], np.asarray(probe.intercept_)[0]
    return mean, scale, weights, bias


def _platt(scores: np.ndarray[Any, Any], labels: np.ndarray[Any, Any]) -> tuple[float, float]:
    """Slope and intercept that turn scores into log-odds; both classes weigh the same."""
    from sklearn.linear_model import LogisticRegression

    fitted = LogisticRegression(C=PLATT_PENALTY, class_weight="balanced").fit(scores[:, None], labels)
    return float(fitted.coef_[0, 0]), float(fitted.intercept_[0])
