"""Entry scripts as modules and as files: nothing beside them, or where they are started, stands in the place of a package."""

from __future__ import annotations

import ast
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from tiny_recipe import ROOT, save_small, write_recipe

from trimtab.cli.launch import TrainingRefused, launch_training
from trimtab.recipes.loader import load_recipe

SCRIPTS = sorted(path for path in (ROOT / "train").glob("*.py") if "__main__" in path.read_text(encoding="utf-8"))
PACKAGES = (
    "accelerate",
    "collections",
    "datasets",
    "peft",
    "pydantic",
    "torch",
    "transformers",
    "trl",
    "typing",
    "yaml",
)


def lay_traps(folder: Path) -> None:
    """Files with the names of packages, none of which may be imported."""
    for name in PACKAGES:
        (folder / f"{name}.py").write_text("raise SystemExit(f'shadowed: {__file__}')\n", encoding="utf-8")


def plain() -> dict[str, str]:
    """The environment of one who has not told Python to be careful."""
    return {name: value for name, value in os.environ.items() if name != "PYTHONSAFEPATH"}


def python(*arguments: str | Path, cwd: Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, *map(str, arguments)]
    return subprocess.run(command, cwd=cwd, env=plain(), capture_output=True, text=True, check=False)


@pytest.fixture(scope="module")
def copied(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of the entry scripts with traps beside them."""
    folder = tmp_path_factory.mktemp("copied") / "train"
    shutil.copytree(ROOT / "train", folder)
    lay_traps(folder)
    return folder


def test_the_traps_catch(copied: Path) -> None:
    (copied / "careless.py").write_text("import yaml\n", encoding="utf-8")
    assert "shadowed" in python(copied / "careless.py", cwd=copied).stderr


def test_all_scripts_are_here() -> None:
    assert [path.stem for path in SCRIPTS] == ["distill", "dpo", "durability", "grpo", "sft"]


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.stem)
def test_a_script_takes_its_folder_off_the_path_before_it_imports_anything(script: Path, copied: Path) -> None:
    done = python(copied / script.name, "--help", cwd=copied.parent)
    assert (done.returncode, "shadowed" in done.stderr) == (0, False), done.stderr
    # what comes before that is loaded when Python starts, and so can't be shadowed
    tree = ast.parse(script.read_text(encoding="utf-8"))
    before = tree.body[1 : next(i for i, line in enumerate(tree.body) if isinstance(line, ast.If))]
    assert [ast.unparse(line) for line in before] == ["from __future__ import annotations", "import os", "import sys"]


@pytest.mark.slow
def test_a_file_that_is_run_finds_the_packages_themselves(copied: Path, model: Path) -> None:
    """As far as the libraries' own word on the recipe, which takes all of them."""
    recipe = write_recipe(copied.parent / "recipe.yaml", model, optim="adamwww")
    done = python(
        Path("train") / "sft.py", "--config", recipe, "--output_dir", copied.parent / "run", cwd=copied.parent
    )
    assert done.returncode == 2, done.stderr
    assert "train.optim" in done.stderr and "shadowed" not in done.stderr


@pytest.mark.slow
def test_a_launched_module_finds_them_and_its_fault_is_handed_on(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = write_recipe(tmp_path / "recipe.yaml", model, optim="adamwww")
    lay_traps(tmp_path)
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("PYTHONSAFEPATH", raising=False)
    with pytest.raises(TrainingRefused, match="adamwww"):
        launch_training(load_recipe(recipe), tmp_path / "run", "sft", accelerate="cpu", quiet=True)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_small(tmp_path_factory.mktemp("entry") / "model")
