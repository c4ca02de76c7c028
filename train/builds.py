"""What DeepSpeed compiles at its first use, and the lock that a killed build leaves behind.

torch guards the folder of such a build by a file named ``lock``. While it is there every later job waits, for ever and without
a word, and a build that was killed never takes it away.
"""

from __future__ import annotations

import contextlib
import logging
import os
import time
from pathlib import Path

log = logging.getLogger("trimtab")

PATIENCE = 10  # minutes; another machine may be building where the home folder is shared, and a build takes a few


def drop_stale_locks(*, minutes: float = PATIENCE) -> list[Path]:
    """Remove the locks of builds that no process of this machine works on; returns those removed.

    Args:
        minutes: how old a lock must be. A younger one that nobody here holds is only named.
    """
    gone = []
    held = _open_files()
    for lock in _locks():
        with contextlib.suppress(OSError):  # its owner may remove it meanwhile
            if str(lock) in held:
                continue
            age = (time.time() - lock.stat().st_mtime) / 60
            if age < minutes:
                log.warning("another machine may be compiling: this job waits for %s; delete it if none is", lock)
                continue
            lock.unlink()
            log.warning("removed %s: a build that was killed left it, and every job would wait for it", lock)
            gone.append(lock)
    return gone


def _locks() -> list[Path]:
    """Locks in the folders where torch builds: below the folder of this Python and device, or right below the user's own."""
    from torch.utils.cpp_extension import get_default_build_root

    root = Path(os.environ.get("TORCH_EXTENSIONS_DIR") or get_default_build_root()).resolve()
    return sorted([*root.glob("*/lock"), *root.glob("*/*/lock")])


def _open_files() -> set[str]:
    """Every file that a process of ours holds open, where the system tells (Linux)."""
    found = set()
    for link in Path("/proc").glob("[0-9]*/fd/*"):
        with contextlib.suppress(OSError):  # of another user, or ended
            found.add(os.readlink(link))
    return found
