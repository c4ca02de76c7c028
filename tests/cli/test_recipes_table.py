"""`trimtab recipes`: the table of what ships, and what two recipes say differently."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

from trimtab.cli.main import main
from trimtab.cli.recipes import difference, listed, shown, table_of_recipes
from trimtab.pipeline.identity import NOT_SET
from trimtab.recipes.loader import load_recipe, shipped_recipes

NAMES = list(shipped_recipes())


def test_a_row_says_what_the_header_says() -> None:
    row = listed("llama-3.3-70b/dpo", shipped_recipes()["llama-3.3-70b/dpo"])
    assert (row.model, row.method, row.gpus, row.memory, row.hours) == ("llama-3.3-70b", "dpo", 8, 192, 26.8)
    assert row.what.startswith("DPO on capped over uncapped answers")
    floor = listed("smollm2-135m/floor", shipped_recipes()["smollm2-135m/floor"])
    assert (floor.method, floor.gpus, floor.hours) == ("sft", 0, 0.5), "half an hour on two cores"


@pytest.mark.parametrize("name", NAMES)
def test_every_recipe_has_its_row(name: str) -> None:
    path = shipped_recipes()[name]
    row = listed(name, path)
    assert row.method == load_recipe(name).recipe.method.name
    assert row.hours > 0 and (row.gpus == 0) == name.startswith("smollm2")
    assert row.what and path.read_text(encoding="utf-8").splitlines()[0].endswith(row.what)


def test_the_table_fits_a_terminal_and_is_whole_in_a_pipe(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["recipes"]) == 0  # captured, so no terminal
    piped = capsys.readouterr().out.splitlines()
    assert piped[:-4] == table_of_recipes(None).splitlines()[:-4]
    for line, name in zip(piped[1:], NAMES, strict=False):
        cells = re.split(r" {2,}", line)
        assert len(cells) == 6 and cells[4] == name and "…" not in line
    for width in (60, 80, 120):
        table = table_of_recipes(width).split("\n\n")[0].splitlines()
        assert len(table) == 1 + len(NAMES)
        assert max(map(len, table)) <= max(width, 70), "names and figures are never cut"
    assert all("…" in line for line in table_of_recipes(80).splitlines()[1 : 1 + len(NAMES)])


def test_it_is_quick_and_imports_nothing_heavy() -> None:
    code = (
        "import sys, time\n"
        "from trimtab.cli.main import main\n"
        "assert main(['recipes']) == 0 and main(['recipes', '--diff', 'qwen3-8b/sft', 'qwen3-8b/dpo']) == 0\n"
        "heavy = {'torch', 'transformers', 'trl', 'peft', 'numpy', 'datasets', 'accelerate'} & set(sys.modules)\n"
        "raise SystemExit(' '.join(heavy) or (f'{time.process_time()} s' if time.process_time() > 2 else 0))\n"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr


def test_what_differs_between_two_recipes(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    ours = load_recipe("smollm2-135m/sft")
    mine = tmp_path / "mine.yaml"
    text = ours.text.replace("layers: 14-24 ", "layers: 14-20 ").replace("floor_weight: 0.7 ", "floor_weight: 0.9 ")
    mine.write_text(text.replace("benign_kl_weight: 8.0 ", "# "), encoding="utf-8")  # a default, so no difference
    assert main(["recipes", "--diff", "smollm2-135m/sft", str(mine)]) == 0
    rows = [re.split(r" {2,}", line) for line in capsys.readouterr().out.splitlines()]
    assert rows[:-2] == [
        ["key", "smollm2-135m/sft", str(mine)],
        ["floor.layers", "14-24", "14-20"],
        ["method.floor_weight", "0.7", "0.9"],
    ]
    assert re.fullmatch(r"2 of \d+ keys differ, defaults included", rows[-1][0])
    told = difference("qwen3-8b/sft", "qwen3-8b/distill")
    assert re.search(r"^method.cap_strength +1.0 +not set$", told, re.MULTILINE)
    assert re.search(r"^method.top_k +not set +1000$", told, re.MULTILINE)


def test_nothing_differs(capsys: pytest.CaptureFixture[str]) -> None:
    path = str(shipped_recipes()["smollm2-135m/sft"])
    assert main(["recipes", "--diff", "smollm2-135m/sft", path]) == 0
    assert capsys.readouterr().out.startswith(f"nothing differs: smollm2-135m/sft and {path} say the same")


def test_an_unknown_recipe_is_told(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["recipes", "--diff", "smollm2-135m/sft", "smollm2-135m/stf"]) == 2
    said = capsys.readouterr()
    assert "smollm2-135m/stf: no such recipe" in said.err and "did you mean 'smollm2-135m/sft'" in said.err
    assert not said.out


def test_values_are_shown_as_a_recipe_writes_them() -> None:
    values = [None, True, 1e-4, "all-linear", [3, 4, 5], [3, 5, 9], ["q_proj", "v_proj"], {}, [], NOT_SET]
    written = ["null", "true", "0.0001", "all-linear", "3-5", "[3, 5, 9]", "[q_proj, v_proj]", "{}", "[]", "not set"]
    assert [shown(value) for value in values] == written


def test_a_difference_is_the_same_from_both_sides(tmp_path: Path) -> None:
    """Also where only one of them has a list of sections."""
    text = shipped_recipes()["smollm2-135m/sft"].read_text(encoding="utf-8")
    mine = tmp_path / "mine.yaml"
    mine.write_text(text.replace("\neval:\n", "\neval:\n  durability: [benign]\n"), encoding="utf-8")
    there = difference("smollm2-135m/sft", str(mine)).splitlines()
    back = difference(str(mine), "smollm2-135m/sft").splitlines()
    assert {line.split()[0] for line in there[1:-2]} == {line.split()[0] for line in back[1:-2]} != set()
