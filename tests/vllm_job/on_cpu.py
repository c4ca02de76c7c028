"""Runs an entry script with a colocated vLLM on a CPU: ``python on_cpu.py train/grpo.py --config ...``.

vLLM's CPU backend packs each linear weight for its own kernels and throws the weight away, so that TRL can't send it another.
Here its plain fallback is taken, which keeps the weights as they are on a GPU. Nothing else differs.
"""

from __future__ import annotations

import runpy
import sys


def keep_weights() -> None:
    """Have vLLM's linear layers keep their weights."""
    from vllm import _custom_ops
    from vllm.model_executor.layers import utils

    _custom_ops._supports_onednn = False
    utils.check_cpu_sgl_kernel = lambda *_: False


if __name__ == "__main__":
    keep_weights()
    sys.argv = sys.argv[1:]
    runpy.run_path(sys.argv[0], run_name="__main__")
