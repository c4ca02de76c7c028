"""Every option is used by a shipped recipe, or documented: one that is neither helps nobody, and leaves."""

from __future__ import annotations

import functools
import re
from collections.abc import Iterator
from typing import Any

import pytest
from tiny_recipe import ROOT

from trimtab.recipes.loader import load_recipe, shipped_recipes
from trimtab.recipes.schema import Section

Option = tuple[type[Section], str]


def sections(above: type[Section] = Section) -> Iterator[type[Section]]:
    """All sections of the schema."""
    for section in above.__subclasses__():
        yield section
        yield from sections(section)


def declared(section: type[Section], key: str) -> Option:
    """The key, with the section that declares it or gives it another default."""
    return next((each, key) for each in section.__mro__ if key in each.__annotations__)  # type: ignore[return-value]


OPTIONS = sorted(
    {declared(section, key) for section in sections() for key in section.model_fields},
    key=lambda option: (option[0].__name__, option[1]),
)


def set_in(value: Any) -> Iterator[Option]:
    """What a section of a recipe says otherwise than the default, and its inner sections."""
    for inner in value if isinstance(value, list) else ():
        yield from set_in(inner)
    for key, field in type(value).model_fields.items() if isinstance(value, Section) else ():
        held = getattr(value, key)
        if held != field.get_default(call_default_factory=True):
            yield declared(type(value), key)
        yield from set_in(held)


@functools.cache
def used() -> set[Option]:
    """Options that some shipped recipe sets."""
    return {option for name in shipped_recipes() for option in set_in(load_recipe(name).recipe)}


@functools.cache
def documented() -> set[str]:
    """Words in code of the documentation."""
    pages = [*(ROOT / "docs").glob("*.md"), ROOT / "README.md"]
    code = [part for page in pages for part in re.findall(r"```.*?```|`[^`\n]+`", page.read_text("utf-8"), re.DOTALL)]
    return {word for part in code for word in re.findall(r"\w+", part)}


@pytest.mark.parametrize("option", OPTIONS, ids=lambda option: f"{option[0].__name__}.{option[1]}")
def test_an_option_is_used_or_documented(option: Option) -> None:
    assert option in used() or option[1] in documented(), (
        "no shipped recipe sets it and no page of docs names it: use it, document it, or remove it"
    )
