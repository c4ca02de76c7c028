"""Pure loss functions, usable from any training loop."""

from trimtab.losses.axis_floor import (
    FloorTerms,
    axis_anchor_terms,
    axis_floor_loss,
    axis_floor_terms,
    hinge,
    projections,
)
from trimtab.losses.divergence import chunked_divergence, divergence_terms
from trimtab.losses.injection import FloorInjection, floor_gradients

__all__ = [
    "FloorInjection",
    "FloorTerms",
    "axis_anchor_terms",
    "axis_floor_loss",
    "axis_floor_terms",
    "chunked_divergence",
    "divergence_terms",
    "floor_gradients",
    "hinge",
    "projections",
]
