"""The floor penalty.

Shapes: B batch, T tokens, D hidden size, L floor layers.

    L = mean_l  sum_{b,t} mask_bt * relu( (target_lbt - <h_lbt, v_l>) / sigma_l + margin )^2  /  n_tokens

with ``target`` either the floor ``tau_l`` (absolute) or the frozen base model's own projection ``p0_lbt`` (base-relative, after
BLOCK-EM, arXiv 2602.00767).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from trimtab.axis import Floor, project


@dataclass(frozen=True)
class FloorTerms:
    """What one forward contributes, still to be divided by the number of tokens of the whole batch.

    Attributes:
        penalty: sum over tokens of the penalty, averaged over layers; scalar float32 with gradient.
        unweighted: the same without ``weights``, detached, for the log.
        tokens: number of masked-in tokens, scalar.
        violations: number of masked-in tokens below the target, per layer, [L].
        z_sum: sum of z = p / sigma over masked-in tokens, per layer, [L].
    """

    penalty: Tensor
    unweighted: Tensor
    tokens: Tensor
    violations: Tensor
    z_sum: Tensor


def hinge(x: Tensor) -> Tensor:
    """One-sided penalty: ``relu(x)^2``."""
    return torch.relu(x).square()


def axis_floor_terms(
    hidden: Mapping[int, Tensor] | Sequence[Tensor],
    floor: Floor,
    mask: Tensor,
    *,
    base_projections: Tensor | None = None,
    margin: float = 0.0,
    weights: Tensor | None = None,
) -> FloorTerms:
    """The floor penalty of raw hidden states, as sums, so that any trainer can normalise as it normalises its own loss.

    Args:
        hidden: decoder-layer outputs [B, T, D] of the floor's layers: a mapping by layer index, or a sequence in floor order.
        floor: window, directions, tau and sigma.
        mask: tokens that count, [B, T], bool or 0/1.
        base_projections: p0 [L, B, T]; replaces tau as the target (base-relative variant).
        margin: keep this many sigma above the target.
        weights: factor of each token's penalty, [B, T], for trainers that weigh rows; None is 1.

    Raises:
        ValueError: if the mask's shape is not that of the hidden states.
    """
    states = [hidden[layer] for layer in floor.layers] if isinstance(hidden, Mapping) else list(hidden)
    if len(states) != len(floor.layers):
        raise ValueError(f"{len(states)} hidden states for {len(floor.layers)} floor layers")
    penalty = states[0].new_zeros((), dtype=torch.float32)
    unweighted = penalty
    violations: list[Tensor] = []
    z_sums: list[Tensor] = []
    for i, state in enumerate(states):
        if state.shape[:-1] != mask.shape:
            raise ValueError(
                f"the mask is {tuple(mask.shape)} but layer {floor.layers[i]} gives {tuple(state.shape[:-1])} tokens; "
                "prompt-learning adapters and sequence parallelism change the length and are not supported"
            )
        left_out = ~mask.to(device=state.device, dtype=torch.bool)
        sigma = float(floor.sigma[i])
        projection = project(state, floor.directions[i])
        target = floor.tau[i].to(state.device) if base_projections is None else base_projections[i].to(state.device)
        # filled, not multiplied by 0: padding may hold NaN or infinity, and 0 * NaN is NaN in value and gradient
        shortfall = ((target - projection) / sigma + margin).masked_fill(left_out, 0.0)
        cost = hinge(shortfall)
        unweighted = unweighted + cost.detach().sum().to(penalty.device)
        if weights is not None:
            cost = cost * weights.to(cost.device)
        penalty = penalty + cost.sum().to(penalty.device)
        violations.append((shortfall.detach() > 0).sum(dtype=torch.float32))
        z_sums.append((projection.detach() / sigma).masked_fill(left_out, 0.0).sum())
    count = len(states)
    return FloorTerms(penalty / count, unweighted / count, mask.sum(), torch.stack(violations), torch.stack(z_sums))


def axis_floor_loss(
    hidden: Mapping[int, Tensor] | Sequence[Tensor],
    floor: Floor,
    mask: Tensor,
    *,
    base_projections: Tensor | None = None,
    margin: float = 0.0,
    n_tokens: float | Tensor | None = None,
) -> Tensor:
    """The floor penalty as a mean, for use in any training loop.

    Args:
        hidden: decoder-layer outputs [B, T, D] of the floor's layers: see :func:`axis_floor_terms`.
        floor: the floor.
        mask: tokens that count, [B, T].
        base_projections: p0 [L, B, T], the target in place of tau.
        margin: sigma above the target.
        n_tokens: divisor; default the number of masked-in tokens of this very batch. With gradient accumulation or several
            ranks give the number over all of them, as the trainer does for its own loss.
    """
    terms = axis_floor_terms(hidden, floor, mask, base_projections=base_projections, margin=margin)
    count = terms.tokens if n_tokens is None else torch.as_tensor(n_tokens)
    return terms.penalty / count.to(terms.penalty.device).clamp(min=1)


def axis_anchor_terms(hidden: Mapping[int, Tensor], base_projections: Tensor, floor: Floor, mask: Tensor) -> Tensor:
    """Two-sided anchor on benign text: sum over tokens of ``((p - p0) / sigma)^2``, averaged over layers.

    The floor alone also lifts the default Assistant, since about three quarters of the pool lie below it. Anchoring benign
    tokens to the frozen base's own projections is what keeps that shift small.

    Args:
        hidden: decoder-layer outputs [B, T, D] by layer index.
        base_projections: p0, [L, B, T].
        floor: directions and sigma.
        mask: tokens that count, [B, T].
    """
    total = base_projections.new_zeros(())
    for i, layer in enumerate(floor.layers):
        moved = (project(hidden[layer], floor.directions[i]) - base_projections[i]) / float(floor.sigma[i])
        total = total + moved.masked_fill(~mask.bool(), 0.0).square().sum()
    return total / len(floor.layers)


def projections(hidden: Mapping[int, Tensor], floor: Floor) -> Tensor:
    """Detached projections of recorded states, [L, B, T] float32."""
    return torch.stack([project(hidden[layer].detach(), floor.directions[i]) for i, layer in enumerate(floor.layers)])
