"""Re-routing: did the persona leave, or only the direction along which one looks?

Two questions beside the re-extracted axis. Can in-character text still be read from the tuned model's activations, by a linear
probe fitted anew on them? And along which of the persona components (PCA of the role vectors) did the tuning move the answers?

Shapes: n answers, D hidden size, R roles.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from sklearn.decomposition import PCA
from sklearn.linear_model import LogisticRegression
from sklearn.model_selection import StratifiedGroupKFold, cross_val_predict
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from torch import Tensor

from trimtab.axis import Axis
from trimtab.eval.intervals import ClusterBootstrap
from trimtab.eval.schema import Component, Estimate

FOLDS = 5
COMPONENTS = 10


def probe_auc(
    means: Tensor,
    in_role: Sequence[bool],
    questions: Sequence[str],
    clusters: Sequence[str],
    *,
    bootstrap: int,
    seed: int,
) -> Estimate | None:
    """AUC of a linear probe that tells in-character answers from the default Assistant's, on questions it was not fitted to.

    L2-regularised logistic regression on standardised means, cross-validated over whole questions, which both classes answer:
    a topic that stands in the fitted part on one side only would be taken for the persona. None where the classes share fewer
    than two questions.

    Args:
        means: mean activation of each answer at one layer, [n, D]; NaN rows (empty answers) are left out.
        in_role: whether each answer was given under a role.
        questions: what each answer is to.
        clusters: of the bootstrap, such as the role of each answer.
        bootstrap: bootstrap samples.
        seed: of folds and bootstrap.
    """
    finite = torch.isfinite(means).all(1).numpy()
    rows = means.double().numpy()[finite]
    labels, groups = np.asarray(in_role)[finite], np.asarray(questions)[finite]
    fewest = len(set(groups[labels]) & set(groups[~labels])) if len(labels) else 0
    if fewest < 2:
        return None
    folds = StratifiedGroupKFold(min(FOLDS, fewest), shuffle=True, random_state=seed)
    probe = make_pipeline(StandardScaler(), LogisticRegression(max_iter=2000))
    predicted: Any = cross_val_predict(probe, rows, labels, groups=groups, cv=folds, method="predict_proba")
    resample = ClusterBootstrap(list(np.asarray(clusters)[finite]), bootstrap, seed)
    return resample.auc(predicted[:, 1], labels)


def components(
    axis: Axis,
    layer: int,
    at_layer: Mapping[str, Tensor],
    default: Tensor,
    clusters: Sequence[str],
    *,
    bootstrap: int,
    seed: int,
) -> list[Component]:
    """How far the cap and the tuning move answers along each persona component, in sigma of the base's answers.

    Args:
        axis: with role vectors; without, there are no components.
        layer: decoder layer of the means.
        at_layer: arm -> mean activations of its answers under roles, [n, D]; ``base``, ``base+cap`` and ``tuned`` are used.
        default: mean activations of the base's default answers, [m, D]; each component points to their side.
        clusters: role of each answer.
        bootstrap: bootstrap samples over clusters.
        seed: of the bootstrap.
    """
    if axis.role_vectors is None or len(axis.role_vectors) < 3:
        return []
    fitted: Any = PCA(n_components=min(COMPONENTS, len(axis.role_vectors) - 1), svd_solver="full")
    fitted.fit(axis.role_vectors[:, layer].double().numpy())
    toward = np.nanmean(default.double().numpy(), 0) - np.nanmean(at_layer["base"].double().numpy(), 0)
    direction = axis.directions[layer].double().numpy()
    pooled = np.concatenate([at_layer["base"].double().numpy(), default.double().numpy()])
    resample = ClusterBootstrap(clusters, bootstrap, seed)
    found = []
    for number, row in enumerate(fitted.components_, start=1):
        vector = row if row @ toward >= 0 else -row
        sigma = float(np.nanstd(pooled @ vector))
        base, capped, tuned = (at_layer[arm].double().numpy() @ vector / sigma for arm in ("base", "base+cap", "tuned"))
        effects = [resample.estimate_if_any(values - base) for values in (capped, tuned)]
        if effects[0] is not None and effects[1] is not None:
            found.append(
                Component(
                    number=number,
                    variance=round(float(fitted.explained_variance_ratio_[number - 1]), 4),
                    cosine_axis=round(float(vector @ direction), 4),
                    cap_effect=effects[0],
                    tuned_effect=effects[1],
                )
            )
    return found
