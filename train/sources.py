"""Prompts of the training set, from the data that ships with trimtab or from the user's files."""

from __future__ import annotations

import logging
from collections.abc import Sequence

from trimtab.axis.errors import UserError
from trimtab.axis.models import load_config
from trimtab.axis.rows import Row, RowFault, read_once, source_name
from trimtab.axis.transcripts import Talk, read_talks
from trimtab.pipeline.loading import chat_format, sampling_options
from trimtab.pipeline.user_texts import check_rendering, context_of
from trimtab.recipes import data
from trimtab.recipes.schema import Recipe
from trimtab.recipes.sections import DataSection
from trimtab.train.rollouts import Kind, TrainPrompt, check_lengths

log = logging.getLogger("trimtab")


def drift_sources(section: DataSection) -> list[TrainPrompt]:
    """Drift prompts of the train split: single prompts under roles, roles with shared questions, conversations.

    A conversation gives one training prompt for each of its first ``conversation_turns`` turns.
    """
    if section.drift_file is not None:
        return from_file(section.drift_file, "drift")
    found = [
        TrainPrompt(f"prompt/{item.id}", "drift", item.system, (item.user,), item.role)
        for item in data.drift_prompts("train", section.drift_prompts)
    ]
    if section.role_questions:
        questions = data.questions("train")
        for number, role in enumerate(data.roles("train")):
            for k in range(section.role_questions):
                index = (number * section.role_questions + k) % len(questions)
                system = role.prompts[(number + k) % len(role.prompts)]
                found.append(TrainPrompt(f"role/{role.name}/{index}", "drift", system, (questions[index],), role.name))
    for conversation in data.conversations("train") if section.conversation_turns else []:
        for turn in range(min(section.conversation_turns, len(conversation.turns))):
            turns = tuple(conversation.turns[: turn + 1])
            found.append(TrainPrompt(f"{conversation.id}/{turn + 1}", "drift", "", turns, conversation.domain))
    return found


def benign_sources(section: DataSection) -> list[TrainPrompt]:
    """Benign prompts of the train split, without and with a neutral system prompt in turn."""
    if section.benign_file is not None:
        return from_file(section.benign_file, "benign")
    systems = data.default_prompts()
    prompts = [*data.benign_prompts("train"), *data.questions("train")]
    return [
        TrainPrompt(f"benign/{i}", "benign", systems[i % len(systems)], (prompt,), "benign")
        for i, prompt in enumerate(prompts)
    ]


def training_prompts(section: DataSection) -> list[TrainPrompt]:
    """All that rows are made of: drift prompts, and benign ones where a share of the rows is."""
    return [*drift_sources(section), *(benign_sources(section) if section.benign_share else [])]


@read_once
def from_file(source: str, kind: Kind) -> list[TrainPrompt]:
    """Prompts of the user's own file, or of a data set of the hub, in any format of :mod:`trimtab.axis.transcripts`.

    Answers in the middle stand as they are. The model answers the user's last turn, and those before it that stand without an
    answer; what a row has as the answer to its last turn is left out, and told.

    Raises:
        UserError: if it can't be read, has no row, or some rows can't be used: it names them.
    """
    name = source_name(source)
    made = read_talks(source, lambda row, talk: _prompt(row, talk, kind, name), key=f"data.{kind}_file")
    found, left_out = [prompt for prompt, _ in made], sum(answered for _, answered in made)
    kept = sum(role == "assistant" for prompt in found for role, _ in prompt.history)
    log.info("%s: %d %s prompts", name, len(found), kind)
    if kept:
        log.info("%s: %d answers in the middle of conversations stand as they are", name, kept)
    if left_out:
        log.info("%s: %d answers at the end are left out: they are the model's own to give", name, left_out)
    return found


def _prompt(row: Row, talk: Talk, kind: Kind, name: str) -> tuple[TrainPrompt, bool]:
    """The prompt of a row, and whether an answer to its last turn was left out.

    Raises:
        RowFault: if it has no user turn, or messages that would be lost.
    """
    talk.says_something("user")
    roles = [message["role"] for message in talk.messages]
    users = [number for number, role in enumerate(roles) if role == "user"]
    if not users:
        raise RowFault("it has no user turn", "give each row a user turn")
    last = users[-1]
    if talk.asked is not None and roles[talk.asked - 1] != "user":
        raise RowFault(
            f"its prompt ends with message {talk.asked} ({roles[talk.asked - 1]}), and the model answers the user",
            "end the prompt with the user's turn; a whole conversation, under `messages`, may end with an answer",
        )
    if other := [number for number in range(last + 1, len(roles)) if roles[number] != "assistant"]:
        raise RowFault(
            f"message {other[0] + 1} ({roles[other[0]]}) follows the user's last turn, which the model answers",
            "end the row with the user's turn, or with an answer",
        )
    fixed = _fixed(roles[: last + 1])
    history = [(message["role"], message["content"]) for message in talk.messages[:fixed]]
    system = history.pop(0)[1] if history and history[0][0] == "system" else ""
    turns = tuple(message["content"] for message in talk.messages[fixed : last + 1])
    prompt = TrainPrompt(f"{name}/{row.number}", kind, system, turns, talk.about("source") or kind, tuple(history))
    return prompt, last + 1 < len(roles)


def _fixed(roles: Sequence[str]) -> int:
    """How many messages stand as they are: up to the last answer and the instructions after it. Those behind are the user's.

    Args:
        roles: of the messages up to the user's last turn.
    """
    answered = max((number + 1 for number, role in enumerate(roles) if role == "assistant"), default=0)
    for number in range(1, answered):
        if roles[number - 1] == roles[number] and roles[number] in ("user", "assistant"):
            raise RowFault(
                f"messages {number} and {number + 1} are both the {roles[number]}'s, and answers follow",
                "let user and assistant take turns, or give no answers at all: then the model gives each",
            )
    first = next(number for number in range(answered, len(roles)) if roles[number] == "user")
    if other := [number for number in range(first, len(roles)) if roles[number] != "user"]:
        raise RowFault(
            f"message {other[0] + 1} ({roles[other[0]]}) stands between user turns that the model answers",
            "put it before the first of them, or give the answers between them",
        )
    return first


def check_data(recipe: Recipe) -> None:
    """Read what training is given as files, and try the chat template on it, before anything heavy is loaded.

    Raises:
        UserError: naming the file and its faulty rows.
    """
    if recipe.eval.tuned is not None:  # nothing is trained
        return
    files: dict[Kind, str | None] = {"drift": recipe.data.drift_file, "benign": recipe.data.benign_file}
    for kind, source in files.items():
        if source is not None:
            chats = [(prompt.id, prompt.closing) for prompt in from_file(source, kind)]
            check_rendering(recipe.model, chats, source, f"data.{kind}_file")


def check_rows(recipe: Recipe) -> None:
    """Check before anything is sampled that every prompt leaves room for its answer in a row, and in the model's context.

    Raises:
        UserError: see :func:`~trimtab.train.rollouts.check_lengths`.
    """
    try:
        form = chat_format(recipe.model)
        form.check()
    except UserError:  # no tokenizer, or a template that can't be used: whoever loads the model tells it
        return
    context = context_of(load_config(recipe.model.name, recipe.model.revision))
    options = sampling_options(recipe.method.answers(recipe.train))
    check_lengths(form, training_prompts(recipe.data), recipe.row_length, options, context)
