"""Thoughts: how a chat template marks what a model says to itself before it answers. A thought is no part of an answer.

Nothing is looked up by a model's name. A template shows its marks where it writes a message's reasoning, where it writes an
empty thought before an answer, or by what it takes out of an answer once the conversation has gone on.
"""

from __future__ import annotations

import re
from typing import NamedTuple

from trimtab.axis.errors import UserError
from trimtab.axis.template import ChatTemplate, common_length, probes

# Names under which messages carry their reasoning; a template that reads one writes a thought with its marks.
REASONING = ("reasoning_content", "reasoning", "thinking")
# What a mark looks like: <think>, <|channel>, <channel|>, [THINK].
MARK = r"(?:<[^<>\s'\"{}]+>|\[/?[A-Z_]+\])"


class Marks(NamedTuple):
    """What begins a thought and what ends it, as the template writes them, without the space around."""

    opening: str
    closing: str

    def of(self, text: str) -> bool | None:
        """Whether the thought with which a text begins has ended; None where it begins with none."""
        if not text.lstrip().startswith(self.opening):
            return None
        return self.closing in text[text.index(self.opening) + len(self.opening) :]


class Headers(NamedTuple):
    """What stands between what the user says and where an answer begins.

    Attributes:
        prompt: as the template begins an answer.
        answer: as it writes one that is there; None where it writes none.
    """

    prompt: str
    answer: str | None

    @property
    def parted(self) -> tuple[str, str]:
        """What each has after their common beginning."""
        if self.answer is None:
            return "", ""
        common = common_length(self.prompt, self.answer)
        return self.prompt[common:], self.answer[common:]


def find_marks(template: ChatTemplate, headers: Headers) -> Marks | None:
    """The marks of a thought; None where the template shows none."""
    looks = (_where_reasoning_is_written, _of_an_empty_thought, _by_removal)
    return next((marks for look in looks if (marks := look(template, headers)) is not None), None)


def counterpart(opening: str) -> str | None:
    """The mark that closes this one, by how markup is written; None for what is no such mark."""
    found = re.fullmatch(r"(<|\[)(\w+)(>|\])", opening)
    return f"{found[1]}/{found[2]}{found[3]}" if found else None


def _rendered(template: ChatTemplate, *messages: dict[str, str], generation: bool = False, **more: object) -> str:
    """The rendering, "" where the template refuses."""
    try:
        return template.render(messages, generation=generation, **more)
    except UserError:
        return ""


def _where_reasoning_is_written(template: ChatTemplate, headers: Headers) -> Marks | None:
    asked, thought, said = probes(3)
    message = {"role": "assistant", "content": said, **dict.fromkeys(REASONING, thought)}
    text = _rendered(template, {"role": "user", "content": asked}, message)
    if not text.find(asked) < text.find(thought) < text.find(said):
        return None
    head = text[text.index(asked) + len(asked) : text.index(thought)]
    closing = text[text.index(thought) + len(thought) : text.index(said)].strip()
    opening = head[common_length(head, headers.prompt) :].strip()
    last = re.search(MARK + r"\s*$", head)
    opening = opening or (last[0].strip() if last else "")
    return Marks(opening, closing) if opening and closing else None


def _of_an_empty_thought(template: ChatTemplate, headers: Headers) -> Marks | None:
    """From two marks with nothing between, which a template writes before an answer that had no thought."""
    asked = probes(1)[0]
    on, off = (
        _rendered(template, {"role": "user", "content": asked}, generation=True, enable_thinking=thinking)
        for thinking in (True, False)
    )
    for text in (*headers.parted, *Headers(off.partition(asked)[2], on.partition(asked)[2]).parted):
        if found := re.fullmatch(rf"\s*({MARK}\w*)\s*({MARK})\s*", text):
            return Marks(found[1], found[2])
    return None


def _by_removal(template: ChatTemplate, headers: Headers) -> Marks | None:
    """From what is gone of an earlier answer: the text between two of the marks that stand in the template."""
    asked, thought, said, further = probes(4)

    def removed(before: str, after: str) -> bool:
        answer = {"role": "assistant", "content": f"{before}{thought}{after}{said}"}
        text = _rendered(
            template, {"role": "user", "content": asked}, answer, {"role": "user", "content": further}, generation=True
        )
        return said in text and thought not in text

    known = list(dict.fromkeys(re.findall(MARK, template.source)))
    for closing in known:
        others = [mark for mark in known if mark != closing]
        if not removed("".join(others), closing):
            continue
        if not removed("", closing):
            return next((Marks(mark, closing) for mark in others if removed(mark, closing)), None)
        # all up to the closing mark is gone, whatever opened it: the prompt may have, or its counterpart does
        began = [mark for mark in others if headers.parted[0].strip() == mark or counterpart(mark) == closing]
        return Marks(began[0], closing) if began else None
    return None
