"""The one exception for faults of the user's input, and what exceptions of the system and of libraries are such faults.

The command line turns a :class:`UserError` into exit code 2 and prints it without a traceback; any other exception is
ours and exits 1. A full disk, a folder that may not be written to, a GPU that is too small are no faults of ours:
:func:`known_fault` knows them.
"""

from __future__ import annotations

import errno
import os
import re
import sys
import textwrap
from pathlib import Path


class UserError(ValueError):
    """A fault in what the user gave, with the place and the remedy.

    Args:
        fault: what is wrong, in one sentence.
        remedy: what to do about it.
        file: the file at fault, if one is.
        key: the key, field or option at fault, if one is.
    """

    def __init__(self, fault: str, *, remedy: str, file: str | Path | None = None, key: str | None = None) -> None:
        self.fault = fault
        self.remedy = remedy
        self.file = str(file) if file is not None else None
        self.key = key
        place = ": ".join(part for part in (self.file, key) if part)
        super().__init__(f"{place}: {fault}\n  remedy: {remedy}" if place else f"{fault}\n  remedy: {remedy}")


def one_line(error: BaseException) -> str:
    """What an error of a library says, in one line of a bearable length; its kind where it says nothing."""
    return textwrap.shorten(str(error), 240, placeholder=" ...") or type(error).__name__


_RERUN = "then run the same command again: finished stages are kept and resumed"
# errno -> what is wrong, and what to do.
_SYSTEM = {
    **dict.fromkeys(
        (errno.ENOSPC, errno.EDQUOT),
        (
            "the disk is full; nothing half-written was left behind",
            "free some space and run the same command again: finished stages are kept and resumed",
        ),
    ),
    errno.EROFS: ("this file system is read-only", "name a folder that may be written to, such as --output-dir DIR"),
    **dict.fromkeys(
        (errno.EACCES, errno.EPERM),
        ("this process may not read or write it", "give yourself the right, or name another place (--output-dir DIR)"),
    ),
    errno.ENOENT: (
        "no such file or folder",
        "check the path; what a stage made is made again once its record in stages/ is deleted",
    ),
    errno.ENOTDIR: ("a part of this path is a file, not a folder", "name another place, or move that file away"),
    errno.EISDIR: ("this is a folder, and a file is wanted", "name a file"),
    **dict.fromkeys(
        (errno.EEXIST, errno.ENOTEMPTY), ("something else lies there already", "name another place, or move it away")
    ),
    **dict.fromkeys(
        (errno.ENAMETOOLONG, errno.ELOOP, errno.EINVAL), ("this path can't be used", "name another, shorter one")
    ),
    **dict.fromkeys(
        (errno.EMFILE, errno.ENFILE), ("too many files are open", f"raise the limit (ulimit -n 4096), {_RERUN}")
    ),
    errno.EFBIG: (
        "this file may not grow any further: a limit of the system forbids it",
        f"raise it (ulimit -f), {_RERUN}",
    ),
    errno.ENOMEM: ("the memory of this machine is full", f"end other programs, or take a smaller model, {_RERUN}"),
    errno.EIO: ("the disk could not be read or written", f"look at the disk, {_RERUN}"),
}
# errno of what lies between processes of ours, or of a pipe whose reader has gone.
_OURS = (errno.EPIPE, errno.EINTR, errno.EAGAIN, errno.ECHILD, errno.ESRCH, errno.EBADF)
_MEMORY = (
    "take smaller batches (train.per_device_train_batch_size, axis.sampling.batch_size, method.sampling.batch_size)"
)


def disk_full(path: str | Path) -> UserError:
    """The error for a full disk at ``path``; nothing that was written before is lost."""
    return system_fault(errno.ENOSPC, path)


def system_fault(number: int, path: str | Path | None) -> UserError:
    """The error for an ``errno`` of the system at ``path``."""
    fault, remedy = _SYSTEM.get(number, (os.strerror(number), "see to it, " + _RERUN))
    return UserError(fault, remedy=remedy, file=path)


# Extras of trimtab -> the modules that each brings.
EXTRAS = {
    "train": (
        "transformers", "peft", "trl", "accelerate", "datasets", "pydantic", "yaml", "rich", "plotly", "jinja2", "scipy",
        "sklearn", "statsmodels", "gguf", "py3langid",
    ),
    "deepspeed": ("deepspeed", "ninja"),
    "vllm": ("vllm",),
    "eval": ("lm_eval",),
    "judge": ("openai", "httpx2", "tenacity"),
    "qlora": ("bitsandbytes",),
    "chat": ("gradio",),
    "inspect": ("inspect_ai",),
}  # fmt: skip


def not_installed(package: str) -> UserError:
    """The fault that a package is missing; the remedy names the extra that brings it."""
    extra = next((extra for extra, brought in EXTRAS.items() if package in brought), None)
    wanted = package if extra is None else f"'trimtab[{extra}]'"
    return UserError(f"the package {package} is not installed", remedy=f"pip install {wanted}")


def known_fault(error: BaseException) -> UserError | None:
    """The user's fault that an exception of the system or of a library is, or was raised from; None where it is none.

    The disk, rights and paths; memory, of the machine and of a GPU; the network; a package that is missing.
    """
    seen: set[int] = set()
    each: BaseException | None = error
    while each is not None and id(each) not in seen:
        seen.add(id(each))
        if (found := _known(each)) is not None:
            return found
        each = each.__cause__
    return None


def _known(error: BaseException) -> UserError | None:
    if isinstance(error, UserError):
        return error
    said = str(error)
    if isinstance(error, ModuleNotFoundError) and error.name and not error.name.startswith("trimtab"):
        package = error.name.partition(".")[0]
        if package != error.name and package in sys.modules:
            return UserError(
                f"the installed {package} has no {error.name}: it is older than this part of trimtab needs",
                remedy="pip install 'trimtab[train]' in an environment of its own: another trainer here may pin the older one",
            )
        return not_installed(package)
    if isinstance(error, OSError):
        return _of_system(error)
    if "embedded null" in said or isinstance(error, UnicodeEncodeError):
        return UserError(f"a name or text that can't be used: {said}", remedy="write it with plain characters")
    # Rust's and torch's libraries give the number within the text, or none
    if (found := re.search(r"os error (\d+)", said)) is not None:
        return system_fault(int(found[1]), None)
    if "No space left" in said:
        return system_fault(errno.ENOSPC, None)
    if (
        type(error).__name__ in ("OutOfMemoryError", "MemoryError")
        or "out of memory" in said
        or "can't allocate memory" in said
    ):
        gpu = "CUDA" in said or "GPU" in said
        return UserError(
            f"the memory of {'the GPU' if gpu else 'this machine'} is full",
            remedy=f"{_MEMORY}, or a larger {'GPU' if gpu else 'machine'}; `trimtab check` tells what is needed",
        )
    return None


def _of_system(error: OSError) -> UserError | None:
    if error.errno in _OURS:
        return None
    if error.errno is not None:
        return system_fault(error.errno, error.filename)
    # of a hub's client
    return UserError(one_line(error), remedy="check the name and the network (HF_TOKEN for gated models), " + _RERUN)
