"""Bakes activation capping along the Assistant Axis into fine-tuning, and measures what survives without the hooks.

The names below need torch and safetensors alone, whatever trainer stands beside them; the recipes, the trainers and the
evaluation need ``pip install 'trimtab[train]'``. Names are loaded at their first use, so importing this imports no torch.
"""

import os
from typing import TYPE_CHECKING

# In a checkout the folders of the package lie beside this one: Python finds this one first where it is started there.
if not os.path.isdir(os.path.join(os.path.dirname(__file__), "axis")):
    __path__.append(os.path.dirname(os.path.dirname(os.path.abspath(__file__))))

from trimtab.axis.lazy import lazy_names

if TYPE_CHECKING:
    from trimtab.axis.directions import Axis, Floor
    from trimtab.axis.errors import UserError
    from trimtab.axis.hooks import ActivationController, cap, project
    from trimtab.axis.instruments import load_axis, load_floor
    from trimtab.losses.axis_floor import axis_floor_loss
    from trimtab.losses.callback import FloorCallback
    from trimtab.losses.injection import floor_gradients

__version__ = "0.1.0"

_HOME = {
    "ActivationController": "axis.hooks",
    "Axis": "axis.directions",
    "Floor": "axis.directions",
    "FloorCallback": "losses.callback",
    "UserError": "axis.errors",
    "axis_floor_loss": "losses.axis_floor",
    "cap": "axis.hooks",
    "floor_gradients": "losses.injection",
    "load_axis": "axis.instruments",
    "load_floor": "axis.instruments",
    "project": "axis.hooks",
}

__all__ = [
    "ActivationController",
    "Axis",
    "Floor",
    "FloorCallback",
    "UserError",
    "__version__",
    "axis_floor_loss",
    "cap",
    "floor_gradients",
    "load_axis",
    "load_floor",
    "project",
]


__getattr__ = lazy_names(__name__, _HOME)


def __dir__() -> list[str]:
    return __all__
