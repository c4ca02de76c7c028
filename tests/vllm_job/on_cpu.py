"""Runs an entry script with a colocated vLLM on a CPU: ``python on_cpu.py train/grpo.py --config ...``.

vLLM's CPU backend packs weights for its own kernels when they are loaded, and throws the weights away, so that TRL can't send
it others. Here they are kept as they are on a GPU: linear layers take their plain fallback, and experts are packed as they are
used. Nothing else differs.
"""

from __future__ import annotations

import runpy
import sys
from typing import Any


def keep_weights() -> None:
    """Have vLLM's layers keep their weights."""
    from vllm import _custom_ops
    from vllm.model_executor.layers import utils
    from vllm.model_executor.layers.fused_moe.experts import cpu_moe

    _custom_ops._supports_onednn = False
    utils.check_cpu_sgl_kernel = lambda *_: False
    pack, multiply = cpu_moe.cpu_prepack_moe_weight, cpu_moe.cpu_fused_moe

    def packing(output: Any, states: Any, first: Any, second: Any, *others: Any) -> None:
        kind = others[-2]
        multiply(output, states, pack(first, kind), pack(second, kind), *others)

    cpu_moe.cpu_prepack_moe_weight = lambda weight, _: weight
    cpu_moe.cpu_fused_moe = packing


if __name__ == "__main__":
    keep_weights()
    sys.argv = sys.argv[1:]
    runpy.run_path(sys.argv[0], run_name="__main__")
