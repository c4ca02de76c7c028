"""The floor penalty in ms-swift: a plugin that its command line takes.

swift sft --external_plugins docs/examples/ms_swift.py --callbacks floor --model MODEL --dataset DATA --fp16 false ...

The floor's file is named in the environment: FLOOR=runs/demo/floor.safetensors.
"""

from __future__ import annotations

import os

from swift import callbacks_map

from trimtab import FloorCallback

callbacks_map["floor"] = lambda *_: FloorCallback(os.environ["FLOOR"], weight=0.7)
