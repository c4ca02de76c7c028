"""Prompts of GRPO: whole conversations, each of which some reward can score, and which the model has room for."""

from __future__ import annotations

import logging
import math
from collections.abc import Sequence

from trimtab.axis.errors import UserError
from trimtab.axis.models import load_config
from trimtab.pipeline.loading import chat_format
from trimtab.pipeline.user_texts import Size, check_room
from trimtab.recipes.methods import NEED_SYSTEM, ConversationMethod
from trimtab.recipes.schema import Recipe
from trimtab.train.protocols import Generations
from trimtab.train.rewards import imported_reward
from trimtab.train.rollouts import TrainPrompt
from trimtab.train.sources import benign_sources, drift_sources

log = logging.getLogger("trimtab")


def prompts_a_generation(arguments: Generations) -> int:
    """How many prompts a generation has, each with its group of completions; ``arguments`` is TRL's config."""
    assert arguments.generation_batch_size is not None and arguments.num_generations is not None
    return arguments.generation_batch_size // arguments.num_generations


def conversation_prompts(recipe: Recipe, at_least: int = 1) -> list[TrainPrompt]:
    """What GRPO trains on: the drift prompts, without those that are the beginning of another.

    The policy answers every user turn of a prompt, and is trained on all its answers. Rows of the other methods are trained on
    the last answer alone, so a conversation gives them one row for each of its turns; here the first turn of four would then be
    trained four times.

    Args:
        recipe: the recipe.
        at_least: so many are needed; all are repeated until there are.

    Raises:
        UserError: if no reward can score one of them.
    """
    prompts = whole(drift_sources(recipe.data))
    _refuse_without_reward(recipe, prompts)
    return prompts * math.ceil(at_least / len(prompts))


def whole(prompts: Sequence[TrainPrompt]) -> list[TrainPrompt]:
    """The prompts that are not the beginning of another."""

    def beginning(prompt: TrainPrompt, turns: int) -> tuple[object, ...]:
        return prompt.system, prompt.history, prompt.turns[:turns]

    begun = {beginning(prompt, turns) for prompt in prompts for turns in range(1, len(prompt.turns))}
    return [prompt for prompt in prompts if beginning(prompt, len(prompt.turns)) not in begun]


def messages_of(prompt: TrainPrompt) -> list[dict[str, str]]:
    """The prompt as messages up to the first answer, then the user's later turns."""
    return [*prompt.opening, *({"role": "user", "content": turn} for turn in prompt.turns[1:])]


def check_prompts(recipe: Recipe) -> None:
    """Check before anything is sampled what would end, or quietly weaken, the training.

    Raises:
        UserError: if a prompt has no reward, a reward of the user's can't be imported, or a conversation outgrows the model.
    """
    prompts = conversation_prompts(recipe)
    without, others = _without_system(recipe, prompts)
    if without:
        log.info("rewards: %s: they are scored by %s alone", _share(without, prompts), " and ".join(others))
    for name in recipe.method.functions():
        imported_reward(name)
    try:
        form = chat_format(recipe.model)
        config = load_config(recipe.model.name, recipe.model.revision)
    except UserError:
        return  # whoever loads the model tells it
    if talks := [prompt for prompt in prompts if len(prompt.turns) > 1]:  # each is one row of tokens
        form.ids_between(talks[0].opening, {"role": "user", "content": talks[0].turns[1]}, ended=True)
    answer, key = recipe.method.answers(recipe.train).max_new_tokens, "train.max_completion_length"
    remedy = "lower it, or data.conversation_turns, or shorten the prompts of data.drift_file"
    check_room(form, config, _sizes(prompts), answer, key=key, remedy=remedy)
    if recipe.data.benign_share:
        remedy = "lower it, or shorten the prompts of data.benign_file"
        check_room(form, config, _sizes(benign_sources(recipe.data)), answer, key=key, remedy=remedy)


def _sizes(prompts: Sequence[TrainPrompt]) -> list[Size]:
    return [Size(prompt.id, prompt.closing, len(prompt.turns)) for prompt in prompts]


def _refuse_without_reward(recipe: Recipe, prompts: Sequence[TrainPrompt]) -> None:
    without, others = _without_system(recipe, prompts)
    if without and not others:
        raise UserError(
            f"{_share(without, prompts)}, and no other reward scores them: they would carry no policy gradient; the first is "
            f"{without[0].id}",
            file=recipe.data.drift_file,
            key="method.rewards",
            remedy="name assistant in its place or beside it, or give each prompt a system prompt",
        )


def _without_system(recipe: Recipe, prompts: Sequence[TrainPrompt]) -> tuple[list[TrainPrompt], list[str]]:
    """The prompts that some reward can't score, for want of a system prompt, and the rewards that can."""
    assert isinstance(recipe.method, ConversationMethod)
    weighted = [entry.name for entry in recipe.method.rewards if entry.weight]
    needed = set(weighted) & NEED_SYSTEM
    return [prompt for prompt in prompts if needed and not prompt.system], [n for n in weighted if n not in needed]


def _share(without: Sequence[TrainPrompt], prompts: Sequence[TrainPrompt]) -> str:
    return f"{len(without)} of {len(prompts)} prompts have no system prompt, which {' and '.join(NEED_SYSTEM)} needs"
