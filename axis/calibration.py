"""Calibrate the floor: which layers, how high, and proof that it fires.

tau is a percentile of pooled response-mean projections **on the + axis**. The published "25th percentile" is stated on the
negated axis and is the 75th here; the 25th on the + axis gives an inert cap. Therefore the firing fraction on drift text is
measured and gated.

Shapes: P responses of the pool, N decoder layers, L floor layers, B batch, T tokens.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor

from trimtab.axis.chat import ChatFormat
from trimtab.axis.directions import Axis, Floor, check_fits
from trimtab.axis.errors import UserError
from trimtab.axis.hooks import ActivationController, CapCounter, project
from trimtab.axis.models import Loaded
from trimtab.axis.progress import track
from trimtab.axis.sampling import batches_by_length, pad_left

log = logging.getLogger("trimtab")

# Best windows of the paper, by model family and depth (last layer included).
PUBLISHED_WINDOWS = {("qwen3", 64): (46, 53), ("llama", 80): (56, 71)}
MIN_FIRING = 0.15


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
    """
    controller = ActivationController.of(loaded.model)
    device = next(loaded.model.parameters()).device
    heads = [form.prompt_ids(row["prompt"]) for row in rows]
    tails = [form.answer_ids(row["completion"][0]["content"]) for row in rows]
    found = {name: torch.full((len(rows), len(layers)), float("nan")) for name in axis_directions}
    order = batches_by_length([len(h) + len(t) for h, t in zip(heads, tails, strict=True)], batch_size)
    fired = seen = 0.0
    pad: Any = loaded.tokenizer.pad_token_id
    training = loaded.model.training
    loaded.model.eval()
    try:
        for batch in track(order, title):
            ids, attention = pad_left([heads[i] + tails[i] for i in batch], pad, device)
            answer = torch.zeros_like(attention, dtype=torch.bool)
            for row, i in enumerate(batch):
                if tails[i]:
                    answer[row, ids.shape[1] - len(tails[i]) :] = True

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
            fired, seen = fired + counter.fired, seen + counter.seen
    finally:
        controller.count_tokens(None)
        loaded.model.train(training)
    return found, fired / seen if seen else 0.0


def spread(rows: Sequence[Mapping[str, Any]], count: int) -> list[Mapping[str, Any]]:
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
    allow_inert: bool = False,
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
        min_firing: least firing fraction.
        allow_inert: take a floor that fires less.
        batch_size: rows a forward.

    Raises:
        UserError: if the axis or the layers don't fit the model, the pool is empty, or the floor hardly fires.
    """
    controller = ActivationController.of(loaded.model)
    check_fits(controller.n_layers, controller.hidden_size, axis=axis)
    config = loaded.model.config.get_text_config()
    if layers is not None and not layers:
        raise UserError("floor.layers is empty", key="floor.layers", remedy="name layers, or leave floor.layers out")
    chosen = layers if layers is not None else window_by_rule(config.model_type, controller.n_layers)
    window = tuple(sorted(set(chosen)))
    if max(window) >= controller.n_layers or min(window) < 0:
        raise UserError(
            f"layers {list(window)} are not all in the model, whose layers are 0 to {controller.n_layers - 1}",
            key="floor.layers",
            remedy=f"choose layers below {controller.n_layers}, or leave floor.layers out",
        )
    usable = [row for row in pool if row["completion"][0]["content"].strip()]
    if len(usable) < 8:
        raise UserError(
            f"{len(usable)} non-empty answers to calibrate on; 8 are the least",
            key="floor.pool",
            remedy="sample more rollouts in the axis section",
        )
    directions = axis.directions[list(window)]
    found, _ = response_projections(
        loaded, form, usable, {"axis": directions}, window, batch_size=batch_size, title="calibration"
    )
    projections = found["axis"]
    tau = torch.quantile(projections, percentile / 100, dim=0)
    floor = Floor(window, directions, tau, projections.std(0), {
        "model": loaded.facts["model"],
        "revision": loaded.facts["revision"],
        "percentile": percentile,
        "pool": len(usable),
        "statistic": "response-mean projections on the + axis, roles and default pooled",
    })  # fmt: skip
    _, firing = response_projections(
        loaded, form, drift, {"axis": directions}, window, batch_size=batch_size, floor=floor, title="firing fraction"
    )
    log.info("floor: layers %d-%d, firing fraction %.2f on drift text", window[0], window[-1], firing)
    if firing < min_firing and not allow_inert:
        raise UserError(
            f"the cap fires on {firing:.1%} of drift token-layer slots; below {min_firing:.0%} it does next to nothing",
            key="floor.percentile",
            remedy="raise floor.percentile (75 on the + axis is the published cap; 25 is inert), check the axis, "
            "or set floor.allow_inert: true to go on all the same",
        )
    return Floor(floor.layers, floor.directions, floor.tau, floor.sigma, {
        **floor.metadata, "firing_fraction": round(firing, 4), "drift_rows": len(drift), "inert_allowed": allow_inert,
    })  # fmt: skip


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
    usable = [row for row in pool if row["completion"][0]["content"].strip()]
    found, _ = response_projections(
        loaded, form, usable, {"random": random}, floor.layers, batch_size=batch_size, title="control floor"
    )
    projections = found["random"]
    tau = torch.quantile(projections, float(floor.metadata["percentile"]) / 100, dim=0)
    return floor.replace_directions(random, tau, projections.std(0), direction=f"random, seed {seed}")
