"""The source tree as the documents and the tests read it: its modules, what each imports, and in which order they may.

The source is read, never run, so that an old revision with other folders is read in the same way.
"""

from __future__ import annotations

import ast
import functools
import io
import re
import subprocess
import tarfile
import tomllib
from collections import Counter
from collections.abc import Hashable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import TypeVar

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = "trimtab"
MOST = 10  # of the lists of functions and modules
Node = TypeVar("Node", bound=Hashable)

# The rooms in the order in which they import each other, and what each imports besides itself.
_EVAL = ("axis", "losses", "recipes", "pipeline", "eval")
MAY_IMPORT: dict[str, tuple[str, ...]] = {
    "axis": (),
    "losses": ("axis",),
    "trimtab": ("axis", "losses"),  # lazily
    "recipes": ("axis",),
    "accelerate_configs": (),
    "pipeline": ("axis", "recipes"),
    "train": ("axis", "losses", "recipes", "pipeline"),
    "eval": _EVAL[:-1],
    "eval/answers": _EVAL,
    "eval/measures": (*_EVAL, "eval/answers"),
    "eval/report": (*_EVAL, "eval/answers", "eval/measures"),
    "eval/stages": (*_EVAL, "eval/answers", "eval/measures", "eval/report"),
    "chat": ("axis", "recipes", "pipeline", "eval", "eval/answers", "eval/measures", "eval/report"),
    "cli": (
        "axis", "losses", "recipes", "accelerate_configs", "pipeline", "train",
        "eval", "eval/answers", "eval/measures", "eval/report", "eval/stages", "chat",
    ),
}  # fmt: skip
# They lie in eval/ and call on its rooms, while the files beside them are what those rooms share: a layer of their own.
STAGES = ("eval/stages.py", "eval/merging.py")
FOLDERS = tuple(room for room in MAY_IMPORT if room != "eval/stages")


class UnreadableTree(Exception):
    """What was named is neither a folder with our source nor a revision with it."""


@dataclass(frozen=True)
class Module:
    """A file of the package.

    Attributes:
        name: as it is imported.
        path: from the root, with slashes.
        room: its folder, or the layer that it makes up.
        text: its source.
    """

    name: str
    path: str
    room: str
    text: str

    @property
    def lines(self) -> int:
        """How many lines it has."""
        return len(self.text.splitlines())


@dataclass(frozen=True, order=True)
class Arrow:
    """A module imports another.

    Attributes:
        importer: path of the one.
        imported: path of the other; None where its name is put together only when it is imported.
        start: room of the one.
        end: room of the other.
    """

    importer: str
    imported: str | None
    start: str
    end: str


def read_tree(source: str | Path = ROOT) -> list[Module]:
    """The modules of a source tree, by room and path.

    Args:
        source: a folder, or a git revision of this repository.

    Raises:
        UnreadableTree: if it is neither.
    """
    folder = Path(source)
    if folder.is_dir() and not (folder / "pyproject.toml").is_file():
        raise UnreadableTree(f"{source} has no pyproject.toml, which names the folders of the package")
    files = _files_in(folder) if folder.is_dir() else _files_of(str(source))
    if "pyproject.toml" not in files:
        raise UnreadableTree(f"{source} has no pyproject.toml, which names the folders of the package")
    project = tomllib.loads(files["pyproject.toml"])
    found = project.get("tool", {}).get("setuptools", {}).get("package-dir")
    if not found:
        raise UnreadableTree(f"the pyproject.toml of {source} names no folders of a package")
    packages = {folder: package for package, folder in found.items()}
    paths = [path for path in files if path.endswith(".py") and str(PurePosixPath(path).parent) in packages]
    split = any(folder.startswith("eval/") for folder in packages)
    modules = [_module(path, files[path], packages, split) for path in paths]
    return sorted(modules, key=lambda module: (place(module.room), module.path))


def _files_in(folder: Path) -> dict[str, str]:
    """Python files of our folders, and the project file."""
    paths = [folder / "pyproject.toml", *(path for room in folder.iterdir() for path in _python_below(room))]
    return {
        path.relative_to(folder).as_posix(): path.read_text(encoding="utf-8", errors="replace")
        for path in paths
        if path.is_file()
    }


def _python_below(room: Path) -> list[Path]:
    hidden = room.name.startswith(".")  # environments, and links to what is read anyway
    return [] if hidden or not room.is_dir() else list(room.rglob("*.py"))


def _files_of(revision: str) -> dict[str, str]:
    done = subprocess.run(["git", "archive", revision], cwd=ROOT, capture_output=True, check=False)
    if done.returncode:
        raise UnreadableTree(
            f"{revision} is neither a folder nor a revision: {done.stderr.decode(errors='replace').strip()}"
        )
    found = {}
    with tarfile.open(fileobj=io.BytesIO(done.stdout)) as archive:
        for member in archive:
            if member.name == "pyproject.toml" or member.name.endswith(".py"):
                file = archive.extractfile(member)
                found.update({} if file is None else {member.name: file.read().decode()})
    return found


def _module(path: str, text: str, packages: Mapping[str, str], split: bool) -> Module:
    folder, stem = str(PurePosixPath(path).parent), PurePosixPath(path).stem
    name = packages[folder] if stem == "__init__" else f"{packages[folder]}.{stem}"
    return Module(name, path, "eval/stages" if split and path in STAGES else folder, text)


def place(room: str) -> int:
    """How far down a room stands in the order; one that is no longer there stands below all."""
    return list(MAY_IMPORT).index(room) if room in MAY_IMPORT else len(MAY_IMPORT)


@functools.cache  # imports, lazy names and functions are all looked for in the same files
def parsed(text: str) -> ast.Module:
    """The syntax tree of a file."""
    return ast.parse(text)


def imported_names(text: str) -> Iterator[str]:
    """What of ours a file imports, in whatever way and wherever in it: `from x import`, `import x`, by name through importlib.

    A name that is put together when it is imported ends where it is no longer known: ``trimtab.train.``.
    """
    for node in ast.walk(parsed(text)):
        names: list[str] = []
        if isinstance(node, ast.ImportFrom):
            names = [f"{node.module}.{alias.name}" for alias in node.names]
        elif isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.Call) and "import_module" in ast.unparse(node.func) and node.args:
            names = [_beginning(node.args[0])]
        yield from (name for name in names if name.startswith(f"{PACKAGE}."))


def put_together(text: str) -> list[str]:
    """Calls by which a file imports what nobody can read off it: not even the beginning of the name is known."""
    calls = [node for node in ast.walk(parsed(text)) if isinstance(node, ast.Call)]
    by_name = [node for node in calls if re.search(r"import_module$|^__import__$", ast.unparse(node.func))]
    return [ast.unparse(node) for node in by_name if not (node.args and _beginning(node.args[0]).strip("."))]


def _beginning(name: ast.expr) -> str:
    """As much of a name as is known from its beginning."""
    first = name.values[0] if isinstance(name, ast.JoinedStr) else name
    return str(first.value) if isinstance(first, ast.Constant) else ""


def arrows(modules: list[Module]) -> list[Arrow]:
    """Who imports whom, each pair once."""
    by_name = {module.name: module for module in modules}
    homes = {name: home for module in modules for name, home in _lazy_homes(module)}
    found = set()
    for module in modules:
        for name in imported_names(module.text):
            known = _module_of(homes.get(name, name), by_name)
            if known is not None and known is not module:
                path = None if name.endswith(".") else known.path
                found.add(Arrow(module.path, path, module.room, known.room))
    return sorted(found, key=lambda arrow: (place(arrow.start), arrow.importer, place(arrow.end), arrow.imported or ""))


def _lazy_homes(package: Module) -> Iterator[tuple[str, str]]:
    """Names that a package loads at their first use, and where each of them is at home."""
    for node in parsed(package.text).body:
        if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "_HOME":
            for name, home in ast.literal_eval(node.value).items():
                yield f"{package.name}.{name}", f"{package.name}.{home}.{name}"


def _module_of(name: str, modules: Mapping[str, Module]) -> Module | None:
    """The module that a name is, or that it is in."""
    while name and name not in modules:
        name = name.rpartition(".")[0]
    return modules.get(name)


def against_the_order(found: list[Arrow]) -> list[Arrow]:
    """Arrows that no room may have."""
    return [arrow for arrow in found if arrow.start != arrow.end and arrow.end not in MAY_IMPORT.get(arrow.start, ())]


def circles_of_files(found: list[Arrow]) -> list[list[str]]:
    """Files that import each other, over however many others."""
    return circles([(arrow.importer, arrow.imported) for arrow in found if arrow.imported is not None])


def circles_of_rooms(found: list[Arrow]) -> list[list[str]]:
    """Rooms that import each other."""
    return circles([(arrow.start, arrow.end) for arrow in found if arrow.start != arrow.end])


def circles(pairs: list[tuple[Node, Node]]) -> list[list[Node]]:
    """Strongly connected components of more than one node, and nodes that point at themselves."""
    following: dict[Node, set[Node]] = {}
    for start, end in pairs:
        following.setdefault(start, set()).add(end)
    reached = {node: _reached(node, following) for node in following}
    both = {frozenset(other for other in reached[node] if node in reached.get(other, ())) for node in reached}
    return sorted((sorted(circle, key=str) for circle in both if circle), key=str)


def _reached(start: Node, following: Mapping[Node, set[Node]]) -> set[Node]:
    reached: set[Node] = set()
    waiting = [start]
    while waiting:
        for node in following.get(waiting.pop(), set()) - reached:
            reached.add(node)
            waiting.append(node)
    return reached


@dataclass(frozen=True)
class Function:
    """A function of the tree, with its decorators left out: its lines are from `def` to its end."""

    lines: int
    path: str
    name: str


def functions(modules: list[Module]) -> list[Function]:
    """All functions and methods, the longest first."""
    found = [function for module in modules for function in _functions_of(module)]
    return sorted(found, key=lambda function: (-function.lines, function.path, function.name))


def _functions_of(module: Module) -> Iterator[Function]:
    def below(node: ast.AST, above: str) -> Iterator[Function]:
        for child in ast.iter_child_nodes(node):
            name = above
            if isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
                name = f"{above}{child.name}."
                if not isinstance(child, ast.ClassDef):
                    assert child.end_lineno is not None
                    yield Function(child.end_lineno - child.lineno + 1, module.path, name.rstrip("."))
            yield from below(child, name)

    return below(parsed(module.text), "")


@dataclass(frozen=True)
class Room:
    """A folder, by its direct files alone."""

    name: str
    modules: int
    lines: int


@dataclass(frozen=True)
class Structure:
    """What is said and drawn of a tree.

    Attributes:
        rooms: in the order in which they may import each other.
        between: number of imports from one room to another, by (importing, imported).
        against: arrows against the order.
        file_circles: paths of files that import each other.
        room_circles: rooms that do.
        longest: the longest functions.
        leant_on: the modules that most others import, and how many do.
    """

    rooms: list[Room]
    between: Counter[tuple[str, str]]
    against: list[Arrow]
    file_circles: list[list[str]]
    room_circles: list[list[str]]
    longest: list[Function]
    leant_on: list[tuple[str, int]]

    def faults(self) -> dict[str, list[str]]:
        """What should not be, a list each under its title."""
        against = [f"{arrow.importer} -> {arrow.imported or arrow.end}" for arrow in self.against]
        return {
            "Arrows against the order": against,
            "Circles of files": [", ".join(circle) for circle in self.file_circles],
            "Circles of folders": [", ".join(circle) for circle in self.room_circles],
        }


def structure_of(modules: list[Module]) -> Structure:
    """Look a tree over."""
    found = arrows(modules)
    names = sorted({module.room for module in modules}, key=lambda room: (place(room), room))
    inside = {name: [module for module in modules if module.room == name] for name in names}
    pairs = [(arrow.start, arrow.end) for arrow in found if arrow.start != arrow.end]
    importers = Counter(arrow.imported for arrow in found if arrow.imported is not None)
    return Structure(
        rooms=[Room(name, len(held), sum(module.lines for module in held)) for name, held in inside.items()],
        between=Counter(sorted(pairs, key=lambda pair: (place(pair[0]), place(pair[1])))),
        against=against_the_order(found),
        file_circles=circles_of_files(found),
        room_circles=circles_of_rooms(found),
        longest=functions(modules)[:MOST],
        leant_on=sorted(importers.items(), key=lambda item: (-item[1], item[0]))[:MOST],
    )
