"""The layout: folders as a package, names that shadow nothing, a wheel that works elsewhere, and no dead keys."""

from __future__ import annotations

import ast
import importlib.metadata
import re
import subprocess
import sys
import tomllib
import venv
import zipfile
from collections.abc import Iterator
from pathlib import Path

import pytest
from pydantic import BaseModel
from source_tree import (
    MAY_IMPORT,
    PACKAGE,
    ROOT,
    UnreadableTree,
    against_the_order,
    arrows,
    circles,
    circles_of_files,
    circles_of_rooms,
    imported_names,
    put_together,
    read_tree,
)

from trimtab.axis.errors import EXTRAS
from trimtab.recipes.loader import shipped_recipes
from trimtab.recipes.schema import Recipe

PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
# In the folder PACKAGE are the package's own names; the others lie beside it and are its parts.
ROOMS = set(PROJECT["tool"]["setuptools"]["package-dir"].values()) - {PACKAGE}
FOLDERS = sorted(room for room in ROOMS if "/" not in room)
MODULES = sorted(path for folder in FOLDERS for path in (ROOT / folder).rglob("*.py"))


def test_folders_are_found() -> None:
    assert FOLDERS == ["accelerate_configs", "axis", "chat", "cli", "eval", "losses", "pipeline", "recipes", "train"]
    assert len(MODULES) > 25


def test_every_extra_names_what_it_brings() -> None:
    """So that a missing package is told with the extra that has it."""
    extras = PROJECT["project"]["optional-dependencies"]
    core = {_package(line) for line in PROJECT["project"]["dependencies"]}
    modules = {"pyyaml": "yaml", "scikit-learn": "sklearn", "lm-eval": "lm_eval", "inspect-ai": "inspect_ai"}
    for extra, lines in extras.items():
        if extra not in ("all", "dev"):
            brought = {_package(line) for line in lines} - core - {PACKAGE}
            assert {modules.get(package, package) for package in brought} == set(EXTRAS[extra])
    assert set(EXTRAS) == set(extras) - {"all", "dev"}


def _package(requirement: str) -> str:
    return re.split(r"[<>=\[ ]", requirement)[0]


def test_no_module_bears_the_name_of_a_dependency_or_a_standard_module() -> None:
    # `python axis/rows.py` puts axis/ first on sys.path, so axis/torch.py would be what `import torch` finds.
    taken = set(sys.stdlib_module_names) | set(importlib.metadata.packages_distributions())
    taken -= {"trimtab", *FOLDERS}
    clashes = [str(path.relative_to(ROOT)) for path in MODULES if path.stem in taken]
    clashes += [str(path.relative_to(ROOT)) for folder in FOLDERS for path in (ROOT / folder).iterdir()
                if path.is_dir() and path.name in taken]  # fmt: skip
    assert not clashes


@pytest.mark.parametrize("path", MODULES, ids=lambda path: str(path.relative_to(ROOT)))
def test_imports_are_absolute(path: Path) -> None:
    wrong: list[str] = []
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom):
            names = [node.module or ""] if node.level == 0 else ["a relative import"]
        elif isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        else:
            continue
        wrong += [name for name in names if name.partition(".")[0] in FOLDERS or name == "a relative import"]
    assert not wrong, f"import trimtab.<folder> instead of {wrong}"


def test_imports_go_one_way_and_no_files_import_each_other() -> None:
    found = arrows(read_tree())
    assert [f"{arrow.importer} imports {arrow.imported}" for arrow in against_the_order(found)] == []
    assert circles_of_files(found) == []


def test_the_order_of_the_rooms_has_no_circle() -> None:
    assert set(MAY_IMPORT) == {*ROOMS, PACKAGE, "eval/stages"}
    assert circles([(room, other) for room, others in MAY_IMPORT.items() for other in others]) == []


@pytest.fixture
def small_tree(tmp_path: Path) -> Path:
    """A package with a circle of three files, one of them by a lazy name, and imports against the order."""
    files = {
        "pyproject.toml": "[tool.setuptools.package-dir]\n"
        + "".join(
            f"'trimtab.{room.replace('/', '.')}' = '{room}'\n" for room in ("axis", "train", "eval", "eval/report")
        ),
        "axis/__init__.py": "_HOME = {'Floor': 'floor'}\n",
        "axis/floor.py": "def load():\n    import trimtab.axis.files\n",
        "axis/files.py": "from trimtab.axis import hooks\n",
        "axis/hooks.py": "from trimtab.axis import Floor\n",
        "train/__init__.py": "",
        "train/sft.py": "import importlib\nimportlib.import_module(f'trimtab.train.{name}')\n",
        "eval/__init__.py": "",
        "eval/schema.py": "from trimtab.eval.report.page import draw\nfrom trimtab.train import sft\n",
        "eval/stages.py": "from trimtab.eval.report import page\n",
        "eval/report/__init__.py": "",
        "eval/report/page.py": "from trimtab.eval.schema import Report\n",
        ".types/trimtab/axis.py": "import trimtab.cli\n",
    }
    for name, text in files.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text, encoding="utf-8")
    return tmp_path


def test_circles_and_arrows_against_the_order_are_found(small_tree: Path) -> None:
    found = arrows(read_tree(small_tree))
    assert circles_of_files(found) == [
        ["axis/files.py", "axis/floor.py", "axis/hooks.py"],
        ["eval/report/page.py", "eval/schema.py"],
    ]
    assert circles_of_rooms(found) == [["eval", "eval/report"]]
    against = [(arrow.importer, arrow.imported) for arrow in against_the_order(found)]
    assert against == [("eval/schema.py", "train/sft.py"), ("eval/schema.py", "eval/report/page.py")]


def test_every_way_of_importing_is_seen() -> None:
    text = "import trimtab.cli\ndef later():\n    from trimtab.eval import stages\nimport torch\n"
    text += "importlib.import_module(f'trimtab.train.{name}')\nimportlib.import_module('trimtab.axis.lazy')\n"
    wanted = ["trimtab.axis.lazy", "trimtab.cli", "trimtab.eval.stages", "trimtab.train."]
    assert sorted(imported_names(text)) == wanted


NAMED_WHEN_IMPORTED = {"axis/lazy.py", "train/rewards.py", "eval/measures/__init__.py"}  # lazy names, a user's, ORDER


def test_nothing_else_is_imported_by_a_name_that_nobody_can_read() -> None:
    assert {module.path for module in read_tree() if put_together(module.text)} == NAMED_WHEN_IMPORTED
    hidden = ["import_module(NAME)", "import_module('.' + x)", "__import__(name)", "import_module(f'{a}.b')"]
    assert put_together("\n".join([*hidden, "import_module(f'trimtab.train.{name}')"])) == hidden


def test_a_folder_that_is_not_ours_is_told(tmp_path: Path) -> None:
    (tmp_path / "x").mkdir()
    (tmp_path / "x" / "latin.py").write_bytes(b"# \xe9")
    with pytest.raises(UnreadableTree, match=r"no pyproject\.toml"):
        read_tree(tmp_path)
    (tmp_path / "pyproject.toml").write_text("[project]\n", encoding="utf-8")
    with pytest.raises(UnreadableTree, match="names no folders"):
        read_tree(tmp_path)


def test_the_package_is_whole_where_it_lies_in_a_checkout() -> None:
    """Python finds `trimtab/` first where it is started in the root, beside an installed wheel or none at all."""
    code = (
        "import sys; sys.meta_path = [f for f in sys.meta_path if 'ditable' not in repr(f)];"
        "import trimtab, trimtab.axis.errors; print(trimtab.axis.errors.__file__)"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == str(ROOT / "axis" / "errors.py")


def _keys(model: type[BaseModel], above: str = "") -> Iterator[tuple[str, str]]:
    for name, field in model.model_fields.items():
        yield f"{above}{name}", name
        for part in (field.annotation, *getattr(field.annotation, "__args__", ())):
            if isinstance(part, type) and issubclass(part, BaseModel):
                yield from _keys(part, f"{above}{name}.")


def test_every_recipe_key_is_read_somewhere() -> None:
    read: set[str] = set()
    for path in MODULES:
        if path.name == "schema.py" or path.parent.name in ("recipes", "cli"):
            continue  # checking a key, or planning with it, is not using it
        tree = ast.parse(path.read_text(encoding="utf-8"))
        read |= {node.attr for node in ast.walk(tree) if isinstance(node, ast.Attribute)}
        # keyword arguments of a section that is handed over whole, such as SamplingOptions(**section.model_dump())
        read |= {node.target.id for node in ast.walk(tree)
                 if isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name)}  # fmt: skip
        read |= {arg.arg for node in ast.walk(tree) if isinstance(node, ast.FunctionDef)
                 for arg in (*node.args.args, *node.args.kwonlyargs)}  # fmt: skip
        read |= {str(node.value) for node in ast.walk(tree) if isinstance(node, ast.Constant)}
    dead = [key for key, name in _keys(Recipe) if name not in read]
    assert not dead, f"recipe keys that nothing reads: {dead}"


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("wheel")
    # A copy, so that setuptools' build folder does not end up in the checkout, nor an old one in the wheel.
    source = folder / "source"
    source.mkdir()
    for name in (PACKAGE, *FOLDERS, "pyproject.toml", "README.md", "LICENSE"):
        (source / name).symlink_to(ROOT / name)
    command = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--no-build-isolation", "-w", str(folder)]
    result = subprocess.run([*command, str(source)], capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    (built,) = folder.glob("trimtab-*.whl")
    return built


@pytest.mark.slow
def test_wheel_holds_modules_recipes_data_and_configs(wheel: Path) -> None:
    names = set(zipfile.ZipFile(wheel).namelist())
    wanted = {f"trimtab/{path.relative_to(ROOT)}" for path in MODULES}
    wanted |= {"trimtab/__init__.py", "trimtab/py.typed"}
    wanted |= {f"trimtab/recipes/{name}.yaml" for name in shipped_recipes()}
    wanted |= {f"trimtab/{path.relative_to(ROOT)}" for path in (ROOT / "recipes/data").iterdir() if path.is_file()}
    configs = [*(ROOT / "accelerate_configs").glob("*.yaml"), *(ROOT / "accelerate_configs").glob("*.json")]
    wanted |= {f"trimtab/{path.relative_to(ROOT)}" for path in configs}
    assert wanted <= names, sorted(wanted - names)
    top = {name.split("/")[0] for name in names}
    assert all(name == "trimtab" or name.endswith(".dist-info") for name in top), f"generic names in the wheel: {top}"
    assert any(name.endswith("licenses/LICENSE") for name in names)


@pytest.mark.slow
def test_installed_wheel_works_from_another_folder(wheel: Path, tmp_path: Path) -> None:
    home = tmp_path / "venv"
    venv.create(home, with_pip=False)
    python = home / "bin" / "python"
    site = next((home / "lib").glob("python*/site-packages"))
    subprocess.run(
        [sys.executable, "-m", "pip", "--python", str(python), "install", "--quiet", "--no-deps", str(wheel)],
        check=True,
    )
    # The dependencies of this environment, after its own packages; its editable trimtab is an import hook that a plain path
    # entry does not run.
    here = Path(importlib.metadata.distribution("pydantic").locate_file(""))
    (site / "dependencies.pth").write_text(f"{here}\n", encoding="utf-8")
    code = "import trimtab.recipes, trimtab.accelerate_configs as a; print(trimtab.recipes.__file__, a.__file__)"
    found = subprocess.run([str(python), "-c", code], cwd=tmp_path, capture_output=True, text=True, check=True).stdout
    assert found.count(str(home)) == 2, found
    command = [str(home / "bin" / "trimtab"), "recipes"]
    listed = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=True).stdout
    assert "smollm2-135m/sft" in listed
    code = (
        "from trimtab.cli.launch import resolve_accelerate_config as r; from trimtab.recipes.loader import load_recipe as l;"
        "print(r('zero3-cpu'), l('smollm2-135m/demo').path)"
    )
    found = subprocess.run([str(python), "-c", code], cwd=tmp_path, capture_output=True, text=True, check=True).stdout
    assert str(home) in found.split()[1]
