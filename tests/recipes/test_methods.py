"""What is to be known of a method stands on its class alone: none can leave it out, and nothing else asks for its name."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path
from typing import Any, ClassVar, Literal

import pytest

from trimtab.recipes import methods
from trimtab.recipes.methods import METHODS, TRAIN, MethodSection, PairMethod, RowMethod
from trimtab.recipes.sections import Section

ROOT = Path(__file__).resolve().parents[2]
FACTS = sorted(MethodSection.__class_vars__ - Section.__class_vars__)
KINDS = {
    name for name, kind in vars(methods).items() if isinstance(kind, type) and issubclass(kind, MethodSection)
}  # fmt: skip


def whole() -> dict[str, Any]:
    """The body of a class that says all that a method on pairs has to say of itself."""
    return {
        "__module__": __name__,
        "__annotations__": {"name": Literal["ipo"]},
        "trl_config": methods.DPO_CONFIG,
        "not_yours": {},
        "train_defaults": TRAIN,
        "rows_a_step": methods.ROWS_A_STEP,
        "learning_rates": (1e-3, 1e-4),
        "benign_share": 0.1,
        "compares_distributions": False,
        "forwards_beside": lambda self, train: 1.0,
        "own_weights": lambda self, train: {"IPO's own loss": 1.0},
    }


def as_facts(body: dict[str, Any]) -> dict[str, Any]:
    """The same with the facts marked as no keys of a recipe."""
    marked = {name: ClassVar[Any] for name in body if name in FACTS}
    return {**body, "__annotations__": {**body["__annotations__"], **marked}}


def test_a_method_that_says_all_of_itself_is_one() -> None:
    made = type("IpoMethod", (PairMethod,), as_facts(whole()))(name="ipo")
    assert isinstance(made, PairMethod)
    assert (made.title(), made.last_stage(), made.row_length({"max_length": 7})) == ("ipo", "pairs", 7)


@pytest.mark.parametrize("fact", [*(name for name in whole() if not name.startswith("__"))])
def test_a_method_that_leaves_a_fact_out_is_refused_where_it_is_written(fact: str) -> None:
    body = {name: value for name, value in whole().items() if name != fact}
    with pytest.raises(TypeError, match=f"IpoMethod does not say of itself: {fact}$"):
        type("IpoMethod", (PairMethod,), as_facts(body))


def test_nothing_but_its_name_is_told_all_that_is_missing() -> None:
    with pytest.raises(TypeError) as caught:

        class Bare(MethodSection):
            name: Literal["bare"]

    for fact in (*FACTS, "row_length", "answers", "forwards_beside", "own_weights", "judges", "functions"):
        assert fact in str(caught.value)

    class Kind(RowMethod):
        """What has no name is no method yet."""


def forks(text: str) -> Iterator[int]:
    """Lines that tell methods apart by name or by class, but for assertions: those narrow a type."""
    tree = ast.parse(text)
    asserted = {id(part) for node in ast.walk(tree) if isinstance(node, ast.Assert) for part in ast.walk(node)}
    for node in ast.walk(tree):
        if id(node) in asserted:
            continue
        looked: list[ast.AST] = []
        if isinstance(node, ast.Compare | ast.MatchValue):
            looked = [node]
        elif isinstance(node, ast.Call) and ast.unparse(node.func) in ("isinstance", "issubclass"):
            looked = [node.args[1]]
        elif isinstance(node, ast.Dict):
            looked = [key for key in node.keys if key is not None]
        for part in (inner for each in looked for inner in ast.walk(each)):
            named = isinstance(part, ast.Constant) and part.value in METHODS
            if named or (isinstance(part, ast.Name) and part.id in KINDS):
                yield node.lineno


def test_forks_are_found() -> None:
    for fork in (
        "if method.name == 'dpo': pass",
        "rows = name in ('sft', 'distill')",
        "if isinstance(method, RowMethod | GrpoMethod): pass",
        "if type(method) is DpoMethod: pass",
        "RATES = {'sft': 1, 'grpo': 2}",
        "own = {SftMethod: 1}.get(type(method))",
        "match name:\n    case 'grpo': pass",
    ):
        assert list(forks(fork)), fork
    for plain in ("assert isinstance(method, RowMethod)", "if method.makes_pairs: pass", "METHOD = Method(SftMethod)"):
        assert not list(forks(plain)), plain


@pytest.mark.parametrize("folder", ["recipes", "pipeline", "train", "eval", "chat", "cli"])
def test_methods_are_told_apart_by_their_classes_alone(folder: str) -> None:
    found = [
        f"{path.relative_to(ROOT)}:{line}"
        for path in sorted((ROOT / folder).rglob("*.py"))
        if path != ROOT / "recipes" / "methods.py"
        for line in forks(path.read_text(encoding="utf-8"))
    ]
    assert not found, "state it on the method's class, in recipes/methods.py"


@pytest.mark.parametrize("name", METHODS)
def test_the_entry_script_of_a_method_trains_it(name: str) -> None:
    import importlib

    method = importlib.import_module(f"trimtab.train.{name}").METHOD
    assert method.section is METHODS[name]
