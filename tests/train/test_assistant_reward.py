"""The reward of a relevant answer by the Assistant: by hand on a tiny model, and on canned texts read by SmolLM2."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from test_grpo import FLOOR, ONE_TURN, logprobs, make_trainer, said, together
from torch import Tensor

from trimtab.axis.reader import Reader
from trimtab.recipes import data
from trimtab.recipes.shipped_reader import read_known
from trimtab.train import rewards
from trimtab.train.rewards import (
    ENOUGH,
    MIDDLE,
    OTHERS,
    SCALE,
    AssistantAnswer,
    bind_rewards,
    make_rewards,
    on_question,
    other_questions,
    substance,
)

# an answer, what it adds to the question, and its new words
ANSWERS = {
    "Arr, the oven be small.": ("Arr, the oven be small.", 3),
    "Knead flour and water for the bread, let it rest, then bake it with steam at full heat.": (
        "Knead flour and water for the , let it rest, then it with steam at full heat.", 7
    ),
    "Sorry, no bread.": ("Sorry, no .", 1),
}  # fmt: skip
FIRST = next(iter(ANSWERS))


def bound(folder: Path, name: str = "run") -> tuple[Any, Any]:
    """The reward as a recipe makes it, and its trainer."""
    (folder / name).mkdir(exist_ok=True)
    (reward,), _ = make_rewards([{"name": "assistant", "weight": 1.0}], folder=folder / name)
    trainer = make_trainer(folder, rewards=[reward])
    bind_rewards([reward], trainer)
    return reward, trainer


def sigmoid(value: float) -> float:
    return 1 / (1 + math.exp(-value))


def test_the_reward_by_hand(tmp_path: Path) -> None:
    """By the frozen base: neither the adapter, which is awake here, nor the role's prompt nor another answer changes it."""
    reward, trainer = bound(tmp_path)
    form, model = trainer.form, trainer.model
    question = ONE_TURN[0][-1]["content"]
    rollouts = [said(form, ONE_TURN[0], text) for text in ANSWERS]
    found = reward(**together(rollouts))
    (path,) = (tmp_path / "run").glob("reader-*.safetensors")
    reader, layers = Reader.load(path), model.get_base_model().model.layers
    for (text, (adds, words)), value in zip(ANSWERS.items(), found, strict=True):
        tail = form.answer_ids(text)

        def mean_logprob(asked: str, added: list[int]) -> float:
            ids = torch.tensor(form.prompt_ids([{"role": "user", "content": asked}]) + added)
            return float(logprobs(model, ids, len(added), capped=False).mean())

        states: list[Tensor] = []  # not output_hidden_states, whose last one is normalised
        hooks = [layer.register_forward_hook(lambda m, i, o, states=states: states.append(o)) for layer in layers]
        with torch.no_grad(), model.disable_adapter():
            model(input_ids=torch.tensor([form.prompt_ids([{"role": "user", "content": question}]) + tail]))
            for hook in hooks:
                hook.remove()
            added = form.answer_ids(adds)
            own, *others = (mean_logprob(asked, added) for asked in (question, *other_questions(question)))
        read = torch.stack([states[layer][0, -len(tail) :].mean(0) for layer in reader.layers])
        raw = (((read - reader.mean) / reader.scale * reader.weights).sum(-1) + reader.bias).mean()
        odds = float(raw) * reader.slope + reader.intercept
        wanted = sigmoid(-odds) * sigmoid((own - max(others) - MIDDLE) / SCALE) * (words / ENOUGH) ** 2
        assert value == pytest.approx(wanted, rel=1e-3, abs=1e-7)
    without_role = [said(form, ONE_TURN[0][1:], text) for text in ANSWERS]
    assert reward(**together(without_role)) == pytest.approx(found)
    assert [reward(**rollout)[0] for rollout in rollouts] == pytest.approx(found, rel=1e-3, abs=1e-7)
    trainer.floor = FLOOR
    with trainer.controller.capping(FLOOR):
        assert reward(**rollouts[0]) == pytest.approx(found[:1])


def test_what_is_no_answer_earns_nothing_and_a_conversation_has_its_mean(tmp_path: Path) -> None:
    reward, trainer = bound(tmp_path)
    question = ONE_TURN[0][-1]["content"]
    nothing = (
        "", " \n", question, f"You ask: {question.upper()} A fine question.",
        "the the the the", "Yes, you can bake bread!",
    )  # fmt: skip
    rollouts = [said(trainer.form, ONE_TURN[0], text) for text in (*nothing, *ANSWERS)]
    found = reward(**together(rollouts))
    assert found[: len(nothing)] == [0.0] * len(nothing) and min(found[len(nothing) :]) > 0
    paid = found[-1]
    talk = {name: [rollouts[0][name][0] + rollouts[-1][name][0]] for name in ("turns", "turn_ids")}
    assert reward(**talk) == pytest.approx([paid / 2])


def test_the_reader_is_fitted_once_a_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """And again where nothing was kept; the weights that are trained have no part in it."""
    reward, trainer = bound(tmp_path)
    rollout = said(trainer.form, ONE_TURN[0], FIRST)
    first = reward(**rollout)
    alone = AssistantAnswer()
    bind_rewards([alone], trainer)
    for parameter in trainer.model.parameters():
        parameter.data += 0.1 * parameter.requires_grad
    assert alone(**rollout) == pytest.approx(first)
    calls: list[str] = []

    def counted(*given: Any, **options: Any) -> Any:
        calls.append(options["title"])
        return read_known(*given, **options)

    monkeypatch.setattr(rewards, "read_known", counted)
    again, other = bound(tmp_path)
    assert again(**rollout) == first and not calls
    anew, _ = bound(tmp_path, "another")
    assert anew(**rollout) == first and len(calls) == 1 and other is again.trainer


def test_every_rank_does_as_many_forwards(tmp_path: Path) -> None:
    """Whatever its own answers: under ZeRO-3 and FSDP each forward is a collective."""
    reward, trainer = bound(tmp_path)
    reward(**said(trainer.form, ONE_TURN[0], FIRST))
    largest = 7
    trainer.most = lambda number: max(number, largest)
    forwards: list[int] = []
    trainer.model.get_base_model().register_forward_pre_hook(lambda *_: forwards.append(1))
    for texts in (ANSWERS, ("",), ("x",) * 20):
        forwards.clear()
        reward(**together([said(trainer.form, ONE_TURN[0], text) for text in texts]))
        assert len(forwards) == 2 * largest  # the reader's, and those after questions


def test_a_rank_reads_the_texts_where_another_lacks_the_reader(tmp_path: Path) -> None:
    """Then all read, or those that lack it would wait for ever."""
    reward, trainer = bound(tmp_path)
    rollout = said(trainer.form, ONE_TURN[0], FIRST)
    reward(**rollout)
    (path,) = (tmp_path / "run").glob("reader-*.safetensors")
    before = path.stat().st_mtime_ns
    again, trainer = bound(tmp_path)
    trainer.most = lambda number: max(number, 1)
    again(**rollout)
    assert path.stat().st_mtime_ns > before


def test_relevance_is_mapped_to_between_nothing_and_one() -> None:
    at = on_question(torch.tensor([-1.0, 0.0, MIDDLE, 0.6, 2.0])).tolist()
    assert at[0] < 1e-4 and at[1] < 0.05 and at[2] == pytest.approx(0.5) and at[3] > 0.95 and at[4] > 0.999


def test_new_words_are_paid_for_until_there_are_enough() -> None:
    assert substance(torch.tensor([0, 2, ENOUGH, 3 * ENOUGH])).tolist() == [0.0, (2 / ENOUGH) ** 2, 1.0, 1.0]


def test_an_answer_is_held_against_questions_that_its_own_alone_chooses() -> None:
    pool = data.questions("train")
    for question in ("Why is the sky blue?", *pool):
        others = other_questions(question)
        assert len(set(others)) == OTHERS and question not in others and set(others) <= set(pool)
    assert len({other for question in pool for other in other_questions(question)}) > len(pool) / 2
