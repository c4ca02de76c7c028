"""Prediction: how far the user's message alone predicts where the answer will lie on the axis.

Ridge regression of an answer's z on an embedding of the message before it, cross-validated over whole conversations. Lu et al.
(2026) find R2 of 0.53 to 0.77 for models of 27B to 70B with a text-embedding model; here the embedding is the base model's own
mean activation over the message, so that no further model is needed, and the figures don't compare with theirs.

Shapes: n answers, D hidden size.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from sklearn.linear_model import RidgeCV
from sklearn.model_selection import GroupKFold, cross_val_predict
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from torch import Tensor

from trimtab.axis.scoring import SCORE_BATCH
from trimtab.eval.answers.arms import Answers
from trimtab.eval.answers.evaluation import Evaluation
from trimtab.eval.answers.reading import message_embeddings
from trimtab.eval.intervals import ClusterBootstrap
from trimtab.eval.measures.simulated import by_place, played_in
from trimtab.eval.measures.suite import Measure, Suite
from trimtab.eval.schema import Estimate

FOLDS = 5
FEWEST = 8  # conversations: with fewer the figure is noise
ALPHAS = np.logspace(0, 6, 13)


def measure(evaluation: Evaluation) -> Suite:
    """R2 of the position of an answer in scripted and simulated conversations, arm by arm."""
    users, simulated = evaluation.once(played_in)
    talks = [talk.id for talk in evaluation.talks]
    simulated_ids = [f"simulated/{i}" for i in range(len(users))]
    placed_turns = {arm: by_place(turns, len(users)) for arm, turns in simulated.items()}
    places = {
        arm: [
            place
            for ids, played in ((talks, evaluation.on_talks), (simulated_ids, placed_turns))
            for place in _places(evaluation, ids, played.get(arm, []))
        ]
        for arm in evaluation.arms.names
    }
    messages = list(dict.fromkeys(message for rows in places.values() for message, _, _ in rows))
    if not messages:
        return Suite()
    embedded = dict(zip(messages, message_embeddings(evaluation.arms, messages, batch_size=SCORE_BATCH), strict=True))
    section = evaluation.section
    found = {
        arm: position_r2(
            torch.stack([embedded[message] for message, _, _ in rows]),
            [z for _, z, _ in rows],
            [talk for _, _, talk in rows],
            bootstrap=section.bootstrap,
            seed=section.seed,
        )
        for arm, rows in places.items()
    }
    return Suite(prediction={arm: r2 for arm, r2 in found.items() if r2 is not None})


def _places(evaluation: Evaluation, ids: Sequence[str], played: Sequence[Answers]) -> list[tuple[str, float, str]]:
    """The user's message, z of the answer to it, and the conversation, of every turn; no prompt stands where one is over."""
    return [
        (prompt[-1]["content"], z, talk)
        for turn in played
        for prompt, z, talk in zip(turn.prompts, evaluation.ruler.z(turn.means), ids, strict=True)
        if prompt
    ]


def position_r2(
    embeddings: Tensor, z: Sequence[float], conversations: Sequence[str], *, bootstrap: int, seed: int
) -> Estimate | None:
    """R2 of z from the messages' embeddings on conversations that the regression was not fitted to; None with too few.

    1 - (squared errors) / (squared distances from the mean z); below 0 the message says less than the mean does.

    Args:
        embeddings: of the user's messages, [n, D].
        z: position of each answer; NaN (an empty answer) is left out, and so is a message without an embedding.
        conversations: of each answer: the folds, and what the bootstrap resamples.
        bootstrap: bootstrap samples.
        seed: of the bootstrap.
    """
    found = np.asarray(z, dtype=float)
    kept = np.isfinite(found) & np.isfinite(embeddings.numpy()).all(1)
    rows, y, groups = embeddings.double().numpy()[kept], found[kept], np.asarray(conversations)[kept]
    if len(set(groups)) < FEWEST:
        return None
    ridge = make_pipeline(StandardScaler(), RidgeCV(alphas=ALPHAS))
    predicted: Any = cross_val_predict(ridge, rows, y, groups=groups, cv=GroupKFold(FOLDS))
    return ClusterBootstrap(list(groups), bootstrap, seed).r2(y, predicted)


MEASURE = Measure(measure)
