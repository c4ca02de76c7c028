"""The user's own files that an evaluation reads, read once before anything heavy, so that what is wrong is told at once."""

from __future__ import annotations

from collections.abc import Sequence

from trimtab.axis.chat_format import ChatFormat
from trimtab.axis.errors import UserError
from trimtab.axis.models import load_config, load_tokenizer
from trimtab.axis.playing import unanswered
from trimtab.eval.answers.boundary_files import load_boundary_file
from trimtab.eval.answers.replays import KEY, load_replays
from trimtab.pipeline.durability_rows import rows_of_file
from trimtab.pipeline.user_texts import Size, check_rendering, check_room
from trimtab.recipes.data import Conversation
from trimtab.recipes.schema import Recipe


def _check_context(recipe: Recipe, talks: Sequence[Conversation]) -> None:
    """Check that each conversation fits the model's context, its answers as long as they may be."""
    try:
        tokenizer = load_tokenizer(recipe.model.name, recipe.model.revision)
        config = load_config(recipe.model.name, recipe.model.revision)
        form = ChatFormat(tokenizer, recipe.model.chat_template_kwargs)
        form.check()
    except UserError:
        return  # whoever loads the model tells it
    sizes = []
    for talk in talks[: recipe.eval.conversations or None]:
        turns = talk.turns[: recipe.eval.turns]
        sizes.append(Size(talk.id, unanswered(talk.opening, turns), len(turns)))
    remedy = "lower it, or eval.turns, or shorten the conversations of eval.conversations_file"
    key = "eval.sampling.max_new_tokens"
    check_room(form, config, sizes, recipe.eval.sampling.max_new_tokens, key=key, remedy=remedy)


def check_inputs(recipe: Recipe) -> None:
    """Read the files that the ``eval`` section names, and try the chat template on their conversations.

    Raises:
        UserError: naming the file and its faulty rows.
    """
    section = recipe.eval
    if section.conversations_file is not None:
        user = {"role": "user", "content": ""}
        talks = load_replays(section.conversations_file)
        chats = [(talk.id, [*talk.opening, user]) for talk in talks]
        check_rendering(recipe.model, chats, section.conversations_file, KEY)
        _check_context(recipe, talks)
    if section.boundary_file is not None:
        load_boundary_file(section.boundary_file)
    for tuning in section.durability:
        if tuning.file is not None:
            rows = [(f"row {number}", row["prompt"]) for number, row in enumerate(rows_of_file(tuning.file), start=1)]
            check_rendering(recipe.model, rows, tuning.file, "eval.durability.file")
