"""The floor penalty in Axolotl: a plugin, named in its configuration as ``plugins: [axolotl_plugin.FloorPlugin]``.

The floor's file is named in the environment: FLOOR=runs/demo/floor.safetensors. Not tried: Axolotl wants a GPU.
"""

from __future__ import annotations

import os
from typing import Any

from axolotl.integrations.base import BasePlugin

from trimtab import FloorCallback


class FloorPlugin(BasePlugin):  # type: ignore[misc]
    """Adds the callback to whatever trainer Axolotl makes."""

    def add_callbacks_post_trainer(self, cfg: Any, trainer: Any) -> list[Any]:
        """The callback."""
        return [FloorCallback(os.environ["FLOOR"], weight=0.7)]
