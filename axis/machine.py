"""The machine that figures were made on, for reports and benchmarks."""

from __future__ import annotations

import os
import platform
from pathlib import Path
from typing import Any

import torch


def machine_facts() -> dict[str, Any]:
    """Processor, cores, threads, GPUs and system, as a reader needs them to judge a figure."""
    gpus = [torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count())]
    return {
        "cpu": _processor(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "gpus": gpus,
        **({"cuda": torch.version.cuda} if gpus else {}),
        "system": f"{platform.system()} {platform.release()}",
    }


def cpu_flags() -> frozenset[str]:
    """Instruction sets of the processor as Linux names them; empty elsewhere."""
    return frozenset((_listing("flags") or "").split())


def _processor() -> str:
    return _listing("model name") or platform.processor() or platform.machine()


def _listing(key: str) -> str | None:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return None
    return next((line.split(":", 1)[1].strip() for line in lines if line.startswith(key)), None)
