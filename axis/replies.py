"""What a model replied when it was asked something: its words without its thoughts, or why there are none.

A model that thinks aloud writes its thoughts before its answer, between marks of its own. What stands in them is no answer, and a
thought that was never closed has no answer after it.
"""

from __future__ import annotations

import enum
import logging
import re
from collections import Counter
from collections.abc import Iterable

log = logging.getLogger("trimtab")


class Missing(enum.Enum):
    """Why there is no answer. The judge's words (unreadable) are one thing, and that none came (not answered) is another."""

    EMPTY = "empty"  # there was nothing to judge
    UNREADABLE = "unreadable"
    REFUSED = "refused"
    UNANSWERED = "not answered"


# <think>, <seed:think>, <|START_THINKING|>, <|begin_of_thought|>, ◁think▷, [THINK] and their ends; the channels of GPT-OSS
# (<|channel|>analysis ... <|channel|>final<|message|>) and of Gemma (<|channel>thought ... <channel|>).
_WORD = r"(?:seed:)?(?:think|thinking|thoughts?|reason|reasoning|reflection|scratchpad|analysis)"
_OPEN = rf"(?i:[<◁]\|?(?:begin_of_|start_)?{_WORD}\|?[>▷])|\[THINK\]|<\|channel\|?>\s*(?:analysis|commentary|thought)\b"
_CLOSE = rf"(?i:[<◁]\|?(?:/|end_of_|end_){_WORD}\|?[>▷])|\[/THINK\]|<\|channel\|>\s*final\s*<\|message\|>|<channel\|>"
_MARK = re.compile(rf"(?P<opens>{_OPEN})|{_CLOSE}")


def spoken(reply: str, opening: str = "") -> str | None:
    """A reply without its thoughts; None if a thought was not closed, so that nothing was said.

    Args:
        reply: as it came.
        opening: what the template wrote after the last message, which may have opened a thought already.
    """
    _, thinking = _outside_thoughts(opening, thinking=False)
    said, thinking = _outside_thoughts(reply, thinking=thinking)
    return None if thinking else said.strip()


def _outside_thoughts(text: str, *, thinking: bool) -> tuple[str, bool]:
    """What stands outside of thoughts, and whether the text ends inside of one."""
    said: list[str] = []
    begin = 0
    for mark in _MARK.finditer(text):
        opens = mark["opens"] is not None
        if not thinking and opens:
            said.append(text[begin : mark.start()])
        elif not thinking:  # an end alone: the template opened the thought, and an endpoint does not show that
            said.clear()
        thinking, begin = opens, mark.end()
    return "".join([*said, "" if thinking else text[begin:]]), thinking


def say_missing(section: str, outcomes: Iterable[object], *, unreadable: str = "", fault: str = "") -> None:
    """Warn of what has no answer, each reason for itself.

    Args:
        section: key of the section that names the model.
        outcomes: what was found for each; a :class:`Missing` where nothing was.
        unreadable: a reply that was no answer, as an example.
        fault: what the endpoint did when it last did not answer, or refused.
    """
    found = list(outcomes)
    count = Counter(outcome for outcome in found if isinstance(outcome, Missing))
    for why, example in (
        (Missing.UNREADABLE, repr(unreadable[:80])),
        (Missing.REFUSED, fault),
        (Missing.UNANSWERED, fault),
    ):
        if count[why]:
            log.warning("%s: %d of %d have no answer: %s (%s)", section, count[why], len(found), why.value, example)
