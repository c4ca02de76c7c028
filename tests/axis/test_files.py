"""Files are written whole or not at all; appended files survive a kill at any byte and a full disk."""

from __future__ import annotations

import contextlib
import json
import os
import pickle
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import needs
import pytest
import torch
from safetensors.torch import load_file

from trimtab.axis.errors import UserError
from trimtab.axis.files import (
    append_jsonl,
    atomic_path,
    file_fingerprint,
    fingerprint,
    load_tensors,
    load_torch,
    read_json,
    read_jsonl,
    save_tensors,
    write_json,
    write_jsonl,
    write_text,
)


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_an_exception_leaves_the_old_file_and_no_litter(tmp_path: Path) -> None:
    path = tmp_path / "deep" / "report.json"
    write_json(path, {"a": 1})
    with pytest.raises(UnicodeEncodeError), atomic_path(path) as temporary:
        temporary.write_text("half \ud800", encoding="utf-8")
    assert read_json(path) == {"a": 1} and names(path.parent) == ["report.json"]
    with path.open() as reader:  # renamed, never overwritten: who reads the old file meanwhile sees it whole
        write_json(path, {"a": 2})
        assert json.load(reader) == {"a": 1}
    assert read_json(path) == {"a": 2} and names(path.parent) == ["report.json"]


def test_nan_never_reaches_a_report(tmp_path: Path) -> None:
    path = tmp_path / "report.json"
    write_json(path, [1])
    for write in (write_json, lambda p, v: write_jsonl(p, [v]), lambda p, v: append_jsonl(p, [v])):
        with pytest.raises(ValueError, match="JSON compliant"):
            write(path, {"x": float("nan")})
    assert read_json(path) == [1]


def test_faulty_json_names_the_file(tmp_path: Path) -> None:
    path = tmp_path / "x.json"
    path.write_text('{"a": ')
    with pytest.raises(UserError, match=r"x\.json"):
        read_json(path)
    with pytest.raises(UserError, match="no such file"):
        read_json(tmp_path / "none.json")
    path.write_text('{"a": 1}\n[2]\n')
    with pytest.raises(UserError, match="line 2 is not a JSON object"):
        read_jsonl(path)
    path.write_bytes(b'{"a": 1}\n{"a": \xff}\n')
    with pytest.raises(UserError, match="line 2 is not JSON"):
        read_jsonl(path)


def test_jsonl_survives_a_cut_at_every_byte(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    rows: list[dict[str, Any]] = [{"n": i, "text": "é\u2028☃" * i} for i in range(4)]
    write_jsonl(path, rows)
    whole = path.read_bytes()
    ends = [i for i, byte in enumerate(whole) if byte == 0x0A]
    for cut in range(len(whole) + 1):
        path.write_bytes(whole[:cut])
        kept = sum(end < cut for end in ends)
        assert read_jsonl(path) == rows[:kept]
        append_jsonl(path, rows[kept:])
        assert path.read_bytes() == whole


def test_append_cuts_a_torn_line_longer_than_any_buffer(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    append_jsonl(path, [{"n": 0}])
    with path.open("ab") as file:
        file.write(b'{"n": "' + b"x" * 3_000_000)
    append_jsonl(path, [{"n": 1}])
    assert read_jsonl(path) == [{"n": 0}, {"n": 1}]


def test_tensors_round_trip_with_metadata(tmp_path: Path) -> None:
    path = tmp_path / "t.safetensors"
    tensors = {"a": torch.randn(3, 4).T, "b": torch.arange(3), "c": torch.randn(2, dtype=torch.bfloat16)}
    save_tensors(path, tensors, {"facts": {"ü": [1, None]}, "n": 2})
    found, metadata = load_tensors(path)
    assert metadata == {"facts": {"ü": [1, None]}, "n": 2}
    assert all(torch.equal(found[key], tensors[key]) and found[key].dtype == tensors[key].dtype for key in tensors)


class Malicious:
    """Would make a file on loading."""

    def __init__(self, target: Path) -> None:
        self.target = target

    def __reduce__(self) -> tuple[Callable[[str], object], tuple[str]]:
        return os.mkdir, (str(self.target),)


@pytest.mark.parametrize("legacy", [False, True])
def test_pickled_objects_are_refused_and_never_run(tmp_path: Path, legacy: bool) -> None:
    path, target = tmp_path / "evil.pt", tmp_path / "owned"
    torch.save({"axis": torch.zeros(2, 2), "x": Malicious(target)}, path, _use_new_zipfile_serialization=not legacy)
    with pytest.raises(UserError, match=r"holds objects of posix\.mkdir, which could run code"):
        load_torch(path)
    path.write_bytes(pickle.dumps(Malicious(target)))
    with pytest.raises(UserError):
        load_torch(path)
    assert not target.exists()


def test_plain_pt_files_load_and_broken_ones_say_what_they_are(tmp_path: Path) -> None:
    path = tmp_path / "x.pt"
    torch.save({"axis": torch.ones(2, 2), "metadata": {"n": 1}}, path)
    assert torch.equal(load_torch(path)["axis"], torch.ones(2, 2))
    path.write_bytes(path.read_bytes()[:200])
    with pytest.raises(UserError, match="not a readable"):
        load_torch(path)
    # what git leaves where large files were not fetched
    path.write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 3\n")
    with pytest.raises(UserError, match="not a readable"):
        load_torch(path)
    path.write_bytes(b"")
    with pytest.raises(UserError, match="not a readable"):
        load_torch(path)
    with pytest.raises(UserError, match="no such file"):
        load_torch(tmp_path)


def test_fingerprints_are_stable(tmp_path: Path) -> None:
    assert (
        fingerprint({"a": 1, "b": [2, "é"]}) == fingerprint({"b": [2, "é"], "a": 1}) != fingerprint({"a": 1, "b": [2]})
    )
    path = tmp_path / "x"
    path.write_bytes(b"x" * 3_000_000)
    assert len(file_fingerprint(path)) == 16 and file_fingerprint(path) == file_fingerprint(str(path))


WRITER = """
import sys
from pathlib import Path
import torch
from trimtab.axis.files import append_jsonl, save_tensors, write_json

folder = Path(sys.argv[1])
print("ready", flush=True)
for i in range(10**9):
    save_tensors(folder / "t.safetensors", {"x": torch.full((20_000,), float(i))}, {"i": i})
    write_json(folder / "r.json", {"i": i, "filler": ["x" * 50] * 400})
    append_jsonl(folder / "rows.jsonl", [{"i": i, "text": "é" * 3000}])
"""


@pytest.mark.slow
def test_kill_9_while_writing(tmp_path: Path) -> None:
    """Whenever the process dies, what stands under the real names is whole, and appending goes on."""
    chance = random.Random(0)
    for attempt in range(3):
        process = subprocess.Popen([sys.executable, "-c", WRITER, str(tmp_path)], stdout=subprocess.PIPE)
        assert process.stdout is not None
        process.stdout.readline()
        time.sleep(0.15 + 0.3 * chance.random())
        process.send_signal(signal.SIGKILL)
        process.wait()
        process.stdout.close()
        tensors, facts = load_tensors(tmp_path / "t.safetensors")
        assert (tensors["x"] == facts["i"]).all()
        report = read_json(tmp_path / "r.json")
        assert len(report["filler"]) == 400 and abs(report["i"] - facts["i"]) <= 1
        before = read_jsonl(tmp_path / "rows.jsonl")
        assert len(before) > attempt
        append_jsonl(tmp_path / "rows.jsonl", [{"after": attempt}])
        assert read_jsonl(tmp_path / "rows.jsonl") == [*before, {"after": attempt}]


@contextlib.contextmanager
def tiny_disk(folder: Path, options: str = "size=64k") -> Iterator[Path]:
    """A file system of 64 KiB; skips where this process may not mount one."""
    needs.mount()
    folder.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", options, "tmpfs", str(folder)], capture_output=True).returncode:
        needs.no_right_to_mount()
    try:
        yield folder
    finally:
        subprocess.run(["umount", str(folder)], check=True)


def test_a_full_disk_loses_nothing_and_says_so(tmp_path: Path) -> None:
    with tiny_disk(tmp_path / "disk") as disk:
        save_tensors(disk / "t.safetensors", {"x": torch.ones(1000)}, {"i": 1})
        write_text(disk / "a.txt", "old")
        append_jsonl(disk / "rows.jsonl", [{"n": 0}])
        kept = {path.name: path.read_bytes() for path in disk.iterdir()}
        writes: list[Callable[[], None]] = [
            lambda: save_tensors(disk / "t.safetensors", {"x": torch.ones(100_000)}, {"i": 2}),
            lambda: write_text(disk / "a.txt", "x" * 200_000),
            lambda: append_jsonl(disk / "rows.jsonl", [{"n": i, "text": "x" * 1000} for i in range(200)]),
            lambda: append_jsonl(disk / "rows.jsonl", [{"n": 1, "text": "x" * 200_000}]),
        ]
        for write in writes:
            with pytest.raises(UserError, match="disk is full") as caught:
                write()
            assert caught.value.file and str(disk) in caught.value.file
            assert {path.name: path.read_bytes() for path in disk.iterdir()} == kept
        # not one byte left, and a row smaller than any buffer: the fault shows only when the buffer is flushed
        with contextlib.suppress(OSError), (disk / "filler").open("wb", buffering=0) as filler:
            while filler.write(b"x" * 512):
                pass
        with pytest.raises(UserError, match="disk is full"):
            append_jsonl(disk / "rows.jsonl", [{"n": 1, "text": "x" * 5000}])
        assert (disk / "rows.jsonl").read_bytes() == kept["rows.jsonl"]
        (disk / "filler").unlink()
        append_jsonl(disk / "rows.jsonl", [{"n": 1}])
        assert read_jsonl(disk / "rows.jsonl") == [{"n": 0}, {"n": 1}]


def test_no_inode_left_is_a_full_disk_too(tmp_path: Path) -> None:
    with tiny_disk(tmp_path / "disk", "size=64k,nr_inodes=3") as disk:
        with contextlib.suppress(OSError):
            for number in range(3):
                (disk / f"{number}").touch()
        with pytest.raises(UserError, match="disk is full"):
            write_text(disk / "new.txt", "x")
        with pytest.raises(UserError, match="disk is full"):
            write_text(disk / "folder" / "new.txt", "x")
        with pytest.raises(UserError, match="disk is full"):
            append_jsonl(disk / "new.jsonl", [{"n": 1}])


LIMITED = """
import resource, signal, sys
from pathlib import Path
from trimtab.axis.errors import UserError
from trimtab.axis.files import append_jsonl, write_text

signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
folder = Path(sys.argv[1])
write_text(folder / "a.txt", "old")
append_jsonl(folder / "rows.jsonl", [{"n": 0}])
resource.setrlimit(resource.RLIMIT_FSIZE, (30_000, 30_000))
for write in (
    lambda: write_text(folder / "a.txt", "x" * 100_000),
    lambda: append_jsonl(folder / "rows.jsonl", [{"n": 1, "text": "x" * 100_000}]),
):
    try:
        write()
    except UserError as error:
        print(Path(error.file).name, error.fault)
"""


def test_a_write_that_fails_half_way_is_rolled_back(tmp_path: Path) -> None:
    """The same without a right to mount: the kernel refuses to let files grow beyond 30 kB."""
    result = subprocess.run([sys.executable, "-c", LIMITED, str(tmp_path)], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    said = "this file may not grow any further: a limit of the system forbids it"
    assert result.stdout.splitlines() == [f"{name} {said}" for name in ("a.txt", "rows.jsonl")]
    assert names(tmp_path) == ["a.txt", "rows.jsonl"]
    assert (tmp_path / "a.txt").read_text() == "old"
    assert (tmp_path / "rows.jsonl").read_text() == json.dumps({"n": 0}) + "\n"


def test_written_files_are_readable_by_others_and_by_safetensors(tmp_path: Path) -> None:
    save_tensors(tmp_path / "t.safetensors", {"x": torch.ones(3)}, {"i": 1})
    assert (tmp_path / "t.safetensors").stat().st_mode & 0o777 == 0o644
    assert torch.equal(load_file(tmp_path / "t.safetensors")["x"], torch.ones(3))
