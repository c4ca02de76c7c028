"""How far the user's message alone foretells where the answer will lie on the axis.

Ridge regression of an answer's z on an embedding of the message before it, cross-validated over whole conversations. Lu et al.
(2026) find R2 of 0.53 to 0.77 for models of 27B to 70B with a text-embedding model; here the embedding is the base model's own
mean activation over the message, so that no further model is needed, and the figures don't compare with theirs.

Shapes: n answers, D hidden size.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from sklearn.linear_model import RidgeCV
from sklearn.model_selection import GroupKFold, cross_val_predict
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from torch import Tensor

from trimtab.eval.intervals import ClusterBootstrap
from trimtab.eval.schema import Estimate

FOLDS = 5
FEWEST = 8  # conversations: with fewer the figure is noise
ALPHAS = np.logspace(0, 6, 13)


def position_r2(
    embeddings: Tensor, z: Sequence[float], conversations: Sequence[str], *, bootstrap: int, seed: int
) -> Estimate | None:
    """R2 of z from the messages' embeddings on conversations that the regression was not fitted to; None with too few.

    1 - (squared errors) / (squared distances from the mean z); below 0 the message says less than the mean does.

    Args:
        embeddings: of the user's messages, [n, D].
        z: position of each answer; NaN (an empty answer) is left out.
        conversations: of each answer: the folds, and what the bootstrap resamples.
        bootstrap: bootstrap samples.
        seed: of the bootstrap.
    """
    found = np.asarray(z, dtype=float)
    kept = np.isfinite(found)
    rows, y, groups = embeddings.double().numpy()[kept], found[kept], np.asarray(conversations)[kept]
    if len(set(groups)) < FEWEST:
        return None
    ridge = make_pipeline(StandardScaler(), RidgeCV(alphas=ALPHAS))
    predicted: Any = cross_val_predict(ridge, rows, y, groups=groups, cv=GroupKFold(FOLDS))
    return ClusterBootstrap(list(groups), bootstrap, seed).r2(y, predicted)
