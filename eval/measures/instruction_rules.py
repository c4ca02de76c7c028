"""Rules that an answer keeps or breaks without anybody's opinion: the checks of the built-in instruction-following task."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

Rule = Mapping[str, Any]


def follows(answer: str, rules: Sequence[Rule]) -> bool:
    """Whether an answer keeps every rule; an empty one keeps none.

    Raises:
        ValueError: for a rule of an unknown kind.
    """
    text = answer.strip()
    kept = [_check(rule)(text, rule) for rule in rules]
    return bool(text) and all(kept)


def _check(rule: Rule) -> Callable[[str, Rule], bool]:
    if rule["kind"] not in CHECKS:
        raise ValueError(f"no such rule: {rule['kind']!r}; known: {', '.join(CHECKS)}")
    return CHECKS[rule["kind"]]


def _words(text: str) -> list[str]:
    return re.findall(r"[^\W_]+(?:['’-][^\W_]+)*", text)


def _has(text: str, word: str) -> bool:
    return re.search(rf"(?<!\w){re.escape(word)}(?!\w)", text, re.IGNORECASE) is not None


def _lines(text: str, pattern: str) -> list[str]:
    return [line.strip() for line in text.splitlines() if re.match(pattern, line.strip())]


def _json_keys(text: str, rule: Rule) -> bool:
    fenced = re.fullmatch(r"```(?:json)?\s*(.*?)\s*```", text, re.DOTALL)
    try:
        found = json.loads(fenced[1] if fenced else text)
    except json.JSONDecodeError:
        return False
    return isinstance(found, dict) and set(found) == set(rule["keys"])


def _numbered(text: str, rule: Rule) -> bool:
    numbers = [int(line.split(".")[0]) for line in _lines(text, r"\d+\.\s")]
    return numbers == list(range(1, rule["n"] + 1))


CHECKS: dict[str, Callable[[str, Rule], bool]] = {
    "max_words": lambda text, rule: len(_words(text)) <= rule["n"],
    "min_words": lambda text, rule: len(_words(text)) >= rule["n"],
    "includes": lambda text, rule: all(_has(text, word) for word in rule["words"]),
    "excludes": lambda text, rule: not any(_has(text, word) for word in rule["words"]),
    "bullets": lambda text, rule: len(_lines(text, r"[-*]\s")) == rule["n"],
    "numbered": _numbered,
    "ends_with": lambda text, rule: text.endswith(rule["text"]),
    "starts_with": lambda text, rule: text.startswith(rule["text"]),
    "lowercase": lambda text, _: text == text.lower() and any(letter.isalpha() for letter in text),
    "uppercase": lambda text, _: text == text.upper() and any(letter.isalpha() for letter in text),
    "one_line": lambda text, _: "\n" not in text,
    "json_keys": _json_keys,
    "questions": lambda text, rule: text.count("?") >= rule["n"],
    "no_digits": lambda text, _: not any(letter.isdigit() for letter in text),
}
