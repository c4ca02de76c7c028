"""Load a recipe: a YAML file or the name of a shipped one, with overrides, and all its faults at once.

Nothing heavy is imported here: a slip is told in a fraction of a second.
"""

from __future__ import annotations

import copy
import itertools
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, get_args

import yaml
from pydantic import BaseModel, ValidationError

from trimtab.axis.rows import is_hub_name
from trimtab.recipes.faults import Fault, RecipeError, did_you_mean
from trimtab.recipes.library_fields import Fields, accepts, describe, lora_fields, train_config, train_fields
from trimtab.recipes.rules import impossible
from trimtab.recipes.schema import METHODS, Recipe
from trimtab.recipes.yaml_lines import parse_yaml

FOLDER = Path(__file__).parent
COMMAND_LINE = "command line"
PATH_KEYS = (
    "axis.path",
    "floor.path",
    "data.drift_file",
    "data.benign_file",
    "eval.boundary_file",
    "eval.conversations_file",
    "eval.capability_folder",
    "eval.durability.file",
)
# Those of them that name conversations, which may be a data set of the hub, and those that may be a file on it.
DATA_KEYS = (
    "data.drift_file",
    "data.benign_file",
    "eval.boundary_file",
    "eval.conversations_file",
    "eval.durability.file",
)
HUB_KEYS = ("axis.path", "floor.path", *DATA_KEYS)


@dataclass(frozen=True)
class LoadedRecipe:
    """A recipe that was read and checked.

    Attributes:
        recipe: the recipe.
        path: its file.
        text: the file's text, as it was.
        resolved: the whole recipe with overrides and defaults, JSON-able.
        name: ``<model>/<method>`` of a shipped recipe, else the file's stem.
        overrides: the overrides as given.
    """

    recipe: Recipe
    path: Path
    text: str
    resolved: dict[str, Any]
    name: str
    overrides: tuple[str, ...] = ()


@dataclass
class _Draft:
    """A recipe on its way: plain data, where each key came from, and the faults so far."""

    file: str
    data: dict[str, Any]
    lines: dict[str, int]
    overridden: set[str] = field(default_factory=set)
    faults: list[Fault] = field(default_factory=list)

    def from_command_line(self, key: str) -> bool:
        """Whether the key, the mapping it lies in, or all there is below it, came from an override."""
        within = any(key == name or key.startswith(f"{name}.") for name in self.overridden)
        return within or (key not in self.lines and any(name.startswith(f"{key}.") for name in self.overridden))

    def add(self, fault: Fault) -> None:
        """Add a fault with the place of its key."""
        if self.from_command_line(fault.key):
            placed = replace(fault, file=COMMAND_LINE)
        else:
            line = fault.line if fault.line is not None else self._line_of(fault.key)
            placed = replace(fault, file=self.file, line=line)
        self.faults.append(placed)

    def _line_of(self, key: str) -> int | None:
        while key:
            if key in self.lines:
                return self.lines[key]
            key = key.rpartition(".")[0]
        return None


def shipped_recipes() -> dict[str, Path]:
    """Name -> file of the recipes that ship with trimtab."""
    return {f"{path.parent.name}/{path.stem}": path for path in sorted(FOLDER.glob("*/*.yaml"))}


def load_recipe(path_or_name: str | Path, overrides: Sequence[str] = ()) -> LoadedRecipe:
    """Read and check a recipe.

    Relative paths inside the file are relative to the file; those in overrides to the working directory.

    Args:
        path_or_name: a YAML file, or a shipped recipe's name such as ``smollm2-135m/sft``.
        overrides: ``section.key=value``, the value as in YAML.

    Raises:
        RecipeError: with every fault, each with file, key and remedy.
    """
    path, name = _find(str(path_or_name))
    try:
        text = path.read_bytes().decode("utf-8")
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "it is not UTF-8 text"
        raise RecipeError(
            [Fault(f"the file can't be read: {reason}", "check the path and its permissions", file=str(path))]
        ) from error
    return _load(text, path, name, overrides)


def recipe_of(sections: Mapping[str, Any], name: str, overrides: Sequence[str] = ()) -> LoadedRecipe:
    """A recipe that a command makes from its options; relative paths are relative to the working directory.

    Args:
        sections: as in a file.
        name: of the job, which names the run folder.
        overrides: ``section.key=value``, the value as in YAML.

    Raises:
        RecipeError: with every fault, each with key and remedy.
    """
    content = {section: dict(keys) for section, keys in sections.items()}
    for _, values, option, value in _paths(content):
        # the text is kept in the run folder and read there again
        values[option] = os.path.abspath(Path(value).expanduser())
    return _load(yaml.safe_dump(content, sort_keys=False), Path(COMMAND_LINE), name, overrides)


def _load(text: str, path: Path, name: str, overrides: Sequence[str]) -> LoadedRecipe:
    parsed = parse_yaml(text)
    if parsed.faults and parsed.value is None:
        raise RecipeError([replace(fault, file=str(path)) for fault in parsed.faults])
    if not isinstance(parsed.value, dict):
        fault = "the file is empty" if parsed.value is None else "a recipe is a mapping of sections"
        remedy = "begin with `model:` and its `name:`; `trimtab recipes` lists recipes to copy"
        raise RecipeError([Fault(fault, remedy, file=str(path))])
    draft = _Draft(str(path), parsed.value, parsed.lines)
    for each in parsed.faults:
        draft.add(each)
    for override in overrides:
        _override(draft, override)
    _resolve_paths(draft, path.parent)
    recipe = _validate(draft)
    if draft.faults or recipe is None:
        raise RecipeError(sorted(draft.faults, key=lambda fault: (fault.file == COMMAND_LINE, fault.line or 0)))
    return LoadedRecipe(recipe, path, text, recipe.model_dump(mode="json"), name, tuple(overrides))


def _find(asked: str) -> tuple[Path, str]:
    shipped = shipped_recipes()
    path = Path(asked).expanduser()
    if not path.is_file():
        if asked in shipped:
            return shipped[asked], asked
        if path.is_dir():
            raise RecipeError([Fault("this is a folder", "name a YAML file in it", file=asked)])
        if path.suffix in (".yaml", ".yml"):
            remedy = f"check the path, from {Path.cwd()}; `trimtab recipes` lists those that ship"
            raise RecipeError([Fault("no such file", remedy, file=asked)])
        otherwise = f"give a YAML file, or one of: {', '.join(shipped)}"
        remedy = did_you_mean(asked, shipped, otherwise)
        raise RecipeError([Fault("no such recipe", remedy, file=asked)])
    path = path.resolve()
    names = {file.resolve(): name for name, file in shipped.items()}
    return path, names.get(path, path.stem)


def _override(draft: _Draft, override: str) -> None:
    key, equals, text = override.partition("=")
    key = key.strip()
    parts = key.split(".")
    if not equals or not all(parts) or len(parts) < 2:
        fault = f"{override!r} is not an override"
        draft.faults.append(
            Fault(fault, "write section.key=value, such as train.learning_rate=1e-4", file=COMMAND_LINE)
        )
        return
    value = parse_yaml(text)
    if value.faults:
        draft.faults.append(replace(value.faults[0], file=COMMAND_LINE, key=key, line=None))
        return
    place = draft.data
    for part in parts[:-1]:
        inner = place.setdefault(part, {})
        if inner is None:  # a section that stands empty in the file
            inner = place[part] = {}
        if not isinstance(inner, dict):
            fault = f"{part!r} is a value, not a section"
            draft.faults.append(Fault(fault, "override the key itself", key, COMMAND_LINE))
            return
        place = inner
    place[parts[-1]] = value.value
    draft.overridden.add(key)


def _resolve_paths(draft: _Draft, folder: Path) -> None:
    for key, values, name, value in _paths(draft.data):
        values[name] = _resolved(draft, folder, key, value)


def _paths(content: Mapping[str, Any]) -> Iterator[tuple[str, dict[str, Any], str, str]]:
    """Key, the mapping it lies in, its name there, and the path: of every path in a recipe that is not on the hub."""
    for key in PATH_KEYS:
        *sections, name = key.split(".")
        within: Any = content
        for section in sections:
            within = within.get(section) if isinstance(within, dict) else None
        for values in within if isinstance(within, list) else [within]:
            value = values.get(name) if isinstance(values, dict) else None
            if isinstance(value, str) and not (key in HUB_KEYS and value.startswith("hf://")):
                yield key, values, name, value


def _resolved(draft: _Draft, folder: Path, key: str, value: str) -> str:
    base = Path.cwd() if draft.from_command_line(key) else folder
    path = base / Path(value).expanduser()
    if not path.exists():
        if key in DATA_KEYS and is_hub_name(value):
            return value
        remedy = "check the path; one in a recipe is relative to the recipe's own folder"
        draft.add(Fault(f"no such file: {path}", remedy, key))
    return os.path.normpath(path)


def _validate(draft: _Draft) -> Recipe | None:
    """Check the sections, then the combinations on what remains when faulty keys are left at their defaults."""
    method = _method_of(draft.data)
    _check_library_section(draft, "lora", lora_fields(), "peft.LoraConfig")
    _check_library_section(draft, "train", train_fields(method), train_config(method))
    data = {key: {} if value is None else value for key, value in draft.data.items()}
    told = {fault.key for fault in draft.faults}
    while True:
        try:
            recipe = Recipe.model_validate(data, strict=True)
            break
        except ValidationError as error:
            before, problem = data, error
        for fault, path in _schema_faults(problem, METHODS[method]):
            if fault.key not in told:
                told.add(fault.key)
                draft.add(fault)
            data = _without(data, path)
        if data == before:  # a fault that leaving out its key does not mend
            raise problem
    for fault in impossible(recipe, set(_dotted(draft.data))):
        if fault.key not in told:
            draft.add(fault)
    return recipe


def _method_of(data: Mapping[str, Any]) -> str:
    """The method that a recipe names; where it names none, or one that there isn't, the default."""
    section = data.get("method")
    name = section.get("name") if isinstance(section, dict) else None
    return name if isinstance(name, str) and name in METHODS else "sft"


def _check_library_section(draft: _Draft, section: str, known: Fields, owner: str) -> None:
    values = draft.data.get(section)
    if not isinstance(values, dict):
        return
    for name, value in values.items():
        key = f"{section}.{name}"
        if name not in known:
            draft.add(Fault(f"{owner} has no such key", did_you_mean(name, known, f"see the keys of {owner}"), key))
        elif not accepts(known[name], value):
            draft.add(Fault(f"expected {describe(known[name])}, got {_show(value)}", _type_remedy(value), key))


def _schema_faults(error: ValidationError, method: type[BaseModel]) -> Iterator[tuple[Fault, tuple[str, ...]]]:
    """Each fault with the path of the key at fault."""
    for entry in error.errors():
        if entry["type"] == "union_tag_invalid":
            name = entry.get("ctx", {}).get("tag")
            remedy = did_you_mean(str(name), METHODS, f"choose one of {', '.join(METHODS)}")
            yield Fault(f"no such method: {name!r}", remedy, "method.name"), ("method", "name")
            continue
        path, section = _path_of(entry["loc"], method)
        key = ".".join(path)
        kind, value, context = entry["type"], entry.get("input"), entry.get("ctx", {})
        known = list(section.model_fields)
        if kind == "extra_forbidden":
            yield _unknown(path, known), path
        elif kind == "missing":
            yield Fault("is missing", f"add it: {key}={'smollm2-135m' if key == 'model.name' else '...'}", key), path
        elif kind == "value_error":
            fault, _, remedy = str(context.get("error")).partition(": ")
            named = fault.split()[0]
            inner = section if path[-1].isdigit() else _section_type(section.model_fields[path[-1]].annotation)
            path = (*path, named) if inner is not None and named in inner.model_fields else path
            yield Fault(fault, remedy, ".".join(path)), path
        elif key == "floor.layers":
            remedy = "write auto, a range such as 46-53, or a list such as [46, 47]"
            yield Fault(f"these are not layers: {_show(value)}", remedy, key), path
        elif kind == "literal_error":
            choices = str(context.get("expected"))
            words = choices.replace("'", "").replace(" or ", ", ").split(", ")
            remedy = did_you_mean(str(value), words, "choose one of them")
            yield Fault(f"must be {choices}, got {_show(value)}", remedy, key), path
        else:
            wanted, remedy = entry["msg"].removeprefix("Input should be "), _type_remedy(value)
            if kind == "model_type":
                wanted, remedy = "a section, with keys of its own", "write its keys indented below it"
            elif kind.startswith(("greater", "less")):
                remedy = "give a number in that range"
            yield Fault(f"expected {wanted}, got {_show(value)}", remedy, key), path


def _unknown(path: tuple[str, ...], known: Sequence[str]) -> Fault:
    key, word = ".".join(path), path[-1]
    first = word.partition(".")[0]
    if "." in word and first in known:  # `train.learning_rate: 1` written flat in the file
        return Fault("a dotted key in the file", f"nest it under `{first}:`; dots are for the command line", key)
    what = "section" if len(path) == 1 else "key"
    return Fault(f"unknown {what}", did_you_mean(word, known, f"known here: {', '.join(known)}"), key)


def _path_of(location: Sequence[int | str], method: type[BaseModel]) -> tuple[tuple[str, ...], type[BaseModel]]:
    """The path of pydantic's location, without the branches of a union, and the section that holds the key."""
    model: type[BaseModel] = Recipe
    parts: list[str] = []
    location = list(location)
    if len(location) > 1 and location[0] == "method":
        del location[1]  # the branch, which is the method's name
    for place in location:
        part = str(place)
        parts.append(part)
        if isinstance(place, int):  # an entry of a list of sections
            continue
        info = model.model_fields.get(part)
        if info is None:
            break
        inner = method if parts == ["method"] else _section_type(info.annotation)
        if inner is None:
            break
        if len(parts) < len(location):
            model = inner
    return tuple(parts), model


def _section_type(annotation: Any) -> type[BaseModel] | None:
    for each in (annotation, *get_args(annotation)):
        if isinstance(each, type) and issubclass(each, BaseModel):
            return each
    return None


# What has no default gets a stand-in when it is missing or wrong, so that the other checks can go on.
_STAND_INS: dict[tuple[str, ...], Any] = {
    ("model",): {"name": "?"},
    ("model", "name"): "?",
    ("axis", "judge", "model"): "?",
}


def _without(data: Mapping[str, Any], path: tuple[str, ...]) -> dict[str, Any]:
    """A copy in which the key at ``path`` has its default; of a fault in a list's entry, the whole list."""
    path = tuple(itertools.takewhile(lambda part: not part.isdigit(), path))
    copied = copy.deepcopy(dict(data))
    place: Any = copied
    for part in path[:-1]:
        place = place.get(part)
        if not isinstance(place, dict):  # an earlier fault took the whole section away
            return copied
    place.pop(path[-1], None)
    if path in _STAND_INS:
        place[path[-1]] = copy.deepcopy(_STAND_INS[path])
    return copied


def _dotted(data: Mapping[str, Any], above: str = "") -> Iterator[str]:
    for name, value in data.items():
        key = f"{above}{name}"
        yield key
        if isinstance(value, dict):
            yield from _dotted(value, f"{key}.")


def _show(value: Any) -> str:
    kinds = {bool: "boolean", int: "whole number", float: "number", str: "text", list: "list", dict: "mapping"}
    text = repr(value) if len(repr(value)) <= 60 else f"{repr(value)[:57]}..."
    return "nothing" if value is None else f"{text} ({kinds.get(type(value), type(value).__name__)})"


def _type_remedy(value: Any) -> str:
    if isinstance(value, str) and isinstance(parse_yaml(value).value, (int, float)):
        return "take the quotes away"
    if isinstance(value, (int, float)):
        return "give a value of that kind; a number that is meant as text needs quotes"
    return "give a value of that kind"
