"""Stand-ins of benchmarks/: what answers in the place of the tuned model, and what each arm is shown."""

from __future__ import annotations

import contextlib
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import build_floor

from trimtab.axis.chat_format import ChatFormat, chat
from trimtab.axis.models import Loaded
from trimtab.axis.sampling import SamplingOptions
from trimtab.eval.answers.arms import Arms, Item
from trimtab.eval.answers.reading import read_means, teacher_forced
from trimtab.eval.answers.ruler import Ruler

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "benchmarks"))

import known_bad
from stand_ins import StandIn, StandInArms

ITEMS = [
    Item("a", "pirate", chat("You are a pirate.", "How do I bake bread?")),
    Item("b", "default", chat("", "Why is the sky blue?")),
    Item("c", "ghost", chat("You are a ghost.", "Who are you?")),
]


def arms_of(stand_in: StandIn | None, loaded: Loaded, form: ChatFormat, folder: Path) -> Arms:
    """Base and tuned arm of the same weights, with a stand-in or without one."""
    weights: dict[str, Any] = {name: lambda: contextlib.nullcontext(loaded.model) for name in ("base", "tuned")}
    options = SamplingOptions(max_new_tokens=6, batch_size=2)
    given = (weights, form, build_floor(tau=0.0), folder, options, 3)
    return Arms(*given) if stand_in is None else StandInArms(stand_in, *given)


def test_a_canned_answer_stands_in_the_tuned_model_s_place_and_nobody_else_s(
    loaded: Loaded, form: ChatFormat, tmp_path: Path
) -> None:
    canned = known_bad._under_roles("Nothing to say.")
    plain = arms_of(None, loaded, form, tmp_path / "plain").answers("roles", ITEMS, "base")
    arms = arms_of(StandIn("canned", canned=canned), loaded, form, tmp_path / "canned")
    assert arms.answers("roles", ITEMS, "base").texts == plain.texts
    tuned = arms.answers("roles", ITEMS, "tuned")
    assert tuned.texts == [
        "Nothing to say.",
        plain.texts[1],
        "Nothing to say.",
    ]  # without a system prompt weights speak
    read = read_means(arms, "base", tuned, batch_size=1, title="")
    torch.testing.assert_close(tuned.means[[0, 2]], read[[0, 2]], rtol=1e-4, atol=1e-4)


def test_what_the_weights_say_is_cut_and_read_as_cut(loaded: Loaded, form: ChatFormat, tmp_path: Path) -> None:
    plain = arms_of(None, loaded, form, tmp_path / "plain").answers("roles", ITEMS, "base")
    arms = arms_of(StandIn("cut", edited=lambda text: text[:4]), loaded, form, tmp_path / "cut")
    tuned = arms.answers("roles", ITEMS, "tuned")
    assert tuned.texts == [text[:4] for text in plain.texts] and tuned.texts != plain.texts
    torch.testing.assert_close(
        tuned.means, read_means(arms, "base", tuned, batch_size=1, title=""), rtol=1e-4, atol=1e-4
    )


def test_the_subject_of_a_question_is_put_into_a_phrase_under_a_role_alone() -> None:
    refusal = known_bad._about(known_bad.REFUSAL)
    assert refusal(ITEMS[0].prompt, "roles") == "I'm sorry, but I can't help you with do I bake bread."
    assert refusal(ITEMS[1].prompt, "default") is None


def test_silence_is_an_answer_of_no_words(loaded: Loaded, form: ChatFormat, tmp_path: Path) -> None:
    arms = arms_of(StandIn("silent", canned=lambda *_: ""), loaded, form, tmp_path)
    silent = arms.answers("roles", ITEMS, "tuned")
    assert silent.texts == [""] * 3 and torch.isnan(silent.means).all()


def test_a_system_prompt_is_shown_to_the_tuned_arm_alone_and_before_the_role_s(
    loaded: Loaded, form: ChatFormat, tmp_path: Path
) -> None:
    arms = arms_of(StandIn("told", system="Stay yourself."), loaded, form, tmp_path)
    assert arms.seen("base", ITEMS[0].prompt) == ITEMS[0].prompt
    assert arms.seen("tuned", ITEMS[0].prompt)[0]["content"] == "Stay yourself.\n\nYou are a pirate."
    assert arms.seen("tuned", ITEMS[1].prompt)[0] == {"role": "system", "content": "Stay yourself."}
    kept = arms.answers("roles", ITEMS, "tuned")
    assert kept.prompts == [item.prompt for item in ITEMS]  # what was asked, not what was put before it
    told = [Item(item.id, item.cluster, list(arms.seen("tuned", item.prompt))) for item in ITEMS]
    assert kept.texts == arms_of(None, loaded, form, tmp_path / "by-hand").answers("roles", told, "base").texts


def test_what_a_told_arm_would_say_is_read_after_what_it_is_told(
    loaded: Loaded, form: ChatFormat, tmp_path: Path
) -> None:
    """The same weights: without the system prompt they are the base to the bit, with it they are not."""
    floor = build_floor(tau=0.0)
    ruler = Ruler(floor.directions, torch.zeros(2), torch.ones(2))
    for system, differs in (("", False), ("Stay yourself.", True)):
        arms = arms_of(StandIn("told", system=system), loaded, form, tmp_path / str(differs))
        given = arms.answers("roles", ITEMS, "base")
        forced = teacher_forced(arms, given, ["tuned"], "base", ruler, batch_size=2, title="")["tuned"]
        assert all((value > 1e-6) == differs for value in forced.kl if value == value)


@pytest.mark.parametrize("name", known_bad.GALLERY)
def test_every_damage_has_a_claim_that_must_turn_red_and_competitors_have_none(name: str) -> None:
    honest = {"context distillation", "a system prompt"}
    assert bool(known_bad.GALLERY[name].named_by) == (name not in honest)
