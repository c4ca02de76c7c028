"""Rows of the user's own files and of data sets of the hub, each with its place, so that what is wrong with one names it.

JSON, JSON Lines and CSV are read here, since a fault should name the line; Parquet and data sets of the hub by `datasets`.
Importing this module imports neither that library nor torch.
"""

from __future__ import annotations

import bz2
import contextlib
import csv
import functools
import glob
import gzip
import io
import itertools
import json
import lzma
import re
import sys
import zlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, NoReturn, TypeVar
from urllib.parse import unquote

from trimtab.axis.errors import UserError

T = TypeVar("T")

HUB = "hf://"
PACKED = (".gz", ".bz2", ".xz", ".zst")
SUFFIXES = (".json", ".jsonl", ".ndjson", ".csv", ".tsv", ".parquet", *PACKED)
FILES = "give JSON, JSON Lines, CSV or Parquet (text may be packed: .gz, .bz2, .xz, .zst)"
ON_THE_HUB = (
    "a data set of the hub is owner/name[:split], or in full hf://datasets/owner/name[@revision][/configuration][:split], "
    "or a file in it: hf://datasets/owner/name[@revision]/path/of/the/file.jsonl"
)
MOST_TOLD = 10  # faulty rows; with more, reading stops
HUB_PATIENCE = 10.0  # seconds until the hub counts as out of reach
LARGE = 1 << 26  # bytes from which reading shows a bar
MAGIC = {
    b"PAR1": ".parquet",
    b"\x1f\x8b": ".gz",
    b"BZh": ".bz2",
    b"\xfd7zXZ": ".xz",
    b"\x28\xb5\x2f\xfd": ".zst",
    b"PK\x03\x04": ".zip",
    b"ARROW1": ".arrow",
}
# A mapping with one of these is a row, whatever else it holds.
OF_A_ROW = {
    "messages", "conversation", "conversations", "turns", "prompts", "prompt", "instruction", "question",
}  # fmt: skip
KINDS = {bool: "true or false", int: "a number", float: "a number", str: "text", list: "a list", dict: "a mapping"}


class RowFault(Exception):
    """What is wrong with one row, and what to do about it; whoever reads the rows adds the place."""

    def __init__(self, fault: str, remedy: str) -> None:
        self.fault = fault
        self.remedy = remedy
        super().__init__(fault)


@dataclass(frozen=True)
class Row:
    """One row.

    Attributes:
        number: its line in JSON Lines and CSV, its number elsewhere, from 1.
        place: the same in words, such as ``line 3``; "" for the only value of a JSON file.
        value: what it holds; a :class:`RowFault` where it could not be read.
    """

    number: int
    place: str
    value: Any


@dataclass(frozen=True)
class HubData:
    """A data set of the hub.

    Attributes:
        name: ``owner/name``, or the absolute path of a folder that is laid out like one.
        revision: branch, tag or commit.
        configuration: where it has several.
        split: as ``datasets`` takes it, such as ``train[:100]``.
        file: a file in it that is read by itself.
    """

    name: str
    revision: str | None = None
    configuration: str | None = None
    split: str | None = None
    file: str | None = None

    @classmethod
    def of(cls, source: str) -> HubData:
        """Take the name of a data set apart; see :data:`ON_THE_HUB`.

        Raises:
            UserError: if it is none.
        """
        rest = source.removeprefix(HUB)
        if rest.startswith("/"):
            folder, _, split = rest.partition(":")
            return cls(folder, split=split or None)
        place, _, split = rest.removeprefix("datasets/").partition(":")
        found = re.fullmatch(r"([\w.-]+(?:/[\w.-]+)?)(?:@(refs/(?:convert/[\w-]+|pr/\d+)|[^/]+))?(?:/(.+))?", place)
        if found is None or rest.partition("/")[0] in ("models", "spaces", "buckets"):
            raise UserError("this names no data set", file=source, remedy=ON_THE_HUB)
        name, revision, inner = found.groups()
        file = inner if inner and Path(inner).suffix.lower() in SUFFIXES else None
        return cls(name, unquote(revision) if revision else None, None if file else inner, split or None, file)


def is_hub_name(source: str) -> bool:
    """Whether this can be nothing but a data set of the hub: ``hf://...``; or ``owner/name``, where no such file is."""
    bare = re.fullmatch(r"[A-Za-z0-9][\w.-]*/([A-Za-z0-9][\w.-]*)(@[^/:]+)?(:.+)?", source)
    of_a_file = bare is not None and re.fullmatch(r".*\.[A-Za-z]{2,12}", bare[1]) is not None
    return source.startswith(HUB) or (bare is not None and not of_a_file)


def read_rows(source: str | Path, make: Callable[[Row], T], *, key: str | None = None) -> list[T]:
    """Read every row and make something of it.

    Args:
        source: a file, or a data set of the hub: see :data:`ON_THE_HUB`.
        make: what a row becomes; raises :class:`RowFault` for one that can't be used.
        key: the recipe's key that names the source, for the error.

    Raises:
        UserError: if it can't be read, holds no row, or some rows can't be used: it names up to :data:`MOST_TOLD` of them.
    """
    found = gather(_rows(source, key), make, source, key=key)
    if not found:
        raise UserError("there is no row in it", file=source, key=key, remedy="name a file that has some")
    return found


def gather(rows: Iterable[Row], make: Callable[[Row], T], source: str | Path, *, key: str | None = None) -> list[T]:
    """Make something of each row; the arguments and the error are those of :func:`read_rows`."""
    found: list[T] = []
    faults: list[tuple[str, RowFault]] = []
    for row in rows:
        try:
            if isinstance(row.value, RowFault):
                raise row.value
            found.append(make(row))
        except RowFault as fault:
            faults.append((row.place, fault))
            if len(faults) == MOST_TOLD:
                break
    if faults:
        raise told(faults, source, key)
    return found


def told(faults: Sequence[tuple[str, RowFault]], source: str | Path, key: str | None) -> UserError:
    """The error for faulty rows: all of them, each with its place.

    Args:
        faults: place and fault of each; at least one.
        source: the file.
        key: the recipe's key that names it.
    """
    lines = [f"{place}: {fault.fault}" if place else fault.fault for place, fault in faults]
    remedy = "; ".join(dict.fromkeys(fault.remedy for _, fault in faults))
    if len(lines) == 1:
        return UserError(lines[0], file=source, key=key, remedy=remedy)
    more = " (reading stopped there)" if len(lines) == MOST_TOLD else ""
    listed = "".join(f"\n    {line}" for line in lines)
    return UserError(f"{len(lines)} rows can't be used{more}:{listed}", file=source, key=key, remedy=remedy)


def kind_of(value: Any) -> str:
    """What a JSON value is, in words."""
    return "nothing" if value is None else KINDS.get(type(value), type(value).__name__)


def read_once(read: Callable[..., list[T]]) -> Callable[..., list[T]]:
    """Make a reader, whose first argument is the source, keep what it found until the file is written anew."""

    @functools.lru_cache(maxsize=4)
    def kept(state: tuple[int, int] | None, *given: Any) -> list[T]:
        del state  # of the key alone
        return read(*given)

    @functools.wraps(read)
    def again(source: str, *given: Any) -> list[T]:
        path = Path(source).expanduser()
        state = path.stat() if path.is_file() else None
        return list(kept(state and (state.st_size, state.st_mtime_ns), source, *given))

    return again


def source_name(source: str | Path) -> str:
    """A short name: a file's own, or that of a data set."""
    return str(source) if is_hub_name(str(source)) else Path(source).name


def _rows(source: str | Path, key: str | None) -> Iterator[Row]:
    path = Path(source).expanduser()
    if is_hub_name(str(source)) and not path.exists():
        hub = HubData.of(str(source))
        return _file_rows(_fetched(hub, source, key), key) if hub.file else _table_rows(_hub_table(hub, source, key))
    return _file_rows(path, key)


def _file_rows(path: Path, key: str | None) -> Iterator[Row]:
    def refuse(fault: str, remedy: str) -> NoReturn:
        raise UserError(fault, file=path, key=key, remedy=remedy)

    if path.is_dir():
        refuse("this is a folder", f"name a file in it, or load it as `datasets` does: {HUB}{path.resolve()}")
    if path.exists() and not path.is_file():
        refuse("this is no plain file", "write the rows to a file: they are read more than once")
    try:
        with path.open("rb") as file:
            kind = _kind(file.read(8))
    except FileNotFoundError:
        refuse("no such file", f"check the path; {ON_THE_HUB}" if "/" in str(path) else "check the path")
    except OSError as error:
        refuse(f"the file can't be read: {error.strerror}", "check its permissions")
    if kind in (".zip", ".arrow"):
        refuse(f"this is a {kind} file", "unpack it, or save a spreadsheet as CSV" if kind == ".zip" else FILES)
    if kind == ".parquet":
        return _table_rows(_parquet_table(path, key))
    return _text_rows(path, kind, key)


def _kind(head: bytes) -> str:
    """What a file's first bytes say it is, as a suffix; "" for anything else, which may be text."""
    return next((suffix for magic, suffix in MAGIC.items() if head.startswith(magic)), "")


def _text_rows(path: Path, packed: str, key: str | None) -> Iterator[Row]:
    """Rows of JSON, JSON Lines or CSV, which the content tells apart, and the name where it can't."""
    name = path.name.lower().removesuffix(packed) if packed else path.name.lower()
    try:
        with _unpacked(path, packed, key) as stream:
            head = stream.read(4096)
        _refuse_other_text(head, path, key)
        first = head.removeprefix(b"\xef\xbb\xbf").lstrip()[:1]
        if first not in (b"{", b"[") and name.endswith((".csv", ".tsv")):
            yield from _csv_rows(path, packed, key)
        elif first in (b"{", b"[", b"") or name.endswith((".json", ".jsonl", ".ndjson")):
            yield from _json_rows(path, packed, key, lines=name.endswith(("l", ".ndjson")))
        else:
            raise UserError(
                "this is neither JSON, which begins with { or [, nor CSV by its name", file=path, key=key, remedy=FILES
            )
    except _not_unpacked() as error:
        raise UserError(f"it can't be unpacked: {error}", file=path, key=key, remedy="fetch it again") from error
    except OSError as error:
        raise UserError(f"the file can't be read: {error}", file=path, key=key, remedy="fetch it again") from error


def _refuse_other_text(head: bytes, path: Path, key: str | None) -> None:
    """Refuse two-byte text, which Windows programs write under the name of Unicode, and files that hold no text."""
    wide = head.startswith((b"\xff\xfe", b"\xfe\xff"))
    if wide or b"\0" in head:
        what = "but UTF-16" if wide or b"\0" in head[:4] else "but holds zero bytes"
        remedy = "save it as UTF-8: iconv -f UTF-16 -t UTF-8 OLD > NEW" if "16" in what else FILES
        raise UserError(f"this is not UTF-8 text {what}", file=path, key=key, remedy=remedy)


@contextlib.contextmanager
def _unpacked(path: Path, packed: str, key: str | None) -> Iterator[BinaryIO]:
    """The file's bytes, unpacked."""
    with contextlib.ExitStack() as stack:
        if packed == ".zst":
            yield stack.enter_context(_zstandard(path, key))
        else:
            opened: Any = {".gz": gzip.open, ".bz2": bz2.open, ".xz": lzma.open}.get(packed, open)
            yield stack.enter_context(opened(path, "rb"))


def _zstandard(path: Path, key: str | None) -> Any:
    try:
        import zstandard
    except ModuleNotFoundError as error:
        raise UserError(
            "this file is packed by zstd",
            file=path,
            key=key,
            remedy="pip install zstandard, or unpack it: zstd -d FILE",
        ) from error
    return io.BufferedReader(zstandard.open(path, "rb"))


def _not_unpacked() -> tuple[type[Exception], ...]:
    """What the libraries that unpack raise on a file that is cut short or damaged."""
    known = (EOFError, gzip.BadGzipFile, zlib.error, lzma.LZMAError)
    with contextlib.suppress(ModuleNotFoundError):
        import zstandard

        return (*known, zstandard.ZstdError)
    return known


def _json_rows(path: Path, packed: str, key: str | None, *, lines: bool) -> Iterator[Row]:
    """Rows of JSON Lines, or of one JSON value over the whole file.

    Args:
        path: the file.
        packed: how it is packed.
        key: the recipe's key.
        lines: whether its name says JSON Lines, which tells what to say of a file that is neither.
    """
    with _unpacked(path, packed, key) as stream:
        begun = list(itertools.islice(((n, line) for n, line in enumerate(stream, start=1) if _without_mark(line)), 2))
    if not begun:
        return
    head = _parsed(begun[0][1])
    if not isinstance(head, RowFault):
        number = begun[0][0]
        yield from _json_lines(path, packed, key) if len(begun) > 1 else _whole(head, number, f"line {number}")
        return
    with _unpacked(path, packed, key) as stream:
        whole = _parsed(stream.read())
    if not isinstance(whole, RowFault):
        yield from _whole(whole, 1, "")
    elif lines or (len(begun) > 1 and not isinstance(_parsed(begun[1][1]), RowFault)):
        yield from _json_lines(path, packed, key)
    else:
        raise told([("", whole)], path, key)


def _json_lines(path: Path, packed: str, key: str | None) -> Iterator[Row]:
    with _unpacked(path, packed, key) as stream:
        for number, line in enumerate(_with_bar(stream, path, packed), start=1):
            if _without_mark(line):
                yield Row(number, f"line {number}", _parsed(line))


def _with_bar(stream: BinaryIO, path: Path, packed: str) -> Iterator[bytes]:
    """The lines of a file, under a bar where it is a large one."""
    size = path.stat().st_size
    if packed or size < LARGE:
        yield from stream
        return
    from trimtab.axis.progress import progress_bar

    with progress_bar(f"reading {path.name} (MB)", size >> 20) as bar:
        done = 0
        for line in stream:
            yield line
            done += len(line)
            if done >> 20 > (done - len(line)) >> 20:
                bar.reach(done >> 20)


def _without_mark(line: bytes) -> bytes:
    """A line without the mark that some editors put before UTF-8 text, and without blanks around it."""
    return line.removeprefix(b"\xef\xbb\xbf").strip()


def _parsed(data: bytes) -> Any:
    """A JSON value, or the :class:`RowFault` that says why it is none."""
    mend = "mend or delete it"
    try:
        return json.loads(data.removeprefix(b"\xef\xbb\xbf").decode("utf-8"), object_pairs_hook=_object)
    except UnicodeDecodeError as error:
        return RowFault(f"not UTF-8 text, at byte {error.start + 1}", "save the file as UTF-8")
    except json.JSONDecodeError as error:
        where = f"line {error.lineno}, column {error.colno}" if error.lineno > 1 else f"column {error.colno}"
        return RowFault(f"not valid JSON: {error.msg} at {where}", mend)
    except RecursionError:
        return RowFault("not usable JSON: it is nested too deeply", mend)
    except ValueError as error:  # a key that stands twice, a number of thousands of digits
        return RowFault(f"not usable JSON: {error}", mend)


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    made = dict(pairs)
    if len(made) < len(pairs):
        seen: set[str] = set()
        twice = next(name for name, _ in pairs if name in seen or seen.add(name))  # type: ignore[func-returns-value]
        raise ValueError(f"the key {twice!r} stands twice, and one would be lost")
    return made


def _whole(value: Any, number: int, place: str) -> Iterator[Row]:
    """Rows of a JSON file's only value: an array of them, a mapping of names to lists, or one alone."""
    preferences = isinstance(value, dict) and {"chosen", "rejected"} <= value.keys()
    if isinstance(value, list) and not any(map(_is_message, value)):
        for count, item in enumerate(value, start=1):
            yield Row(count, f"row {count}", item)
    elif (
        isinstance(value, dict)
        and not preferences
        and not OF_A_ROW & value.keys()
        and value
        and all(map(_is_script, value.values()))
    ):
        for count, (name, items) in enumerate(value.items(), start=1):
            key = "turns" if isinstance(items[0], str) else "messages"
            yield Row(count, f"row {count} ({name})", {"id": name, key: items})
    else:
        yield Row(number, place, value)


def _is_message(item: Any) -> bool:
    """Whether this is one message of a conversation, rather than a row that holds some."""
    return isinstance(item, dict) and bool({"role", "from"} & item.keys()) and not OF_A_ROW & item.keys()


def _is_script(value: Any) -> bool:
    """Whether this is a conversation under a name of its own: user turns, or messages."""
    if not isinstance(value, list) or not value:
        return False
    return all(isinstance(item, str) for item in value) or all(map(_is_message, value))


def _csv_rows(path: Path, packed: str, key: str | None) -> Iterator[Row]:
    csv.field_size_limit(sys.maxsize)  # a long prompt is one field
    with _unpacked(path, packed, key) as stream, io.TextIOWrapper(stream, encoding="utf-8-sig", newline="") as text:
        line = 1
        try:
            head, above = text.readline(), 0
            marked = re.fullmatch(r'"?sep=(.)"?\s*', head, re.IGNORECASE)  # for spreadsheets
            if marked:
                head, above = text.readline(), 1
            mark = marked[1] if marked else max(",;\t", key=head.count)
            reader = csv.reader(itertools.chain([head], text), delimiter=mark, strict=True)
            names = [name.strip() for name in next(reader, [])]
            if len(set(names)) < len(names):
                raise UserError("two columns have the same name", file=path, key=key, remedy="rename one of them")
            line = above + reader.line_num + 1
            for fields in reader:
                if any(field.strip() for field in fields):  # spreadsheets write rows of empty cells below the last one
                    yield Row(line, f"line {line}", _record(names, fields))
                line = above + reader.line_num + 1
        except UnicodeDecodeError as error:
            raise UserError(
                f"not UTF-8 text, at or after line {line}", file=path, key=key, remedy="save the file as CSV UTF-8"
            ) from error
        except csv.Error as error:
            fault = RowFault(
                f"not valid CSV: {error}", "put text with quotes or line ends in quotes, its quotes doubled"
            )
            raise told([(f"line {line}", fault)], path, key) from error


def _record(names: Sequence[str], fields: Sequence[str]) -> dict[str, str | None] | RowFault:
    if len(fields) != len(names):
        return RowFault(
            f"{len(fields)} fields under {len(names)} columns", "put text that holds the separator in quotes"
        )
    return {name: field or None for name, field in zip(names, fields, strict=True)}


def _parquet_table(path: Path, key: str | None) -> Any:
    from datasets import Dataset

    try:
        return Dataset.from_parquet(glob.escape(str(path)))
    except Exception as error:  # datasets and pyarrow have classes of their own
        raise UserError(
            f"not a readable Parquet file: {_in_short(error)}", file=path, key=key, remedy="fetch or write it again"
        ) from error


def _table_rows(table: Any) -> Iterator[Row]:
    """Rows of a table of `datasets`, with classes as their names, and media left undecoded."""
    from datasets import ClassLabel

    classes = {name: kind for name, kind in table.features.items() if isinstance(kind, ClassLabel)}
    for name, kind in table.features.items():
        if getattr(kind, "decode", False) is True:
            table = table.cast_column(name, type(kind)(decode=False))
    for number, row in enumerate(table, start=1):
        named = {name: kind.int2str(row[name]) for name, kind in classes.items() if row[name] is not None}
        yield Row(number, f"row {number}", row | named)


def _fetched(hub: HubData, source: str | Path, key: str | None) -> Path:
    """A file of a data set, from the hub or from the cache."""
    from huggingface_hub import hf_hub_download

    _reach(hub, source, key)
    try:
        return Path(hf_hub_download(hub.name, str(hub.file), repo_type="dataset", revision=hub.revision))
    except Exception as error:  # the hub's client raises many kinds
        raise _unreachable(error, source, key) from error


def _hub_table(hub: HubData, source: str | Path, key: str | None) -> Any:
    """A data set of the hub as a table. `datasets` runs no code of it: what comes as a script is refused."""
    from datasets import load_dataset

    local = hub.name.startswith("/")
    if not local:
        _reach(hub, source, key)
    # in full, so that a folder of that name in the working directory is not taken for it
    name = hub.name if local else f"{HUB}datasets/{hub.name}"
    try:
        found: Any = load_dataset(name, hub.configuration, split=hub.split, revision=hub.revision)
    except Exception as error:  # datasets, the hub's client and each file format have classes of their own
        raise _unreachable(error, source, key) from error
    if hub.split is not None:
        return found
    if len(found) > 1:
        raise UserError(
            f"the data set has several splits: {', '.join(found)}",
            file=source,
            key=key,
            remedy=f"name one: {source}:{next(iter(found))}",
        )
    return next(iter(found.values()))


def _reach(hub: HubData, source: str | Path, key: str | None) -> None:
    """Ask the hub for the data set once: `datasets` would try for a minute and more where it can't be reached."""
    from huggingface_hub import HfApi
    from huggingface_hub.errors import OfflineModeIsEnabled

    try:
        HfApi().dataset_info(hub.name, revision=hub.revision, timeout=HUB_PATIENCE)
    except OfflineModeIsEnabled:
        return  # the cache may have it
    except Exception as error:  # the hub's client and what it sends with have classes of their own
        raise _unreachable(error, source, key) from error


def _unreachable(error: Exception, source: str | Path, key: str | None) -> UserError:
    if str(source).startswith(HUB):
        fault = "the data set could not be loaded"
    else:
        fault = "there is no such file, and a data set of that name could not be loaded"
    return UserError(
        f"{fault}: {_in_short(error)}",
        file=source,
        key=key,
        remedy="check the name, the split and the access to the hub (HF_TOKEN for private and gated data; HF_HUB_OFFLINE=1 takes "
        f"what was fetched before), or download it and name the file; {ON_THE_HUB}",
    )


def _in_short(error: Exception) -> str:
    """What went wrong; of an error that only wraps another, what that one says."""
    told_by = error.__cause__ if type(error).__name__ == "DatasetGenerationError" and error.__cause__ else error
    lines = [line.strip() for line in str(told_by).splitlines() if line.strip()]
    # two, since the hub's client begins with one that holds the status alone
    return " ".join(lines[:2])[:400] or type(told_by).__name__
