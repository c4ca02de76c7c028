"""The user's own files that an evaluation reads, read once before anything heavy, so that what is wrong is told at once."""

from __future__ import annotations

from trimtab.eval.boundary_files import load_boundary_file
from trimtab.eval.replays import KEY, load_replays
from trimtab.recipes.schema import Recipe
from trimtab.train.further import rows_of_file
from trimtab.train.sources import check_rendering


def check_inputs(recipe: Recipe) -> None:
    """Read the files that the ``eval`` section names, and try the chat template on their conversations.

    Raises:
        UserError: naming the file and its faulty rows.
    """
    section = recipe.eval
    if section.conversations_file is not None:
        user = {"role": "user", "content": ""}
        chats = [(talk.id, [*talk.opening, user]) for talk in load_replays(section.conversations_file)]
        check_rendering(recipe.model, chats, section.conversations_file, KEY)
    if section.boundary_file is not None:
        load_boundary_file(section.boundary_file)
    for tuning in section.durability:
        if tuning.file is not None:
            rows = [(f"row {number}", row["prompt"]) for number, row in enumerate(rows_of_file(tuning.file), start=1)]
            check_rendering(recipe.model, rows, tuning.file, "eval.durability.file")
