"""Extraction: the axis is default minus roles, and a kill at any moment changes neither it nor the rollouts by one bit."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import CHATML_WITHOUT_SYSTEM, HIDDEN, LAYERS, build_tokenizer

from trimtab.axis import Axis, UserError
from trimtab.axis.chat_format import ChatFormat, chat
from trimtab.axis.directions import unit
from trimtab.axis.extraction import DEFAULT, Extraction, Role, RolloutItem, _Sums, extract, rollout_items
from trimtab.axis.files import read_jsonl
from trimtab.axis.models import Loaded, load_model
from trimtab.axis.sampling import SamplingOptions, sample_batch, seed_of

ROLES = [Role("pirate", ["You are a pirate.", "Speak as a pirate would."]), Role("bard", ["You are a bard."])]
QUESTIONS = ["Why is the sky blue?", "How do I bake bread?", "Hi", "Tell me about ships and the sea."]
DEFAULTS = ["You are a helpful assistant.", ""]
OPTIONS = SamplingOptions(max_new_tokens=6, temperature=1.0, top_p=0.9, batch_size=3)


def run(loaded: Loaded, folder: Path, **changes: Any) -> Extraction:
    arguments: dict[str, Any] = {
        "roles": ROLES,
        "questions": QUESTIONS,
        "defaults": DEFAULTS,
        "options": OPTIONS,
        "default_repeats": 2,
        "seed": 3,
    } | changes
    form = arguments.pop("form", None) or ChatFormat(loaded.tokenizer)
    return extract(loaded, form, folder=folder, **arguments)


def test_items_use_every_prompt_equally_often() -> None:
    items = rollout_items(ROLES, QUESTIONS, DEFAULTS, default_repeats=2)
    assert len(items) == 4 + 4 + 8
    pirate = [item.system for item in items if item.role == "pirate"]
    assert sorted(pirate) == sorted(list(ROLES[0].prompts) * 2)
    default = [(item.system, item.question) for item in items if item.role == DEFAULT]
    assert sorted(default) == sorted((d, q) for d in DEFAULTS for q in QUESTIONS), "repeats differ in the system prompt"
    for role in ("pirate", "bard", DEFAULT):
        halves = {half: {i.question for i in items if i.role == role and i.half == half} for half in (0, 1)}
        assert halves[0].isdisjoint(halves[1]) and halves[0] | halves[1] == set(QUESTIONS)


def by_hand(loaded: Loaded, form: ChatFormat) -> dict[str, torch.Tensor]:
    """Mean activation per role, [N, D], from the sampler alone."""
    items = rollout_items(ROLES, QUESTIONS, DEFAULTS, default_repeats=2)
    prompts = [form.prompt_ids(chat(item.system, item.question)) for item in items]
    means: dict[str, list[torch.Tensor]] = {}
    for i, prompt in enumerate(prompts):
        (answer,) = sample_batch(loaded.model, form, [prompt], [i], OPTIONS, seeds=[seed_of([3, i])], means=True)
        assert answer.mean is not None
        if answer.mean.isfinite().all():
            means.setdefault(items[i].role, []).append(answer.mean)
    return {role: torch.stack(found).mean(0) for role, found in means.items()}


def test_the_axis_is_default_minus_the_mean_of_the_roles(loaded: Loaded, form: ChatFormat, tmp_path: Path) -> None:
    found = run(loaded, tmp_path / "axis")
    means = by_hand(loaded, form)
    assert found.axis.roles == ["pirate", "bard"] and found.axis.directions.shape == (LAYERS, HIDDEN)
    expected = unit(means[DEFAULT] - (means["pirate"] + means["bard"]) / 2)
    assert torch.allclose(found.axis.directions, expected, atol=1e-4)
    assert found.axis.default_mean is not None and found.axis.role_vectors is not None
    assert torch.allclose(found.axis.default_mean, means[DEFAULT], atol=1e-5)
    assert torch.allclose(found.axis.role_vectors[1], means["bard"], atol=1e-5)
    assert found.axis.metadata["split"] == "train"
    assert len(found.split_half) == LAYERS and all(-1 <= cosine <= 1 for cosine in found.split_half)
    rows = read_jsonl(found.rollouts)
    assert sorted(row["id"] for row in rows) == list(range(16)) and found.axis.metadata["responses"] == 16
    first = next(row for row in rows if row["id"] == 0)
    assert first["prompt"] == chat("You are a pirate.", QUESTIONS[0]) and first["completion"][0]["role"] == "assistant"


def test_the_two_halves_are_of_the_same_roles() -> None:
    """A role that the judge counts in one half alone must not enter the other as a vector of zeros."""
    sums = _Sums([DEFAULT, "pirate", "bard"], 1, 2)
    for half in (0, 1):
        sums.add(RolloutItem(DEFAULT, "", "", half), torch.tensor([[1.0, 0.0]]))
        sums.add(RolloutItem("pirate", "", "", half), torch.tensor([[0.0, 1.0]]))
    sums.add(RolloutItem("bard", "", "", 0), torch.tensor([[-9.0, 3.0]]))
    assert sums.split_half(0, [1, 2]) == [1.0]
    assert sums.split_half(0, [2]) == []  # a single question has one half


def same(a: Axis | None, b: Axis | None) -> bool:
    assert a is not None and b is not None and a.role_vectors is not None and b.role_vectors is not None
    assert a.default_mean is not None and b.default_mean is not None and a.metadata == b.metadata
    return (
        torch.equal(a.directions, b.directions)
        and torch.equal(a.role_vectors, b.role_vectors)
        and torch.equal(a.default_mean, b.default_mean)
    )


# Forks a child that extracts and kills it at a random moment after its next save, four times; then lets one get through.
KILLER = """
import os, random, signal, sys, time, traceback
from pathlib import Path
sys.path[:0] = sys.argv[1], sys.argv[1] + "/.."
import conftest  # offline, one thread
from test_extraction import ONE_BY_ONE, run
from trimtab.axis.models import load_model
from trimtab.axis.progress import set_quiet

set_quiet(True)
loaded = load_model(sys.argv[2], dtype="float32", device="cpu")
chance, folder = random.Random(int(sys.argv[4])), Path(sys.argv[3])
state = folder / "state.safetensors"

def saved():
    return state.stat().st_mtime_ns if state.exists() else 0

for attempt in range(5):
    seen = saved()
    child = os.fork()
    if child == 0:
        status = 1
        try:
            run(loaded, folder, options=ONE_BY_ONE)
            status = 0
        except BaseException:
            traceback.print_exc()
        finally:
            os._exit(status)
    if attempt == 4:
        print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
        break
    began = time.monotonic()
    while saved() == seen and time.monotonic() - began < 60:
        pass
    time.sleep(0.01 * chance.random())
    os.kill(child, signal.SIGKILL)
    _, status = os.waitpid(child, 0)
    assert os.WIFSIGNALED(status), (attempt, status)
"""
ONE_BY_ONE = replace(OPTIONS, batch_size=1)


@pytest.mark.slow
def test_kills_change_nothing(model_folder: Callable[[str], Path], tmp_path: Path) -> None:
    source = model_folder("llama")
    whole = run(load_model(str(source), dtype="float32", device="cpu"), tmp_path / "whole", options=ONE_BY_ONE)
    arguments = [str(Path(__file__).parent), str(source), str(tmp_path / "killed"), "1"]
    result = subprocess.run([sys.executable, "-c", KILLER, *arguments], capture_output=True, text=True, timeout=300)
    assert result.returncode == 0 and result.stdout.split() == ["0"], (result.stdout, result.stderr)
    again = run(load_model(str(source), dtype="float32", device="cpu"), tmp_path / "killed", options=ONE_BY_ONE)
    assert same(again.axis, whole.axis)
    assert again.split_half == whole.split_half
    assert again.rollouts.read_bytes() == whole.rollouts.read_bytes()


def test_resuming_samples_only_what_is_missing(loaded: Loaded, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = run(loaded, tmp_path / "whole")
    calls: list[int] = []

    def counted(*args: Any, **more: Any) -> Any:
        calls.append(1)
        if len(calls) == 6:
            raise KeyboardInterrupt
        return sample_batch(*args, **more)

    monkeypatch.setattr("trimtab.axis.extraction.sample_batch", counted)
    with pytest.raises(KeyboardInterrupt):
        run(loaded, tmp_path / "cut")
    with (tmp_path / "cut" / "rollouts.jsonl").open("ab") as file:
        # what a kill between the rollouts and their state leaves, and a torn line
        file.write(b'{"id": 3, "batch": 4}\n{"id": 5, "batch": 4, "ro')
    calls[:] = [1] * 6
    again = run(loaded, tmp_path / "cut")
    assert len(calls) == 6 + 2, "6 batches, of which 4 were saved"
    assert same(again.axis, whole.axis) and again.rollouts.read_bytes() == whole.rollouts.read_bytes()
    run(loaded, tmp_path / "cut")
    assert len(calls) == 8, "a finished extraction samples nothing"


def test_other_inputs_are_refused_and_nothing_is_overwritten(loaded: Loaded, tmp_path: Path) -> None:
    run(loaded, tmp_path)
    kept = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    other_template = ChatFormat(build_tokenizer(CHATML_WITHOUT_SYSTEM))
    changes: list[dict[str, Any]] = [
        {"seed": 4},
        {"questions": QUESTIONS[:3]},
        {"roles": ROLES[:1]},
        {"options": replace(OPTIONS, temperature=0.5)},
        {"defaults": [""]},
        {"judge": lambda pairs: [3] * len(pairs)},
        {"form": other_template},
    ]
    for change in changes:
        with pytest.raises(UserError, match="another model, role set"):
            run(loaded, tmp_path, **change)
    for fact in ("model", "revision", "dtype"):
        with pytest.raises(UserError, match="another model, role set"):
            run(replace(loaded, facts=loaded.facts | {fact: "other"}), tmp_path)
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == kept


def test_rollouts_of_unknown_origin_are_not_deleted(loaded: Loaded, tmp_path: Path) -> None:
    (tmp_path / "rollouts.jsonl").write_text("{}\n")
    with pytest.raises(UserError, match="unknown origin"):
        run(loaded, tmp_path)
    assert (tmp_path / "rollouts.jsonl").read_text() == "{}\n"


def test_names_taken_twice_are_refused(loaded: Loaded, tmp_path: Path) -> None:
    for name in ("bard", DEFAULT):
        with pytest.raises(UserError, match="taken twice"):
            run(loaded, tmp_path, roles=[*ROLES, Role(name, ["x"])])


def test_only_score_three_counts(loaded: Loaded, tmp_path: Path) -> None:
    asked: list[RolloutItem] = []

    def judge(pairs: Sequence[tuple[RolloutItem, str]]) -> Sequence[int | None]:
        asked.extend(item for item, _ in pairs)
        scores: dict[str, int | None] = dict(zip(QUESTIONS, [3, 2, None, 3], strict=True))
        return [1 if item.role == "bard" else scores[item.question] for item, _ in pairs]

    found = run(loaded, tmp_path, judge=judge, min_per_role=2)
    assert len(asked) == 16
    assert found.axis.roles == ["pirate"] and found.axis.metadata["left_out"] == ["bard"]
    assert found.axis.role_counts is not None and found.axis.role_counts.tolist() == [2]
    rows = read_jsonl(found.rollouts)
    for row in rows:
        assert row["counted"] == (row["role"] == DEFAULT or row["score"] == 3), "the default Assistant always counts"
    assert {row["score"] for row in rows} == {1, 2, 3, None} and found.axis.metadata["judged"]
    unjudged = run(loaded, tmp_path / "unjudged")
    assert not torch.allclose(found.axis.directions, unjudged.axis.directions, atol=1e-3)


def test_no_role_left_is_said_so(loaded: Loaded, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no held_out role has 5 counted responses") as caught:
        run(loaded, tmp_path, min_per_role=5, split="held_out")
    assert "axis.min_per_role" in caught.value.remedy
