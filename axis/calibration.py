"""Calibrate the floor: which layers, how high, and proof that it fires.

tau is a percentile of pooled response-mean projections **on the + axis**. The published "25th percentile" is stated on the
negated axis and is the 75th here; the 25th on the + axis gives an inert cap. Therefore the firing fraction on drift text is
measured and gated, of every floor, wherever it comes from: :func:`gate`.

Shapes: P responses of the pool, N decoder layers, L floor layers, B batch, T tokens.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor

from trimtab.axis.chat_format import ChatFormat
from trimtab.axis.directions import MIN_FIRING, Axis, Floor, check_fits
from trimtab.axis.errors import UserError
from trimtab.axis.given import Given
from trimtab.axis.hooks import ActivationController, CapCounter, project
from trimtab.axis.layers import text_config_of
from trimtab.axis.models import Loaded
from trimtab.axis.sampling import pad_left
from trimtab.axis.soundness import not_finite

log = logging.getLogger("trimtab")

# Best windows of the paper, by model family and depth (last layer included).
PUBLISHED_WINDOWS = {("qwen3", 64): (46, 53), ("llama", 80): (56, 71)}
LEAST_POOL = 8  # answers, below which a percentile says nothing


def window_by_rule(model_type: str, n_layers: int) -> tuple[int, ...]:
    """The floor's layers: the paper's window for its own models, else the band from 70 % to 90 % of the depth.

    Both published windows lie in that band: Qwen3 32B layers 46-53 of 64, Llama 3.3 70B layers 56-71 of 80.
    """
    if (published := PUBLISHED_WINDOWS.get((model_type, n_layers))) is not None:
        first, last = published
    else:
        first = min(round(0.7 * n_layers), n_layers - 1)
        last = max(round(0.9 * n_layers) - 1, first)
    return tuple(range(first, last + 1))


@torch.no_grad()
def response_projections(
    loaded: Loaded,
    form: ChatFormat,
    rows: Sequence[Mapping[str, Any]],
    axis_directions: Mapping[str, Tensor],
    layers: Sequence[int],
    *,
    batch_size: int = 16,
    floor: Floor | None = None,
    title: str = "projections",
) -> tuple[dict[str, Tensor], float]:
    """Response-mean projections of stored answers, by a forward over prompt and answer.

    Args:
        loaded: model and tokenizer.
        form: chat format.
        rows: with ``prompt`` and ``completion`` as messages.
        axis_directions: name -> directions [L, D], one a layer of ``layers``.
        layers: decoder layers to read.
        batch_size: rows a forward.
        floor: cap to this floor meanwhile and count how often it fires on answer tokens; None leaves the model alone.
        title: label of the progress bar.

    Returns:
        name -> projections [P, L] (NaN rows for empty answers), and the firing fraction (0 without a floor).

    Raises:
        UserError: at the first batch whose activations are not finite.
    """
    controller = ActivationController.of(loaded.model)
    device = next(loaded.model.parameters()).device
    given = Given.of(form, [row["prompt"] for row in rows], [row["completion"][0]["content"] for row in rows])
    found = {name: torch.full((len(rows), len(layers)), float("nan")) for name in axis_directions}
    fired = seen = 0.0
    pad: Any = loaded.tokenizer.pad_token_id
    training = loaded.model.training
    loaded.model.eval()
    try:
        for batch in given.batches(batch_size, title):
            ids, attention = pad_left(given.rows(batch), pad, device)
            answer = torch.zeros_like(attention, dtype=torch.bool)
            for row, count in enumerate(given.counts(batch)):
                answer[row, -count:] = True

            def read(layer: int, hidden: Tensor, batch: list[int] = batch, answer: Tensor = answer) -> None:
                position = list(layers).index(layer)
                for name, directions in axis_directions.items():
                    p = project(hidden, directions[position])
                    mean = p.masked_fill(~answer.to(p.device), 0).sum(1) / answer.to(p.device).sum(1)
                    found[name][batch, position] = mean.cpu()

            controller.count_tokens(answer)
            capped = nullcontext(CapCounter()) if floor is None else controller.capping(floor, count=True)
            with controller.reading(layers, read), capped as counter:
                loaded.model(input_ids=ids, attention_mask=attention, logits_to_keep=1)
            if not all(torch.isfinite(values[batch]).all() for values in found.values()):
                raise not_finite(loaded.model, ids, attention)
            fired, seen = fired + counter.fired, seen + counter.seen
    finally:
        controller.count_tokens(None)
        loaded.model.train(training)
    return found, fired / seen if seen else 0.0


def evenly_chosen(rows: Sequence[Mapping[str, Any]], count: int) -> list[Mapping[str, Any]]:
    """About ``count`` rows taken evenly over the list."""
    if len(rows) <= count:
        return list(rows)
    return [rows[i * len(rows) // count] for i in range(count)]


def calibrate(
    loaded: Loaded,
    form: ChatFormat,
    axis: Axis,
    pool: Sequence[Mapping[str, Any]],
    drift: Sequence[Mapping[str, Any]],
    *,
    layers: Sequence[int] | None = None,
    percentile: float = 75.0,
    min_firing: float = MIN_FIRING,
    batch_size: int = 16,
) -> Floor:
    """Calibrate a floor on stored rollouts.

    Args:
        loaded: model and tokenizer.
        form: chat format.
        axis: the axis.
        pool: role and default rollouts, whose response-mean projections give tau and sigma.
        drift: drift rollouts, on whose answer tokens the firing fraction is measured.
        layers: floor layers; None chooses them by :func:`window_by_rule`.
        percentile: of the pool, on the + axis; 75 is the published cap.
        min_firing: least firing fraction; 0 takes any floor.
        batch_size: rows a forward.

    Raises:
        UserError: if the axis or the layers don't fit the model, the pool is empty, or the floor hardly fires.
    """
    controller = ActivationController.of(loaded.model)
    check_fits(controller.n_layers, controller.hidden_size, axis=axis)
    chosen = window_by_rule(text_config_of(loaded.model).model_type, controller.n_layers) if layers is None else layers
    window = tuple(sorted(set(chosen)))
    check_window(window, controller.n_layers)
    usable = _usable(pool)
    directions = axis.directions[list(window)]
    found, _ = response_projections(
        loaded, form, usable, {"axis": directions}, window, batch_size=batch_size, title="calibration"
    )
    projections = found["axis"]
    tau = torch.quantile(projections, percentile / 100, dim=0)
    floor = Floor(window, directions, tau, _spread_of(projections, window), {
        "model": loaded.facts["model"],
        "revision": loaded.facts["revision"],
        "percentile": percentile,
        "pool": len(usable),
        "statistic": "response-mean projections on the + axis, roles and default pooled",
    })  # fmt: skip
    return gate(loaded, form, floor, drift, min_firing=min_firing, batch_size=batch_size)


def check_window(window: Sequence[int], n_layers: int) -> None:
    """Check the layers that a recipe names for the floor.

    Raises:
        UserError: if there are none, or one that the model hasn't.
    """
    if not window:
        raise UserError("floor.layers is empty", key="floor.layers", remedy="name layers, or leave floor.layers out")
    if outside := [layer for layer in window if not 0 <= layer < n_layers]:
        raise UserError(
            f"floor layer {outside[0]} is beyond the model, whose layers are 0 to {n_layers - 1}",
            key="floor.layers",
            remedy=f"choose layers below {n_layers}, or leave floor.layers out",
        )


def _usable(pool: Sequence[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
    """The pool's rows whose answer is not empty."""
    usable = [row for row in pool if row["completion"][0]["content"].strip()]
    if len(usable) < LEAST_POOL:
        raise UserError(
            f"{len(usable)} non-empty answers to calibrate on; {LEAST_POOL} are the least",
            key="floor.pool",
            remedy="sample more rollouts in the axis section",
        )
    return usable


def _spread_of(projections: Tensor, layers: Sequence[int]) -> Tensor:
    """Standard deviation of projections [P, L] over the pool, [L]."""
    sigma = projections.std(0)
    if same := [layer for layer, value in zip(layers, sigma.tolist(), strict=True) if value <= 0]:
        raise UserError(
            f"all answers of the pool project alike at layer {same[0]}: there is nothing to calibrate on",
            key="floor.pool",
            remedy="see the rollouts: the answers may all be the same; sample them at a temperature above 0",
        )
    return sigma


def gate(
    loaded: Loaded,
    form: ChatFormat,
    floor: Floor,
    drift: Sequence[Mapping[str, Any]],
    *,
    min_firing: float = MIN_FIRING,
    batch_size: int = 16,
    file: str | None = None,
) -> Floor:
    """Measure how often a floor fires, and refuse one that hardly does; every floor passes here, whatever made it.

    Args:
        loaded: model and tokenizer.
        form: chat format.
        floor: the floor.
        drift: drift rollouts, on whose answer tokens the firing fraction is measured.
        min_firing: least firing fraction; 0 takes any floor.
        batch_size: rows a forward.
        file: the file that the floor came from, for one that was not calibrated here.

    Returns:
        The floor with ``firing_fraction`` and ``drift_rows`` in its metadata.

    Raises:
        UserError: if it fires on less than ``min_firing`` of the (token, layer) slots, or there is no drift text.
    """
    told = [row for row in drift if row["completion"][0]["content"].strip()]
    if not told:
        raise UserError(
            "no drift answer has any text, so that how often the floor fires can't be measured",
            key="floor.drift_rows",
            remedy="see the rollouts: the model may end its answers at once; sample more in the axis section",
        )
    directions = {"axis": floor.directions}
    _, firing = response_projections(
        loaded, form, told, directions, floor.layers, batch_size=batch_size, floor=floor, title="firing fraction"
    )
    log.info("floor: layers %d-%d, firing fraction %.2f on drift text", floor.layers[0], floor.layers[-1], firing)
    if firing < min_firing:
        raise UserError(
            f"the cap fires on {firing:.1%} of drift token-layer slots; below {min_firing:.0%} it does next to nothing",
            file=file,
            key="floor.percentile" if file is None else "floor.path",
            remedy=(
                "raise floor.percentile (75 on the + axis is the published cap; 25 is inert), check the axis, "
                if file is None
                else "use the floor of this very model (mind its sign, + is Assistant), remove floor.path to calibrate one, "
            )
            + "or set floor.min_firing=0 to go on all the same",
        )
    return Floor(floor.layers, floor.directions, floor.tau, floor.sigma, {
        **floor.metadata, "firing_fraction": round(firing, 4), "drift_rows": len(told),
    })  # fmt: skip


def completed(
    loaded: Loaded, form: ChatFormat, floor: Floor, pool: Sequence[Mapping[str, Any]], *, batch_size: int = 16
) -> Floor:
    """A floor from a file with what it lacks measured on the pool: sigma, and the percentile at which tau lies.

    A published cap has neither, and a floor that was made by hand may lack the percentile, which the control needs.
    """
    told = floor.metadata.get("percentile")
    if floor.has_sigma and isinstance(told, int | float) and 0 <= told <= 100:
        return floor
    found, _ = response_projections(
        loaded, form, _usable(pool), {"axis": floor.directions}, floor.layers, batch_size=batch_size, title="sigma"
    )
    values = found["axis"]
    below = 100 * float((values < floor.tau).float().mean())
    sigma = floor.sigma if floor.has_sigma else _spread_of(values, floor.layers)
    metadata = {key: value for key, value in floor.metadata.items() if key != "sigma"} | {"percentile": below}
    return Floor(floor.layers, floor.directions, floor.tau, sigma, metadata)


def control_floor(
    loaded: Loaded,
    form: ChatFormat,
    floor: Floor,
    pool: Sequence[Mapping[str, Any]],
    *,
    seed: int,
    batch_size: int = 16,
) -> Floor:
    """The same floor along random unit directions, calibrated on the same pool to the same percentile: the control."""
    generator = torch.Generator().manual_seed(seed)
    random = torch.nn.functional.normalize(torch.randn(floor.directions.shape, generator=generator), dim=-1)
    found, _ = response_projections(
        loaded, form, _usable(pool), {"random": random}, floor.layers, batch_size=batch_size, title="control floor"
    )
    projections = found["random"]
    tau = torch.quantile(projections, float(floor.metadata["percentile"]) / 100, dim=0)
    sigma = _spread_of(projections, floor.layers)
    return floor.replace_directions(random, tau, sigma, direction=f"random, seed {seed}")
