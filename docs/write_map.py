"""Write docs/map.md: a line a module, the first of its own docstring.

python docs/write_map.py
"""

from __future__ import annotations

import ast
import re
import textwrap
import tomllib
from pathlib import Path

from source_tree import FOLDERS, ROOT

PAGE = ROOT / "docs" / "map.md"
HEAD = """# The map

What each module is for, in its own words: the first line of each, written by
`python docs/write_map.py`. No room imports one that stands below it. Only `eval/stages` and
`eval/merging` do: they call on the rooms of `eval/`. As a picture:
[how the source hangs together](structure.md).
"""


def first_line(path: Path) -> str:
    """The first line of a module's docstring."""
    found = ast.get_docstring(ast.parse(path.read_text(encoding="utf-8")))
    assert found, f"{path.relative_to(ROOT)} does not say what it is for"
    return re.sub(r":\w+:`~?([^`]+)`", r"`\1`", found.splitlines()[0].rstrip(".").replace("``", "`"))


def wrapped(text: str, indent: str = "") -> str:
    """Text in lines of 100 columns, the second and later ones indented."""
    lines = textwrap.wrap(text, 100, subsequent_indent=indent, break_long_words=False, break_on_hyphens=False)
    return "\n".join(lines)


def the_map() -> str:
    """The page."""
    packages = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["tool"]["setuptools"]["packages"]
    assert {name.removeprefix("trimtab.").replace(".", "/") for name in packages} == set(FOLDERS)
    parts = [HEAD]
    for folder in FOLDERS:
        said = first_line(ROOT / folder / "__init__.py")
        parts.append(f"## {folder}/\n\n{wrapped(f'{said}.')}\n")
        modules = [path for path in sorted((ROOT / folder).glob("*.py")) if path.stem != "__init__"]
        if modules:
            parts.append("\n".join(wrapped(f"- `{path.stem}`: {first_line(path)}", "  ") for path in modules) + "\n")
    return "\n".join(parts)


if __name__ == "__main__":
    PAGE.write_text(the_map(), encoding="utf-8")
