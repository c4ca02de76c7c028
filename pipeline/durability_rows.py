"""The rows that a durability run trains on."""

from __future__ import annotations

import logging
from typing import Any

from trimtab.axis.calibration import evenly_chosen
from trimtab.axis.chat_format import chat
from trimtab.axis.errors import UserError
from trimtab.axis.files import read_jsonl
from trimtab.axis.rows import RowFault, source_name
from trimtab.axis.transcripts import Talk, read_talks
from trimtab.pipeline.run import Run
from trimtab.recipes import data
from trimtab.recipes.schema import DurabilityRun

log = logging.getLogger("trimtab")


def rows_of(run: Run, tuning: DurabilityRun) -> list[dict[str, Any]]:
    """The rows of a durability run, ``prompt`` and ``completion`` as messages, and whether the answer ``ended``.

    ``benign`` and ``long``: requests of the train split with written answers. ``persona``: the base's own in-character answers
    behind the axis, of training roles, as an adversary with a few examples would take. Any other name: the rows of its file.

    Raises:
        UserError: if a file's row is not so, or there is none.
    """
    if tuning.file is not None:
        rows = rows_of_file(tuning.file)
    elif tuning.name in ("benign", "long"):
        rows = [
            {"prompt": chat("", prompt), "completion": [{"role": "assistant", "content": answer}], "ended": True}
            for prompt, answer in data.benign_answers()
        ]
    else:
        if not run.rollouts_path.exists():
            raise UserError(
                "there are no rollouts behind the axis to take in-character answers from",
                file=run.rollouts_path,
                key="eval.durability",
                remedy="extract the axis in this run, or give the fine-tuning a file of rows",
            )
        trained = {role.name for role in data.roles("train")}
        rows = [row for row in read_jsonl(run.rollouts_path) if row["role"] in trained and row.get("counted", True)]
    if not rows:
        raise UserError("there is no row to train on", file=tuning.file, key="eval.durability", remedy="add rows")
    return [{key: row[key] for key in ("prompt", "completion", "ended")} for row in evenly_chosen(rows, tuning.rows)]


def rows_of_file(source: str) -> list[dict[str, Any]]:
    """The rows of the user's own file, or of a data set of the hub, in any format of :mod:`trimtab.axis.transcripts`.

    The answer that ends a conversation is trained on; what stands before it is its prompt.

    Raises:
        UserError: if it can't be read, has no row, or some rows can't be used: it names them.
    """
    found = read_talks(source, lambda _, talk: _row(talk), key="eval.durability.file")
    within = sum(message["role"] == "assistant" for row in found for message in row["prompt"])
    if within:
        log.info("%s: %d answers in the middle of conversations are not trained on", source_name(source), within)
    return found


def _row(talk: Talk) -> dict[str, Any]:
    talk.says_something("user", "assistant")
    messages = talk.messages
    if messages[-1]["role"] != "assistant" or all(message["role"] != "user" for message in messages):
        raise RowFault("it is no conversation that ends with an answer", "end it with the answer that is trained on")
    ended = talk.row.get("ended", True)  # our own rollouts tell where an answer was cut
    if not isinstance(ended, bool):
        raise RowFault("`ended` is neither true nor false", "take it out of the row")
    return {"prompt": messages[:-1], "completion": messages[-1:], "ended": ended}
