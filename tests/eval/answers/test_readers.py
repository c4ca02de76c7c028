"""What a kept reader and kept scores belong to: a model's weights and chat format, and the settings of the fit."""

from __future__ import annotations

import contextlib
import os
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from conftest import save_model

from trimtab.axis import reader as reader_module
from trimtab.axis.chat_format import ChatFormat
from trimtab.axis.models import load_tokenizer
from trimtab.eval.answers.evaluation import Evaluation
from trimtab.eval.answers.readers import AnswerReader, ReadingModel


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_model(tmp_path_factory.mktemp("model") / "tiny")


@pytest.fixture
def folder(saved: Path, tmp_path: Path) -> Path:
    """A copy of the model, to be changed in place."""
    copy = tmp_path / "tiny"
    copy.mkdir()
    for file in saved.iterdir():
        (copy / file.name).write_bytes(file.read_bytes())
    return copy


def reading(folder: Path, kwargs: dict[str, Any] | None = None, *, plain: bool = False, **facts: Any) -> ReadingModel:
    """A model as another process would find it."""
    tokenizer = load_tokenizer(str(folder))
    form = None if plain else ChatFormat(tokenizer, kwargs)
    return ReadingModel(
        "it", contextlib.nullcontext, tokenizer, form, {"model": str(folder), "dtype": "float32", **facts}
    )


def kept_at(model: ReadingModel, folder: Path) -> set[str]:
    """Names of what is kept by this model: reader, what it read, relevance."""
    run: Any = SimpleNamespace(recipe=SimpleNamespace(eval=SimpleNamespace(split="dev")))
    arms: Any = SimpleNamespace(form=model.form, weights=None, floor=None, folder_of=lambda arm: folder)
    evaluation = Evaluation(run, arms, model.facts)
    return {evaluation.reader._identity, evaluation.reader._scores._path.name, evaluation._relevance._path.name}


def test_the_same_model_finds_what_it_kept(folder: Path, tmp_path: Path) -> None:
    assert reading(folder).identity == reading(folder).identity
    assert kept_at(reading(folder), tmp_path) == kept_at(reading(folder), tmp_path)


def replace_weights(folder: Path) -> ReadingModel:
    """Other weights of the same names and sizes."""
    path = folder / "model.safetensors"
    before = path.stat()
    path.write_bytes(path.read_bytes()[:-4] + b"\0\0\0\1")
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns + 10**9))
    assert path.stat().st_size == before.st_size
    return reading(folder)


def replace_template(folder: Path) -> ReadingModel:
    path = folder / "chat_template.jinja"
    path.write_text(path.read_text(encoding="utf-8").replace("<|im_end|>", "<|im_end|> "), encoding="utf-8")
    return reading(folder)


@pytest.mark.parametrize(
    "change",
    [
        replace_weights,
        replace_template,
        lambda folder: reading(folder, {"chat_template": "{% for m in messages %}[{{ m.content }}]{% endfor %}"}),
        lambda folder: reading(folder, plain=True),
        lambda folder: reading(folder, dtype="bfloat16"),
    ],
    ids=["weights", "template", "arguments", "no format", "dtype"],
)
def test_another_model_or_format_finds_nothing(folder: Path, tmp_path: Path, change: Any) -> None:
    before, known = kept_at(reading(folder), tmp_path), reading(folder).identity
    changed = change(folder)
    assert changed.identity != known
    if changed.form is not None:
        assert not kept_at(changed, tmp_path) & before


def test_arguments_that_the_template_does_not_read_change_nothing(folder: Path) -> None:
    assert reading(folder, {"of_no_use": True}).identity == reading(folder).identity


@pytest.mark.parametrize(
    ("name", "value"),
    [("DEPTHS", (0.5,)), ("PENALTY", 1.0), ("FOLDS", 3), ("MOST_STEPS", 10), ("PLATT_PENALTY", 1.0)],
)
def test_a_reader_of_other_settings_is_another(
    saved: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, value: Any
) -> None:
    model = reading(saved)
    before = AnswerReader(model, tmp_path, "dev")._identity
    assert AnswerReader(model, tmp_path, "dev")._identity == before
    monkeypatch.setattr(reader_module, name, value)
    assert AnswerReader(model, tmp_path, "dev")._identity != before


def test_a_snapshot_of_the_hub_is_told_by_its_files(
    saved: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A branch that has moved on since is another model under the same name."""
    store = tmp_path / "models--some--one"
    for commit in ("a" * 40, "b" * 40):
        snapshot = store / "snapshots" / commit
        snapshot.mkdir(parents=True)
        for file in saved.iterdir():
            (snapshot / file.name).write_bytes(file.read_bytes())
    (store / "refs").mkdir()
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    found = []
    for commit in ("a" * 40, "b" * 40, "a" * 40):
        (store / "refs" / "main").write_text(commit, encoding="utf-8")
        found.append(reading(saved, model="some/one", revision=None).identity)
    assert found[0] == found[2] != found[1]
