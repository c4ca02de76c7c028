"""Preference pairs: chosen from the capped self, rejected from the uncapped one, same prompt, same seed.

Both are the base model, so the pairs are made once, before training. A conversation's earlier turns are the capped self's,
shared by both. Pairs that do not differ are dropped and counted. The file is TRL's preference format, one JSON object a line
with ``prompt``, ``chosen`` and ``rejected`` as messages, and ``chat_template_kwargs`` where the recipe has some: any preference
trainer reads it. ``chosen_ids`` and ``rejected_ids`` are the tokens that were sampled, without an end of turn; ``chosen_ended``
and ``rejected_ended`` say whether an answer ended by itself or was cut. A conversation that would outgrow ``max_length`` is
without its oldest turns from there on, ``turns_dropped`` of them.
"""

from __future__ import annotations

import functools
import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from trimtab.axis import Floor, UserError
from trimtab.axis.chat_format import ChatFormat
from trimtab.axis.files import write_jsonl
from trimtab.axis.models import Loaded
from trimtab.axis.playing import Played, PlayedTurn, play, recent_turns, scripted
from trimtab.axis.sampling import Answer, SamplingOptions, sample_answers
from trimtab.pipeline.instrument import floor_stage
from trimtab.pipeline.loading import Prepared, sampling_options
from trimtab.pipeline.run import Run
from trimtab.recipes.methods import PairMethod
from trimtab.train.rollouts import TrainPrompt, room_of_prompt
from trimtab.train.sources import drift_sources

log = logging.getLogger("trimtab")


def make_pairs(
    loaded: Loaded,
    form: ChatFormat,
    floor: Floor,
    prompts: Sequence[TrainPrompt],
    path: Path,
    *,
    options: SamplingOptions,
    strength: float,
    seed: int,
    max_length: int | None = None,
) -> dict[str, Any]:
    """Sample the pairs and write them.

    Args:
        loaded: the base model.
        form: chat format.
        floor: the cap's floor.
        prompts: drift prompts.
        path: where the pairs go (JSON Lines).
        options: sampling options.
        strength: strength of the cap.
        seed: sampling seed.
        max_length: of a prompt with an answer, tokens; None for any.

    Returns:
        Facts: ``pairs`` kept, ``same`` and ``empty`` dropped, and how many are ``shortened``.
    """

    def answers(messages: Sequence[Sequence[dict[str, str]]], capped: bool, title: str) -> list[Answer]:
        return sample_answers(
            loaded.model, form, messages, options,
            seed=seed, floor=floor if capped else None, strength=strength, title=f"pairs: {title}",
        )  # fmt: skip

    def answer(turn: PlayedTurn) -> list[str]:
        return [found.text for found in answers(turn.chats, True, f"turn {turn.number + 1}")]

    trim = functools.partial(recent_turns, form, room=room_of_prompt(max_length, options))
    talks = play(  # the turns before the last
        [prompt.before for prompt in prompts],
        scripted([prompt.turns[:-1] for prompt in prompts]),
        answer,
        turns=max(len(prompt.turns) for prompt in prompts) - 1,
        trim=trim,
    )
    for prompt, talk in zip(prompts, talks, strict=True):
        talk.ask({"role": "user", "content": prompt.turns[-1]}, trim)
    chats = [talk.messages for talk in talks]
    chosen = answers(chats, True, "chosen")
    rejected = answers(chats, False, "rejected")
    rows: list[dict[str, Any]] = []
    same = empty = 0
    for prompt, talk, good, bad in zip(prompts, talks, chosen, rejected, strict=True):
        if not good.text.strip() or not bad.text.strip():
            empty += 1
        elif good.text.strip() == bad.text.strip():
            same += 1
        else:
            rows.append({**_pair(form, prompt, talk, good, bad), "cap_strength": strength, "seed": seed})
    write_jsonl(path, rows)
    shortened = sum(row["turns_dropped"] > 0 for row in rows)
    facts = {"pairs": len(rows), "same": same, "empty": empty, "shortened": shortened}
    log.info("pairs: %d kept, %d dropped as both answers are the same, %d as one is empty", len(rows), same, empty)
    if shortened:
        log.info(
            "pairs: %d are without their oldest turns, which train.max_length=%s does not hold", shortened, max_length
        )
    return facts


def _pair(form: ChatFormat, prompt: TrainPrompt, talk: Played, chosen: Answer, rejected: Answer) -> dict[str, Any]:
    """A row of the file, but for what all of them share."""
    return {
        "prompt": form.fold(talk.messages),
        "chosen": [{"role": "assistant", "content": chosen.text}],
        "rejected": [{"role": "assistant", "content": rejected.text}],
        "chosen_ids": chosen.ids,
        "rejected_ids": rejected.ids,
        "chosen_ended": chosen.ended,
        "rejected_ended": rejected.ended,
        **({"chat_template_kwargs": form.template_kwargs} if form.template_kwargs else {}),
        "id": prompt.id,
        "source": prompt.source,
        "turns_dropped": talk.turns_dropped,
    }


def rollouts_stage(run: Run, prepared: Prepared | None = None) -> None:
    """Everything that training needs: axis, floor, and the pairs of methods that make some. Other trainers sample as they go on.

    What can be known to be wrong beforehand is :func:`trimtab.train.rehearsal.rehearse`'s to tell.
    """
    method = run.recipe.method
    prepared = prepared or Prepared(run)
    floor_stage(run, prepared)
    if not method.makes_pairs:
        return
    assert isinstance(method, PairMethod)

    def work() -> dict[str, Any]:
        loaded, form = prepared()
        found: dict[str, Any] = {}
        for control in (False, True) if run.recipe.eval.control else (False,):
            variant = run.variant(control)
            found["control" if control else "pairs"] = make_pairs(
                loaded,
                form,
                Floor.load(variant.floor_path),
                drift_sources(run.recipe.data),
                variant.pairs,
                options=sampling_options(method.sampling),
                strength=method.cap_strength,
                seed=run.recipe.data.seed,
                max_length=run.recipe.row_length,
            )
        return found

    facts = run.stage("pairs", run.inputs("pairs"), work, made_from=[run.variant(False).floor_path])
    if facts["pairs"]["pairs"] == 0:
        raise UserError(
            "no pair is left to train on: the cap changes none of the answers",
            key="floor",
            remedy="raise floor.percentile or widen floor.layers, and see the firing fraction in floor.json",
        )
