"""Files of conversations in the formats that people have: what is read, and what is refused by file and line."""

from __future__ import annotations

import bz2
import gzip
import json
import lzma
import os
import socket
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import datasets
import needs
import pytest

from trimtab.axis import rows
from trimtab.axis.errors import UserError
from trimtab.axis.rows import HubData, is_hub_name, read_rows
from trimtab.axis.transcripts import Talk, read_talks

SYSTEM = {"role": "system", "content": "You are a pirate."}
ASKED = {"role": "user", "content": "Hail!\n\nWho, goes “there”?"}
SAID = {"role": "assistant", "content": "Aye."}
AGAIN = {"role": "user", "content": "And now?"}
TALK = [SYSTEM, ASKED, SAID, AGAIN, SAID]
TEXT = ASKED["content"]


def talks(path: Path | str) -> list[Talk]:
    return read_talks(path, lambda _, talk: talk, key="data.drift_file")


def messages(path: Path | str) -> list[list[dict[str, str]]]:
    return [talk.messages for talk in talks(path)]


def write(path: Path, content: Any) -> Path:
    """Bytes and text as they are, a list as JSON Lines for such a name, anything else as JSON."""
    if isinstance(content, list) and path.suffix == ".jsonl":
        content = "".join(json.dumps(row) + "\n" for row in content)
    if isinstance(content, bytes):
        path.write_bytes(content)
    else:
        path.write_text(content if isinstance(content, str) else json.dumps(content), encoding="utf-8")
    return path


def faults_of(path: Path | str) -> str:
    with pytest.raises(UserError) as caught:
        talks(path)
    assert caught.value.file == str(path) and caught.value.key == "data.drift_file" and caught.value.remedy
    return caught.value.fault


def shared_gpt(talk: list[dict[str, str]]) -> list[dict[str, str]]:
    names = {"user": "human", "assistant": "gpt", "system": "System"}
    return [{"from": names[message["role"]], "value": message["content"]} for message in talk]


# row -> the messages that it holds, and how many of them are the prompt
ROWS: dict[str, tuple[Any, list[dict[str, str]], int | None]] = {
    "messages": ({"messages": TALK, "id": 3}, TALK, None),
    "a published transcript": ({"model": "m", "turns": 5, "conversation": TALK}, TALK, None),
    "ShareGPT": ({"conversations": shared_gpt(TALK)}, TALK, None),
    "ShareGPT with a system prompt beside": ({"conversations": shared_gpt(TALK[1:]), "system": SYSTEM["content"]}, TALK, None),
    "a bare list": (TALK, TALK, None),
    "a system prompt beside": ({"system": SYSTEM["content"], "messages": TALK[1:]}, TALK, None),
    "a system prompt of parts": (
        {"system": [{"type": "text", "text": SYSTEM["content"]}], "messages": [ASKED]}, TALK[:2], None
    ),
    "a system prompt twice": ({"system": SYSTEM["content"], "messages": TALK}, TALK, None),
    "parts": (
        {"messages": [{"role": "user", "content": [{"type": "text", "text": "Ha"}, {"type": "input_text", "text": "il"}]}]},
        [{"role": "user", "content": "Hail"}],
        None,
    ),
    "a table's lists": ({"messages": {"role": ["system", "user"], "content": [SYSTEM["content"], TEXT]}}, TALK[:2], None),
    "nulls of a table": (
        {"messages": [{**ASKED, "tool_calls": None, "name": None}], "prompt": None, "system": None, "images": []},
        [ASKED],
        None,
    ),
    "a prompt": ({"prompt": TEXT}, [ASKED], 1),
    "prompt and answer": ({"prompt": TEXT, "completion": "Aye.", "system": SYSTEM["content"]}, TALK[:3], 2),
    "TRL's": ({"prompt": TALK[:2], "completion": [SAID]}, TALK[:3], 2),
    "a rollout of ours": ({"role": "pirate", "prompt": TALK[:2], "completion": [SAID], "ended": False}, TALK[:3], 2),
    "Alpaca": ({"instruction": "Hail!", "input": "Who, goes “there”?", "output": "Aye."}, TALK[1:3], 1),
    "Alpaca without input": ({"instruction": TEXT, "input": "", "output": "Aye."}, TALK[1:3], 1),
    "Dolly": ({"instruction": "Hail!", "context": "Who, goes “there”?", "response": "Aye."}, TALK[1:3], 1),
    "OpenOrca": ({"system_prompt": SYSTEM["content"], "question": TEXT, "response": "Aye."}, TALK[:3], 2),
    "UltraChat": ({"prompt": TEXT, "prompt_id": "x", "messages": TALK}, TALK, None),
    "user turns": ({"turns": [TEXT, "And now?"], "system": SYSTEM["content"]}, [SYSTEM, ASKED, AGAIN], None),
    "other names of roles": (
        [{"role": "Human", "content": TEXT}, {"role": "MODEL", "content": "Aye."}, {"role": "observation", "content": "3"}],
        [ASKED, SAID, {"role": "tool", "content": "3"}],
        None,
    ),
    "developer and tool": (
        [{"role": "developer", "content": "d"}, ASKED, {"role": "tool", "content": "3"}],
        [{"role": "developer", "content": "d"}, ASKED, {"role": "tool", "content": "3"}],
        None,
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", ROWS)
def test_every_format_of_a_row(name: str, tmp_path: Path) -> None:
    """As a line of its own, as an item of an array, and as the only value of a file."""
    row, wanted, asked = ROWS[name]
    for path in (
        write(tmp_path / "a.jsonl", [row, row]),
        write(tmp_path / "b.json", [row, row]),
        write(tmp_path / "c.json", json.dumps([row, row], indent=1)),
    ):
        found = talks(path)
        assert [(talk.messages, talk.asked) for talk in found] == [(wanted, asked)] * 2
    assert messages(write(tmp_path / "d.json", row)) == [wanted]
    assert messages(write(tmp_path / "e.jsonl", [row])) == [wanted]


PLAIN = json.dumps({"prompt": TEXT}, ensure_ascii=False).encode()


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("bom.jsonl", b"\xef\xbb\xbf" + PLAIN + b"\n" + PLAIN),
        ("crlf.jsonl", PLAIN + b"\r\n\r\n" + PLAIN + b"\r\n"),
        ("lines.json", PLAIN + b"\n" + PLAIN + b"\n"),
        ("array.jsonl", b"[\n" + PLAIN + b",\n" + PLAIN + b"\n]"),
        ("names.json", json.dumps({"one": [TEXT], "two": [ASKED]}).encode()),
        ("packed.jsonl.gz", gzip.compress(PLAIN + b"\n" + PLAIN)),
        ("packed.jsonl.bz2", bz2.compress(PLAIN + b"\n" + PLAIN)),
        ("packed.json.xz", lzma.compress(b"[" + PLAIN + b"," + PLAIN + b"]")),
        ("no_suffix", PLAIN + b"\n" + PLAIN),
        ("table.csv", b'\xef\xbb\xbfprompt\r\n"Hail!\n\nWho, goes \xe2\x80\x9cthere\xe2\x80\x9d?"\r\n' * 1
         + b'"Hail!\n\nWho, goes \xe2\x80\x9cthere\xe2\x80\x9d?"\r\n'),
        ("excel.csv", 'id;prompt\n1;"Hail!\n\nWho, goes “there”?"\n2;"Hail!\n\nWho, goes “there”?"\n'.encode()),
        ("table.tsv", 'id\tprompt\tsystem\n1\t"Hail!\n\nWho, goes “there”?"\t\n2\t"Hail!\n\nWho, goes “there”?"\t\n'.encode()),
        ("table.csv.gz", gzip.compress(('prompt\n' + 2 * '"Hail!\n\nWho, goes “there”?"\n').encode())),
    ],
)  # fmt: skip
def test_every_kind_of_file(name: str, content: bytes, tmp_path: Path) -> None:
    assert messages(write(tmp_path / name, content)) == [[ASKED], [ASKED]]


def test_zstd(tmp_path: Path) -> None:
    zstandard = needs.package("zstandard", get="pip install zstandard")
    packed = zstandard.ZstdCompressor().compress(PLAIN + b"\n" + PLAIN)
    assert messages(write(tmp_path / "a.jsonl.zst", packed)) == [[ASKED], [ASKED]]
    assert "it can't be unpacked" in faults_of(write(tmp_path / "b.jsonl.zst", packed[:8] + b"x" * 40))


@pytest.fixture
def table(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[Path], Path]:
    """Writes a Parquet file; the cache of `datasets` is the test's own."""
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", str(tmp_path / "cache"))
    content = [{"messages": TALK, "score": 0.5}, {"messages": [ASKED], "score": None}]

    def make(path: Path) -> Path:
        path.parent.mkdir(exist_ok=True)
        datasets.Dataset.from_list(content).to_parquet(str(path))
        return path

    return make


def test_parquet_and_a_data_set_laid_out_as_on_the_hub(tmp_path: Path, table: Callable[[Path], Path]) -> None:
    assert messages(table(tmp_path / "mine[1].parquet")) == [TALK, [ASKED]]
    for split in ("train", "test"):
        table(tmp_path / "set" / f"{split}.parquet")
    with pytest.raises(UserError, match=r"several splits: .*test") as caught:
        talks(f"hf://{tmp_path / 'set'}")
    assert f"hf://{tmp_path / 'set'}:t" in caught.value.remedy
    assert messages(f"hf://{tmp_path / 'set'}:test[:1]") == [TALK]


# content of mine.jsonl -> the fault
FAULTS: dict[str, tuple[Any, str]] = {
    "no conversation": ([{"text": "x", "n": 1}], "line 1: no conversation in here; the keys are: 'text', 'n'"),
    "a word": (['"hello"'], "line 1: a conversation can't be text"),
    "a number": (["3"], "line 1: a conversation can't be a number"),
    "text in the place of messages": ([{"messages": "x"}], "line 1: `messages` is text, not a list of messages"),
    "no messages": ([{"messages": []}], "line 1: `messages` is an empty list"),
    "an unknown role": ([{"messages": [ASKED, {"role": "narrator", "content": "x"}]}], "message 2 has the role 'narrator'"),
    "a number as content": ([{"messages": [{"role": "user", "content": 3}]}], "message 1: its content is a number, not text"),
    "NaN, as pandas writes it": (['{"system": NaN, "prompt": "x"}'], "line 1: `system` is a number, not text"),
    "a list as a role": ([{"messages": [{"role": [], "content": "x"}]}], "message 1: its role is a list, not text"),
    "no content": ([{"messages": [{"role": "user"}]}], "message 1 has no content"),
    "null content": ([{"messages": [{"role": "user", "content": None}]}], "message 1 has no content"),
    "an image": (
        [{"messages": [{"role": "user", "content": [{"type": "text", "text": "a"}, {"type": "image_url"}]}]}],
        "message 1 has a part that is no text: image_url",
    ),
    "images beside": ([{"image": "a.png", "conversations": shared_gpt([ASKED])}], "it has `image`, which"),
    "a call of a tool": ([[ASKED, {**SAID, "tool_calls": [{"id": 1}]}]], "message 2 has `tool_calls`"),
    "reasoning": ([[ASKED, {**SAID, "reasoning_content": "hm"}]], "message 2 has `reasoning_content`"),
    "tools": ([{"tools": [{"name": "t"}], "prompt": "x"}], "it has `tools`"),
    "two system prompts": ([{"system": "Be brief.", "messages": TALK}], "`system` and the messages hold different system"),
    "two conversations": ([{"prompt": "Another.", "messages": TALK}], "`messages` and `prompt` hold different conversations"),
    "a context beside": ([{"question": "x", "context": "y", "answer": "z"}], "`context` beside `question` is no format"),
    "two names of a role": ([[{"role": "user", "from": "gpt", "content": "x"}]], "message 1 has both `role` and `from`"),
    "half a character": (['{"prompt": "a \\ud83d b"}'], r"line 1: `prompt` holds half a character, '\ud83d'"),
    "a key twice": (['{"prompt": "a", "prompt": "b"}'], "line 1: not usable JSON: the key 'prompt' stands twice"),
    "cut short": ([{"prompt": "x"}, '{"prompt": "y'], "line 2: not valid JSON: Unterminated string"),
    "nested": ([{"prompt": "x"}, "[" * 100_000], "line 2: not usable JSON: it is nested too deeply"),
    "a huge number": ([{"prompt": "x"}, '{"n": ' + "9" * 5000 + "}"], "line 2: not usable JSON: Exceeds the limit"),
    "other text": ([{"prompt": "x"}, b'{"prompt": "caf\xe9"}'], "line 2: not UTF-8 text, at byte 16"),
    "blank lines count": (["", {"prompt": "x"}, "", {"prompt": 3}], "line 4: `prompt` is a number, not a list"),
    "all are told": (
        [{"prompt": "x"}, {"prompt": 3}, {"prompt": "x"}, {}],
        "2 rows can't be used:\n    line 2: `prompt` is a number, not a list of messages\n    line 4: no conversation in here",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", FAULTS)
def test_faulty_rows_are_told_with_their_line(name: str, tmp_path: Path) -> None:
    content, fault = FAULTS[name]
    lines = [
        row if isinstance(row, bytes) else (row if isinstance(row, str) else json.dumps(row)).encode()
        for row in content
    ]
    assert fault in faults_of(write(tmp_path / "mine.jsonl", b"\n".join(lines)))


def test_of_many_faulty_rows_ten_are_told(tmp_path: Path) -> None:
    fault = faults_of(write(tmp_path / "mine.jsonl", [{"prompt": 3}] * 1000))
    assert "10 rows can't be used (reading stopped there)" in fault and "line 10:" in fault and "line 11" not in fault


@pytest.mark.parametrize(
    ("name", "content", "fault", "remedy"),
    [
        ("a.jsonl", b"", "there is no row in it", "some"),
        ("b.jsonl", b"\n \n", "there is no row in it", "some"),
        ("c.json", b"[]", "there is no row in it", "some"),
        ("d.json", b'{"prompt": ', "not valid JSON", "mend"),
        ("e.json", b"[\n1,\n]", "not valid JSON", "mend"),
        ("f.json", '[{"prompt": "x"}]'.encode("utf-16"), "not UTF-8 text but UTF-16", "iconv -f UTF-16"),
        ("g.jsonl", '{"prompt": "x"}'.encode("utf-16-le"), "not UTF-8 text but UTF-16", "iconv"),
        ("h.txt", b"Hello there.", "neither JSON", "CSV or Parquet"),
        ("i.zip", b"PK\x03\x04xxxxxx", "this is a .zip file", "unpack it"),
        ("j.parquet", b"PAR1xxxxxxxx", "not a readable Parquet file", "again"),
        ("k.jsonl.gz", gzip.compress(b"x" * 9999)[:20], "it can't be unpacked", "again"),
        ("l.csv", b"prompt\n", "there is no row in it", "some"),
        ("m.csv", b"prompt,id\nHello, you,1\n", "line 2: 3 fields under 2 columns", "quotes"),
        ("n.csv", b'prompt\n"Hello" you\n', "line 2: not valid CSV", "quotes"),
        ("o.csv", b"prompt\nfirst\ncaf\xe9\n", "not UTF-8 text", "CSV UTF-8"),
        ("p.csv", b"prompt,prompt\na,b\n", "two columns have the same name", "rename"),
        ("q.csv", b"words\nHello\n", "line 2: no conversation in here; the keys are: 'words'", "prompt"),
    ],
)
def test_files_that_cannot_be_read_say_why(name: str, content: bytes, fault: str, remedy: str, tmp_path: Path) -> None:
    path = write(tmp_path / name, content)
    with pytest.raises(UserError) as caught:
        talks(path)
    assert fault in caught.value.fault and remedy in caught.value.remedy and caught.value.file == str(path)


def test_folders_missing_and_locked_files(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="this is a folder"):
        talks(tmp_path)
    with pytest.raises(UserError, match="no such file"):
        talks(tmp_path / "none.jsonl")
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(UserError, match="this is no plain file"):
        talks(tmp_path / "pipe")
    if os.getuid() != 0:
        locked = write(tmp_path / "a.jsonl", [{"prompt": "x"}])
        locked.chmod(0)
        with pytest.raises(UserError, match="Permission denied"):
            talks(locked)


@pytest.mark.parametrize(
    ("name", "hub"),
    [
        ("owner/name", True),
        ("owner/name:train", True),
        ("owner/squad_v2.0@main:train[:10%]", True),
        ("hf://anything", True),
        ("data/mine.jsonl", False),
        ("data/mine.txt", False),
        ("mine", False),
        ("/owner/name", False),
        ("../owner/name", False),
        ("a/b/c", False),
    ],
)
def test_what_can_be_a_name_on_the_hub(name: str, hub: bool) -> None:
    assert is_hub_name(name) is hub


@pytest.mark.parametrize(
    ("source", "wanted"),
    [
        ("owner/name", HubData("owner/name")),
        ("owner/name@v1:train[:10]", HubData("owner/name", "v1", None, "train[:10]")),
        ("hf://owner/name/plain:test", HubData("owner/name", None, "plain", "test")),
        ("hf://datasets/owner/name@refs/convert/parquet/plain", HubData("owner/name", "refs/convert/parquet", "plain")),
        (
            "hf://datasets/owner/name@refs%2Fpr%2F3/a/b.jsonl.gz",
            HubData("owner/name", "refs/pr/3", file="a/b.jsonl.gz"),
        ),
        ("hf://datasets/squad", HubData("squad")),
        ("hf:///some/folder:train", HubData("/some/folder", split="train")),
    ],
)
def test_the_parts_of_a_name_on_the_hub(source: str, wanted: HubData) -> None:
    assert HubData.of(source) == wanted


def test_a_hub_that_does_not_answer_and_one_that_is_not_asked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(UserError, match=r"no such file, and a data set of that name could not be loaded") as caught:
        talks("owner/name")
    assert "HF_TOKEN" in caught.value.remedy and caught.value.key == "data.drift_file"
    with pytest.raises(UserError, match="this names no data set"):
        talks("hf://models/owner/name")
    with socket.create_server(("127.0.0.1", 0)) as deaf:  # takes calls, and says nothing
        monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
        monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", f"http://127.0.0.1:{deaf.getsockname()[1]}")
        monkeypatch.setattr(rows, "HUB_PATIENCE", 0.2)
        for name in ("http_proxy", "HTTP_PROXY", "all_proxy", "ALL_PROXY"):
            monkeypatch.delenv(name, raising=False)
        for source in ("hf://owner/name", "hf://datasets/owner/name/a.jsonl"):
            started = time.monotonic()
            with pytest.raises(UserError, match=r"the data set could not be loaded: .*timed out"):
                talks(source)
            assert time.monotonic() - started < 3


def test_a_data_sets_code_is_not_run(tmp_path: Path) -> None:
    folder = tmp_path / "trap"
    folder.mkdir()
    write(folder / "trap.py", f"open({str(tmp_path / 'ran')!r}, 'w')")
    with pytest.raises(UserError, match="scripts are no longer supported"):
        talks(f"hf://{folder}")
    assert not (tmp_path / "ran").exists()


def test_keys_that_are_not_read_are_told(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    row = {"messages": [{**ASKED, "timestamp": 3}], "score": 1.0, "id": 1, "chosen": [SAID]}
    with caplog.at_level("INFO", "trimtab"):
        talks(write(tmp_path / "mine.jsonl", [row]))
    assert caplog.messages == ["mine.jsonl: keys that are not read: chosen, score, timestamp"]


def test_rows_keep_their_line_numbers(tmp_path: Path) -> None:
    path = write(tmp_path / "a.csv", 'prompt\n"one\n\n"\ntwo\n')
    assert read_rows(path, lambda row: (row.number, row.place)) == [(2, "line 2"), (5, "line 5")]
