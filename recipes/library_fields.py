"""The keys that TRL's configs and PEFT's LoraConfig take, read from their source without importing them.

Importing trl or peft imports torch and takes seconds; a slip in a recipe should be told at once. The dataclasses' annotated
fields are read with ``ast`` from the files of the installed packages.
"""

from __future__ import annotations

import ast
import functools
import importlib.util
from pathlib import Path
from typing import Any

from trimtab.axis.errors import not_installed
from trimtab.recipes.methods import GRPO_CONFIG, METHODS

# (package, file, class), from the class itself down to its bases: the first annotation of a field wins.
_TRAIN_BASES = (
    ("trl", "trainer/base_config.py", "_BaseConfig"),
    ("transformers", "training_args.py", "TrainingArguments"),
)
# Of GRPOConfig, what says how rollouts are sampled by vLLM: methods on rows take it too, and sample by the same part of TRL.
VLLM_SETTINGS = (
    "mode", "model_impl", "enable_sleep_mode", "server_base_url", "server_host", "server_port", "server_timeout", "group_port",
    "gpu_memory_utilization", "max_model_length", "tensor_parallel_size",
)  # fmt: skip
VLLM_KEYS = ("use_vllm", *(f"vllm_{name}" for name in VLLM_SETTINGS))

LORA_CLASSES = (
    ("peft", "tuners/lora/config.py", "LoraConfig"),
    ("peft", "config.py", "PeftConfig"),
    ("peft", "config.py", "PeftConfigMixin"),
)

Fields = dict[str, ast.expr]


def train_config(method: str) -> str:
    """Name of the config class of a method, such as ``trl.SFTConfig``."""
    config = METHODS[method].trl_config
    return f"{config.package}.{config.name}"


def train_fields(method: str) -> Fields:
    """Field name -> annotation of what ``train`` takes: a method's config class, and how vLLM is run."""
    own = _fields_of((METHODS[method].trl_config, *_TRAIN_BASES))
    if not METHODS[method].lacks_vllm:
        return own
    of_vllm = _fields_of((GRPO_CONFIG, *_TRAIN_BASES))
    return {**own, **{key: annotation for key, annotation in of_vllm.items() if key in VLLM_KEYS}}


def lora_fields() -> Fields:
    """Field name -> annotation of ``peft.LoraConfig``."""
    return _fields_of(LORA_CLASSES)


@functools.cache
def _fields_of(classes: tuple[tuple[str, str, str], ...]) -> Fields:
    found: Fields = {}
    for package, file, name in classes:
        for field, annotation in _fields_in(_folder_of(package) / file, name).items():
            found.setdefault(field, annotation)
    return found


def _folder_of(package: str) -> Path:
    spec = importlib.util.find_spec(package)  # finds a top-level package without importing it
    if spec is None or not spec.submodule_search_locations:
        raise not_installed(package)
    return Path(spec.submodule_search_locations[0])


def _fields_in(path: Path, name: str) -> Fields:
    tree = ast.parse(path.read_text(encoding="utf-8"))
    for node in tree.body:
        if isinstance(node, ast.ClassDef) and node.name == name:
            return {
                line.target.id: line.annotation
                for line in node.body
                if isinstance(line, ast.AnnAssign) and isinstance(line.target, ast.Name) and _is_argument(line)
            }
    raise RuntimeError(f"{path} has no class {name}: this version of the package is not supported")


def _is_argument(line: ast.AnnAssign) -> bool:
    if "ClassVar" in ast.unparse(line.annotation):
        return False
    keywords = line.value.keywords if isinstance(line.value, ast.Call) else []
    return not any(k.arg == "init" and isinstance(k.value, ast.Constant) and k.value.value is False for k in keywords)


_PLAIN: dict[str, tuple[type, ...]] = {
    "int": (int,),
    "float": (int, float),
    "str": (str,),
    "bool": (bool,),
    "dict": (dict,),
    "list": (list,),
    "tuple": (list,),
}


def accepts(annotation: ast.expr, value: Any) -> bool:
    """Whether a value from YAML fits a field's annotation.

    Enumerations and nested config classes, which can't be known without importing them, take a string, a mapping or a list;
    the library itself judges those.
    """
    if isinstance(annotation, ast.Constant):
        if isinstance(annotation.value, str):
            return accepts(ast.parse(annotation.value, mode="eval").body, value)
        return annotation.value is value
    if isinstance(annotation, ast.BinOp):
        return accepts(annotation.left, value) or accepts(annotation.right, value)
    if isinstance(annotation, ast.Subscript):
        return _accepts_generic(annotation, value)
    name = ast.unparse(annotation).rpartition(".")[2]
    if name == "Any":
        return True
    if isinstance(value, bool):
        return name == "bool"
    return isinstance(value, _PLAIN.get(name, (str, dict, list)))


def _accepts_generic(annotation: ast.Subscript, value: Any) -> bool:
    outer = ast.unparse(annotation.value).rpartition(".")[2]
    inner = annotation.slice.elts if isinstance(annotation.slice, ast.Tuple) else [annotation.slice]
    if outer == "Optional":
        return value is None or accepts(inner[0], value)
    if outer == "Union":
        return any(accepts(part, value) for part in inner)
    if outer == "Literal":
        return any(isinstance(part, ast.Constant) and part.value == value for part in inner)
    if outer in ("list", "List"):
        return isinstance(value, list) and all(accepts(inner[0], item) for item in value)
    if outer in ("dict", "Dict"):
        return isinstance(value, dict) and all(accepts(inner[1], item) for item in value.values())
    return isinstance(value, (list, dict, str))


def describe(annotation: ast.expr) -> str:
    """The annotation as a reader of YAML would say it."""
    return " or ".join("null" if part == "None" else part for part in _parts(annotation))


def _parts(annotation: ast.expr) -> list[str]:
    if isinstance(annotation, ast.BinOp):
        return [*_parts(annotation.left), *_parts(annotation.right)]
    if isinstance(annotation, ast.Subscript):
        outer = ast.unparse(annotation.value).rpartition(".")[2]
        inner = annotation.slice.elts if isinstance(annotation.slice, ast.Tuple) else [annotation.slice]
        if outer == "Optional":
            return [*_parts(inner[0]), "None"]
        if outer == "Union":
            return [part for each in inner for part in _parts(each)]
        if outer == "Literal":
            return [ast.unparse(part) for part in inner]
    return [ast.unparse(annotation)]
