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
from trimtab.recipes.faults import Fault, RecipeError, did_you_mean, nested
from trimtab.recipes.gone import GONE
from trimtab.recipes.library_fields import Fields, accepts, describe, lora_fields, train_config, train_fields
from trimtab.recipes.methods import DEFAULT_METHOD, METHODS
from trimtab.recipes.rules import impossible
from trimtab.recipes.schema import Recipe
from trimtab.recipes.yaml_lines import LONGEST, parse_yaml

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
FOLDER_KEYS = ("eval.capability_folder",)


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

    def placed(self, fault: Fault) -> Fault:
        """The fault with the place of its key: a line of the recipe, or the command line; with its own file, as it is."""
        if fault.file or not fault.key:
            return fault
        overridden = {override.partition("=")[0].strip() for override in self.overrides}
        return _Draft(str(self.path), {}, parse_yaml(self.text).lines, overridden).placed(fault)


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
        self.faults.append(self.placed(fault))

    def placed(self, fault: Fault) -> Fault:
        """The fault with the place of its key."""
        if self.from_command_line(fault.key) or self.file == COMMAND_LINE:
            return replace(fault, file=COMMAND_LINE)
        return replace(fault, file=self.file, line=fault.line if fault.line is not None else self._line_of(fault.key))

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
        with path.open("rb") as file:  # a recipe that is none may be of any size
            text = file.read(LONGEST + 1).decode("utf-8")
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
        values[option] = os.path.abspath(os.path.expanduser(value))
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
    if not asked.strip():
        raise RecipeError(
            [Fault("no recipe is named", "give a YAML file, or a name that `trimtab recipes` lists", "RECIPE")]
        )
    path = Path(os.path.expanduser(asked))
    if not os.path.isfile(path):  # unlike Path's own, it takes names that no file can have
        if asked in shipped:
            return shipped[asked], asked
        if os.path.isdir(path):
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
    path = base / os.path.expanduser(value)
    wants_folder = key in FOLDER_KEYS
    if not os.path.exists(path):
        if key in DATA_KEYS and is_hub_name(value):
            return value
        remedy = "check the path; one in a recipe is relative to the recipe's own folder"
        draft.add(Fault(f"no such {'folder' if wants_folder else 'file'}: {path}", remedy, key))
    elif key == "axis.path" and next(path.glob("*.pt"), None) is not None:
        pass  # a published role_vectors/ folder
    elif os.path.isdir(path) != wants_folder:
        kinds = ("a file", "a folder") if wants_folder else ("a folder", "a file")
        draft.add(Fault(f"this is {kinds[0]}: {path}", f"name {kinds[1]}", key))
    elif not os.access(path, os.R_OK):
        draft.add(Fault(f"this may not be read: {path}", "give yourself the right to read it", key))
    return os.path.normpath(path)


def _validate(draft: _Draft) -> Recipe | None:
    """Check the sections, then the combinations on what remains when faulty keys are left at their defaults."""
    method = _method_of(draft.data)
    sound = {
        "lora": _sound_values(draft, "lora", lora_fields(), "peft.LoraConfig"),
        "train": _sound_values(draft, "train", train_fields(method), train_config(method)),
    }
    data = {key: {} if value is None else value for key, value in (draft.data | sound).items()}
    told = {fault.key for fault in draft.faults}
    while True:
        try:
            recipe = Recipe.model_validate(data, strict=True)
            break
        except ValidationError as error:
            problem, before = error, data
        for fault, path in _schema_faults(problem, METHODS[method]):
            if fault.key not in told:
                told.add(fault.key)
                draft.add(fault)
            data = _without(data, path)
        if data == before:  # nothing is left that could be left out
            return None
    for fault in impossible(recipe, set(_dotted(draft.data))):
        # where a section was left out as faulty, nothing is to be said of it
        if not any(nested(fault.key, key) for key in told):
            draft.add(fault)
    return recipe


def _method_of(data: Mapping[str, Any]) -> str:
    """The method that a recipe names; where it names none, or one that there isn't, the default."""
    section = data.get("method")
    name = section.get("name") if isinstance(section, dict) else None
    return name if isinstance(name, str) and name in METHODS else DEFAULT_METHOD


def _sound_values(draft: _Draft, section: str, known: Fields, owner: str) -> Any:
    """A library's section without what is wrong by its name or its kind, which is told."""
    values = draft.data.get(section)
    if not isinstance(values, dict):
        return values
    sound = {}
    for name, value in values.items():
        key = f"{section}.{name}"
        if name not in known:
            draft.add(Fault(f"{owner} has no such key", did_you_mean(name, known, f"see the keys of {owner}"), key))
        elif not accepts(known[name], value):
            draft.add(Fault(f"expected {describe(known[name])}, got {_show(value)}", _type_remedy(value), key))
        else:
            sound[name] = value
    return sound


# Keys whose values have a form of their own: what is wrong with another, and how they are written.
_FORMS = {
    "floor.layers": ("these are not layers", "write auto, a range such as 46-53, or a list such as [46, 47]"),
    "model.device": ("this is not a device", "write auto, cpu, cuda, or one GPU of several: cuda:1"),
}
# Where a key lies: names, and numbers in lists.
_Place = tuple[str | int, ...]


def _schema_faults(error: ValidationError, method: type[BaseModel]) -> Iterator[tuple[Fault, _Place]]:
    """Each fault with the path of the key at fault."""
    for entry in error.errors():
        if entry["type"] == "union_tag_invalid":
            name = entry.get("ctx", {}).get("tag")
            remedy = did_you_mean(str(name), METHODS, f"choose one of {', '.join(METHODS)}")
            yield Fault(f"no such method: {_show(name)}", remedy, "method.name"), ("method", "name")
            continue
        path, section = _path_of(entry["loc"], method)
        key = _dotted_key(path)
        kind, value, context = entry["type"], entry.get("input"), entry.get("ctx", {})
        known = list(section.model_fields)
        if kind == "extra_forbidden":
            yield _unknown(path, known), path
        elif kind == "missing":
            yield Fault("is missing", f"add it: {key}={'smollm2-135m' if key == 'model.name' else '...'}", key), path
        elif kind == "value_error":
            fault, _, remedy = str(context.get("error")).partition(": ")
            named = fault.partition(" ")[0]
            inner = section if isinstance(path[-1], int) else _inner_section(section, path[-1])
            path = (*path, named) if inner is not None and named in inner.model_fields else path
            yield Fault(fault, remedy or "give another value", _dotted_key(path)), path
        elif key in _FORMS:
            fault, remedy = _FORMS[key]
            yield Fault(f"{fault}: {_show(value)}", remedy, key), path
        elif kind == "string_pattern_mismatch" and not str(value).strip():
            yield Fault("must not be empty", "write a value, or remove the key", key), path
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


def _dotted_key(path: _Place) -> str:
    return ".".join(map(str, path))


def _unknown(path: _Place, known: Sequence[str]) -> Fault:
    key, word = _dotted_key(path), str(path[-1])
    first = word.partition(".")[0]
    if "." in word and first in known:  # `train.learning_rate: 1` written flat in the file
        return Fault("a dotted key in the file", f"nest it under `{first}:`; dots are for the command line", key)
    if key in GONE:
        return Fault("this key is gone", GONE[key].remedy, key)
    what = "section" if len(path) == 1 else "key"
    return Fault(f"unknown {what}", did_you_mean(word, known, f"known here: {', '.join(known)}"), key)


def _path_of(location: Sequence[int | str], method: type[BaseModel]) -> tuple[_Place, type[BaseModel]]:
    """The path of pydantic's location, without the branches of a union, and the section that holds the key."""
    model: type[BaseModel] = Recipe
    parts: list[str | int] = []
    location = list(location)
    if len(location) > 1 and location[0] == "method":
        del location[1]  # the branch, which is the method's name
    for place in location:
        parts.append(place)
        if isinstance(place, int):  # an entry of a list of sections
            continue
        info = model.model_fields.get(place)
        if info is None:
            break
        inner = method if parts == ["method"] else _section_type(info.annotation)
        if inner is None:
            break
        if len(parts) < len(location):
            model = inner
    return tuple(parts), model


def _inner_section(section: type[BaseModel], name: str) -> type[BaseModel] | None:
    """The section that a key of a section holds, or None."""
    info = section.model_fields.get(name)
    return None if info is None else _section_type(info.annotation)


def _section_type(annotation: Any) -> type[BaseModel] | None:
    for each in (annotation, *get_args(annotation)):
        if isinstance(each, type) and issubclass(each, BaseModel):
            return each
    return None


# What has no default gets a stand-in when it is missing or wrong, so that the other checks can go on.
_STAND_INS: dict[_Place, Any] = {("model",): {"name": "?"}, ("model", "name"): "?"}


def _without(data: Mapping[str, Any], path: _Place) -> dict[str, Any]:
    """A copy in which the key at ``path`` has its default; of a fault in a list's entry, the whole list.

    Where there is no such key, as of one that is missing, the section goes that it is missing from.
    """
    names = [str(part) for part in itertools.takewhile(lambda part: isinstance(part, str), path)]
    copied = copy.deepcopy(dict(data))
    if (stand_in := _STAND_INS.get(path)) is not None:
        owner = copied
        for name in names[:-1]:
            owner = owner[name]
        owner[names[-1]] = copy.deepcopy(stand_in)
        return copied
    while names:
        place: Any = copied
        for name in names[:-1]:
            place = place.get(name) if isinstance(place, dict) else {}
        if isinstance(place, dict) and names[-1] in place:
            del place[names[-1]]
            break
        names.pop()
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
