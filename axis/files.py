"""Files that are written whole or not at all, and files that survive a kill at any byte.

Importing this module does not import torch: the functions for tensors do, when they are called.
"""

from __future__ import annotations

import contextlib
import gzip
import hashlib
import io
import json
import os
import pickle
import re
import tempfile
import zlib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from trimtab.axis.errors import UserError, disk_full, known_fault

if TYPE_CHECKING:
    import torch

TAIL_BYTES = 1 << 16
# What the pipeline calls the default Assistant's own mean, which lies among the roles or one folder above them.
DEFAULT_NAMES = ("default", "default_vector")


@contextlib.contextmanager
def atomic_path(path: str | Path) -> Iterator[Path]:
    """Yield a temporary path beside ``path``; on success it is synced and renamed onto ``path``, else removed.

    Raises:
        UserError: if the disk is full, or the place may not be written to. ``path`` keeps its earlier content.
    """
    path = Path(path)
    with _naming_the_file(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.", suffix=path.suffix)
        os.close(handle)
        temporary = Path(name)
        try:
            yield temporary
            with temporary.open("rb") as written:
                os.fsync(written.fileno())
            temporary.chmod(0o644)
            temporary.replace(path)
        finally:
            temporary.unlink(missing_ok=True)


@contextlib.contextmanager
def _naming_the_file(path: Path) -> Iterator[None]:
    """Turn what the system says of a file into the fault that it is, of the file itself rather than of its temporary name."""
    try:
        yield
    except OSError as error:
        if isinstance(known := known_fault(error), UserError):
            raise UserError(known.fault, remedy=known.remedy, file=path) from error
        raise


def write_text(path: str | Path, text: str) -> None:
    """Write ``text`` to ``path`` whole or not at all."""
    with atomic_path(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def write_json(path: str | Path, value: Any) -> None:
    """Write ``value`` as indented JSON, whole or not at all. NaN is refused: a report must not hold one."""
    write_text(path, json.dumps(value, indent=2, ensure_ascii=False, allow_nan=False) + "\n")


def write_packed_json(path: str | Path, value: Any) -> None:
    """:func:`write_json`, packed by gzip; the same value gives the same bytes."""
    text = json.dumps(value, ensure_ascii=False, allow_nan=False)
    with atomic_path(path) as temporary:
        temporary.write_bytes(gzip.compress(text.encode("utf-8"), mtime=0))


def read_json(path: str | Path) -> Any:
    """Read a JSON file, packed by gzip where its name ends so.

    Raises:
        UserError: if the file is missing or is not JSON.
    """
    if Path(path).exists() and not Path(path).is_file():
        raise UserError("this is no plain file", file=path, remedy="name a JSON file")
    try:
        content = Path(path).read_bytes()
        return json.loads((gzip.decompress(content) if Path(path).suffix == ".gz" else content).decode("utf-8"))
    except FileNotFoundError as error:
        raise UserError("no such file", file=path, remedy="check the path") from error
    except (OSError, EOFError, zlib.error) as error:
        raise UserError(f"not readable: {error}", file=path, remedy="fetch or make the file again") from error
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise UserError(f"not valid JSON: {error}", file=path, remedy="mend or re-create the file") from error


def read_jsonl(path: str | Path) -> list[dict[str, Any]]:
    """Read JSON Lines of our own writing; :mod:`trimtab.axis.rows` reads those of others.

    A last line without a newline is a write cut short by a kill, and is left out.

    Raises:
        UserError: if the file is missing, or any whole line is not a JSON object.
    """
    path = Path(path)
    if not path.exists():
        raise UserError("no such file", file=path, remedy="check the path")
    rows: list[dict[str, Any]] = []
    for number, line in enumerate(path.read_bytes().split(b"\n")[:-1], start=1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except (json.JSONDecodeError, UnicodeDecodeError) as error:
            raise UserError(
                f"line {number} is not JSON: {error}", file=path, remedy="mend or delete that line"
            ) from error
        if not isinstance(row, dict):
            raise UserError(f"line {number} is not a JSON object", file=path, remedy="one object a line is expected")
        rows.append(row)
    return rows


def write_jsonl(path: str | Path, rows: list[dict[str, Any]]) -> None:
    """Write rows as JSON Lines, whole or not at all."""
    write_text(path, "".join(json.dumps(row, ensure_ascii=False, allow_nan=False) + "\n" for row in rows))


def append_jsonl(path: str | Path, rows: list[dict[str, Any]]) -> None:
    """Append rows, all or none; a torn last line left by a kill is cut off first, so the file is always readable.

    Raises:
        UserError: if the disk is full. The file keeps its earlier rows.
    """
    path = Path(path)
    data = "".join(json.dumps(row, ensure_ascii=False, allow_nan=False) + "\n" for row in rows).encode("utf-8")
    with _naming_the_file(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        # unbuffered: a buffer that could not be flushed would be flushed again by truncate and by close
        with path.open("ab+", buffering=0) as file:
            end = _end_of_whole_lines(file)
            file.truncate(end)
            try:
                left = memoryview(data)
                while left:
                    left = left[file.write(left) :]
                os.fsync(file.fileno())
            except OSError:
                with contextlib.suppress(OSError):
                    file.truncate(end)
                raise


def _end_of_whole_lines(file: io.FileIO) -> int:
    """Position after the last newline, found from the end backwards, since these files grow to gigabytes."""
    end = file.seek(0, os.SEEK_END)
    while end:
        start = max(0, end - TAIL_BYTES)
        file.seek(start)
        if (found := file.read(end - start).rfind(b"\n")) >= 0:
            return start + found + 1
        end = start
    return 0


def fingerprint(value: Any) -> str:
    """A short, stable hash of any JSON-able value (16 hexadecimal digits of SHA-256)."""
    text = json.dumps(value, sort_keys=True, ensure_ascii=False, default=str)
    return hashlib.sha256(text.encode("utf-8")).hexdigest()[:16]


def file_fingerprint(path: str | Path) -> str:
    """A short hash of a file's bytes (16 hexadecimal digits of SHA-256)."""
    digest = hashlib.sha256()
    with Path(path).open("rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()[:16]


def save_tensors(path: str | Path, tensors: Mapping[str, torch.Tensor], metadata: Mapping[str, Any]) -> None:
    """Save tensors as safetensors with JSON-encoded metadata values, whole or not at all."""
    from safetensors import SafetensorError
    from safetensors.torch import save_file

    encoded = {key: json.dumps(value) for key, value in metadata.items()}
    contiguous = {key: tensor.detach().cpu().contiguous() for key, tensor in tensors.items()}
    with atomic_path(path) as temporary:
        try:
            save_file(contiguous, str(temporary), metadata=encoded)
        except SafetensorError as error:
            if "No space left" in str(error):
                raise disk_full(path) from error
            raise


def load_tensors(path: str | Path) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
    """Load what :func:`save_tensors` wrote.

    Raises:
        UserError: if the file is missing, not safetensors, or its metadata is not ours.
    """
    from safetensors import SafetensorError, safe_open

    path = Path(path)
    if not path.is_file():
        raise UserError("no such file", file=path, remedy="check the path, or run the stage that writes it")
    try:
        with safe_open(str(path), framework="pt") as file:
            try:
                metadata = {key: json.loads(value) for key, value in (file.metadata() or {}).items()}
            except json.JSONDecodeError as error:
                raise UserError(
                    "this safetensors file is not of trimtab: its metadata is of another kind",
                    file=path,
                    remedy="give the axis.safetensors or the floor.safetensors of a run",
                ) from error
            return {key: file.get_tensor(key) for key in file.keys()}, metadata  # noqa: SIM118 - not a dict
    except SafetensorError as error:
        raise UserError(
            f"not a readable safetensors file of trimtab: {error}",
            file=path,
            remedy="re-create it; it may be cut short",
        ) from error


def vector_files(folder: str | Path) -> list[Path]:
    """The files of a published folder of vectors, and the default Assistant's in the folder above where that is there."""
    folder = Path(folder)
    own = sorted(path for path in folder.glob("*.pt") if not path.name.startswith("."))
    return [*own, *(path for name in DEFAULT_NAMES if (path := folder.parent / f"{name}.pt").is_file())]


def load_torch(path: str | Path) -> Any:
    """Load a ``.pt`` file with ``weights_only=True``: tensors, plain containers and NumPy's numbers, never code.

    Raises:
        UserError: if the file is missing, unreadable, or holds pickled objects other than those; it names their types.
    """
    import torch

    path = Path(path)
    if not path.is_file():
        raise UserError("no such file", file=path, remedy="check the path")
    try:
        with torch.serialization.safe_globals(_NUMPY_NUMBERS):
            content = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        with path.open("rb") as file:
            if file.read(1) not in (b"P", b"\x80"):  # neither a zip archive nor a pickle, so a text or a web page
                raise UserError(
                    "not a readable .pt file: it is neither a torch archive nor a pickle",
                    file=path,
                    remedy="fetch it again; a small text file is what git leaves where Git LFS is not installed",
                ) from error
        named = re.search(r"GLOBAL (\S+)", str(error))
        what = f"objects of {named[1]}" if named else "pickled objects"
        raise UserError(
            f"the file holds {what}, which could run code on loading; trimtab loads tensors, numbers and plain containers only",
            file=path,
            remedy="re-save it as plain tensors and dicts, or as safetensors, where you trust it",
        ) from error
    except (RuntimeError, EOFError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"not a readable .pt file: {error}", file=path, remedy="fetch it again") from error
    if any(tensor.is_meta or tensor.layout != torch.strided for tensor in _tensors(content)):
        raise UserError("a tensor in it is sparse, or has no values", file=path, remedy="re-save it as plain tensors")
    return content


def _tensors(content: Any) -> Iterator[Any]:
    """The tensors in what ``torch.load`` gave, at any depth."""
    if isinstance(content, dict | list | tuple):
        for part in content.values() if isinstance(content, dict) else content:
            yield from _tensors(part)
    elif hasattr(content, "is_meta"):
        yield content


class _NumpyDtype:
    """Stands for ``numpy.dtype`` in a pickle: it takes the names of numbers alone, and calls nothing of NumPy."""

    def __init__(self, name: str, *_: Any) -> None:
        if re.fullmatch(r"[fiu][1248]|b1", name) is None:
            raise ValueError(f"a NumPy {name} in it is no plain number")
        self.name = name

    def __setstate__(self, state: tuple[Any, ...]) -> None:
        self.name = f"{state[1]}{self.name}".replace("|", "")  # the byte order


def _numpy_number(dtype: _NumpyDtype, raw: bytes) -> float | int | bool:
    """Stands for NumPy's constructor of a scalar: a plain number."""
    import numpy as np

    number: float | int | bool = np.frombuffer(raw, dtype=dtype.name, count=1)[0].item()
    return number


# What stands in a pickle where NumPy's numbers were saved -> what it calls here. The module has a new name since NumPy 2.
_NUMPY_NUMBERS: list[Any] = [
    (_NumpyDtype, "numpy.dtype"),
    (_numpy_number, "numpy._core.multiarray.scalar"),
    (_numpy_number, "numpy.core.multiarray.scalar"),
]
