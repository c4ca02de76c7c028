"""The instrument: the axis, the floor, the hooks, extraction and calibration.

Names are loaded at their first use (PEP 562), so that torch is not imported by those who only need an error class or a path.
"""

from typing import TYPE_CHECKING

from trimtab.axis.lazy import lazy_names

if TYPE_CHECKING:
    from trimtab.axis.directions import Axis, Floor
    from trimtab.axis.errors import UserError
    from trimtab.axis.hooks import ActivationController, Recording, cap, project
    from trimtab.axis.instruments import load_axis, load_floor
    from trimtab.axis.layers import find_decoder_layers
    from trimtab.axis.published import load_capping_config, load_published_axis, load_role_vectors

__all__ = [
    "ActivationController",
    "Axis",
    "Floor",
    "Recording",
    "UserError",
    "cap",
    "find_decoder_layers",
    "load_axis",
    "load_capping_config",
    "load_floor",
    "load_published_axis",
    "load_role_vectors",
    "project",
]

_HOME = {
    "ActivationController": "hooks",
    "Axis": "directions",
    "Floor": "directions",
    "Recording": "hooks",
    "UserError": "errors",
    "cap": "hooks",
    "find_decoder_layers": "layers",
    "load_axis": "instruments",
    "load_capping_config": "published",
    "load_floor": "instruments",
    "load_published_axis": "published",
    "load_role_vectors": "published",
    "project": "hooks",
}


__getattr__ = lazy_names(__name__, _HOME)


def __dir__() -> list[str]:
    return __all__
