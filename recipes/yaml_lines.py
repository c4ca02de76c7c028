"""YAML with line numbers, repeated keys as faults, and the scalars that people mean.

PyYAML follows YAML 1.1, where ``1e-4`` is a string, ``no`` is false, ``010`` is eight and ``46:54`` is 2814. Recipes follow the
YAML 1.2 core schema instead: only ``true`` and ``false`` are booleans, ``1e-4`` is a number, and the rest are strings.

A text may be of any origin: it is measured before it is built, so that neither deep nesting nor aliases of aliases cost more than
a fault. Values that no library takes are faults too: numbers beyond 64 bits, and text that no file name or report can hold.
"""

from __future__ import annotations

import math
import re
from dataclasses import dataclass, field
from typing import Any

import yaml

from trimtab.recipes.faults import Fault


class _CoreLoader(yaml.SafeLoader):
    """The safe loader with the scalars of YAML 1.2."""

    yaml_implicit_resolvers: dict[str, Any] = {}  # noqa: RUF012 - PyYAML reads it from the class


_CoreLoader.add_implicit_resolver("tag:yaml.org,2002:bool", re.compile(r"^(?:true|True|TRUE|false|False|FALSE)$"), None)
_CoreLoader.add_implicit_resolver("tag:yaml.org,2002:null", re.compile(r"^(?:~|null|Null|NULL|)$"), None)
_CoreLoader.add_implicit_resolver("tag:yaml.org,2002:int", re.compile(r"^[-+]?[0-9]+$"), None)
_CoreLoader.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"^[-+]?(?:\.[0-9]+|[0-9]+(?:\.[0-9]*)?)(?:[eE][-+]?[0-9]+)?$"), None
)
_TAGS = {f"tag:yaml.org,2002:{name}" for name in ("map", "seq", "null", "bool", "int", "float", "str")}

# A recipe has about 100 values in five levels, and 5,000 characters.
MOST_VALUES, DEEPEST, LONGEST = 10_000, 50, 1 << 20
LARGEST = 1 << 63


def _whole_number(_: Any, node: Any) -> int:
    # by its length first: Python refuses to read thousands of digits, and takes long
    value = int(node.value) if len(node.value) < 40 else LARGEST
    if abs(value) >= LARGEST:
        raise ValueError("a number beyond 64 bits")
    return value


def _number(_: Any, node: Any) -> float:
    value = float(node.value)
    if not math.isfinite(value):
        raise ValueError("a number beyond what a computer holds")
    return value


def _text(_: Any, node: Any) -> str:
    value = str(node.value)
    if "\0" in value or any("\ud800" <= letter <= "\udfff" for letter in value):
        raise ValueError("text with a NUL or half a character")
    return value


_CoreLoader.add_constructor("tag:yaml.org,2002:int", _whole_number)
_CoreLoader.add_constructor("tag:yaml.org,2002:float", _number)
_CoreLoader.add_constructor("tag:yaml.org,2002:str", _text)


@dataclass
class ParsedYaml:
    """What a YAML text holds.

    Attributes:
        value: mappings, lists and scalars.
        lines: dotted key -> line, from 1; list items by their number.
        faults: what was wrong, without the file.
    """

    value: Any = None
    lines: dict[str, int] = field(default_factory=dict)
    faults: list[Fault] = field(default_factory=list)


def parse_yaml(text: str) -> ParsedYaml:
    """Parse a YAML text; whatever is wrong with it lies in ``faults``."""
    parsed = ParsedYaml()
    try:
        if (fault := too_much(text)) is not None:
            parsed.faults.append(fault)
            return parsed
        loader = _CoreLoader(text)
        node = loader.get_single_node()
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        problem = getattr(error, "problem", None) or str(error).splitlines()[0]
        remedy = "mend the YAML: look at the indentation (spaces, no tabs), colons and quotes about this line"
        parsed.faults.append(
            Fault(f"not readable as YAML: {problem}", remedy, line=mark.line + 1 if mark is not None else None)
        )
        return parsed
    parsed.value = _build(loader, node, "", parsed, ()) if node is not None else None
    return parsed


def too_much(text: str) -> Fault | None:
    """The fault of a text that nests or repeats without end, found from its events alone; each alias counts as what it names."""
    if len(text) > LONGEST:
        return Fault(f"{len(text):,} characters are no recipe", "name a recipe: a YAML file of some 100 lines")
    sizes: dict[str, int] = {}
    open_ones: list[tuple[str | None, int]] = []  # anchor of each collection that is open, and the values before it
    values = 0
    for event in yaml.parse(text, Loader=_CoreLoader):
        line = event.start_mark.line + 1 if event.start_mark is not None else None
        if isinstance(event, yaml.CollectionStartEvent):
            open_ones.append((event.anchor, values))
        if isinstance(event, yaml.AliasEvent):
            values += sizes.get(str(event.anchor), 1)
        elif isinstance(event, yaml.NodeEvent):
            values += 1
        elif isinstance(event, yaml.CollectionEndEvent):
            anchor, before = open_ones.pop()
            if anchor is not None:
                sizes[anchor] = values - before
        if len(open_ones) > DEEPEST:
            return Fault(f"nested deeper than {DEEPEST} levels", "no section of a recipe is that deep", line=line)
        if values > MOST_VALUES:
            return Fault(
                f"more than {MOST_VALUES:,} values, aliases counted as what they name", "write a recipe", line=line
            )
    return None


def _is_plain(word: str) -> bool:
    return word.isprintable() and word.strip() == word


def _build(loader: _CoreLoader, node: yaml.Node, path: str, parsed: ParsedYaml, above: tuple[int, ...]) -> Any:
    line = node.start_mark.line + 1
    if id(node) in above:
        parsed.faults.append(Fault("an alias that contains itself", "write the value out", path, line=line))
        return None
    within = (*above, id(node))
    if node.tag not in _TAGS:
        parsed.faults.append(Fault(f"not a plain value: tag {node.tag!r}", "write it without a tag", path, line=line))
        return None
    if isinstance(node, yaml.MappingNode):
        mapping: dict[str, Any] = {}
        for key_node, value_node in node.value:
            key_line = key_node.start_mark.line + 1
            if not isinstance(key_node, yaml.ScalarNode) or not _is_plain(key_node.value):
                parsed.faults.append(Fault("a key must be a plain word", "mend the key", path, line=key_line))
                continue
            key = f"{path}.{key_node.value}" if path else key_node.value
            if key_node.value in mapping:
                fault = f"the key stands twice in the file, first on line {parsed.lines[key]}"
                parsed.faults.append(Fault(fault, "keep one of the two", key, line=key_line))
            parsed.lines[key] = key_line
            mapping[key_node.value] = _build(loader, value_node, key, parsed, within)
        return mapping
    if isinstance(node, yaml.SequenceNode):
        items: list[Any] = []
        for number, item in enumerate(node.value):
            key = f"{path}.{number}"
            parsed.lines[key] = item.start_mark.line + 1
            items.append(_build(loader, item, key, parsed, within))
        return items
    try:
        return loader.construct_object(node)
    except (ValueError, KeyError) as error:  # of a tag that the value does not fit, or a value that nothing takes
        problem = error if isinstance(error, ValueError) else f"{node.value!r} is none of its tag's"
        parsed.faults.append(Fault(f"not a plain value: {problem}", "write another value", path, line=line))
        return None
