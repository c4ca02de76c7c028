"""Pure loss functions, usable from any training loop."""

from trimtab.losses.axis_floor import (
    FloorTerms,
    axis_anchor_terms,
    axis_floor_loss,
    axis_floor_terms,
    hinge,
    projections,
)
from trimtab.losses.kl import kl_terms

__all__ = ["FloorTerms", "axis_anchor_terms", "axis_floor_loss", "axis_floor_terms", "hinge", "kl_terms", "projections"]
