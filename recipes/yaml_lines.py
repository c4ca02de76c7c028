"""YAML with line numbers, repeated keys as faults, and the scalars that people mean.

PyYAML follows YAML 1.1, where ``1e-4`` is a string, ``no`` is false, ``010`` is eight and ``46:54`` is 2814. Recipes follow the
YAML 1.2 core schema instead: only ``true`` and ``false`` are booleans, ``1e-4`` is a number, and the rest are strings.
"""

from __future__ import annotations

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
_CoreLoader.add_constructor("tag:yaml.org,2002:int", lambda _, node: int(node.value))
_CoreLoader.add_constructor("tag:yaml.org,2002:float", lambda _, node: float(node.value))


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


def _build(loader: _CoreLoader, node: yaml.Node, path: str, parsed: ParsedYaml, above: tuple[int, ...]) -> Any:
    line = node.start_mark.line + 1
    if id(node) in above:
        parsed.faults.append(Fault("an alias that contains itself", "write the value out", path, line=line))
        return None
    within = (*above, id(node))
    if isinstance(node, yaml.MappingNode):
        mapping: dict[str, Any] = {}
        for key_node, value_node in node.value:
            key_line = key_node.start_mark.line + 1
            if not isinstance(key_node, yaml.ScalarNode):
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
    except (yaml.YAMLError, ValueError) as error:
        problem = getattr(error, "problem", None) or str(error)
        parsed.faults.append(
            Fault(f"not a plain value: {problem}", "write a plain value without a tag", path, line=line)
        )
        return None
