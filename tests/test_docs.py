"""What the documents say is run, and how they say it is held to their own rules."""

from __future__ import annotations

import re
import subprocess
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import draw_structure
import needs
import pytest
import torch
import write_map
import yaml
from conftest import build_floor, build_model
from source_tree import read_tree, structure_of

from trimtab.cli.launch import accelerate_configs
from trimtab.recipes.loader import shipped_recipes

ROOT = Path(__file__).parents[1]


def test_the_readme_loop_trains_towards_the_floor(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    block = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(encoding="utf-8"), re.DOTALL)[0]
    model = build_model("llama")
    build_floor().save(tmp_path / "runs/demo/floor.safetensors")
    monkeypatch.chdir(tmp_path)
    ids = torch.randint(3, 100, (2, 9), generator=torch.Generator().manual_seed(0))
    names: dict[str, Any] = {
        "model": model,
        "prompts": {"input_ids": ids, "attention_mask": torch.ones_like(ids), "max_new_tokens": 3, "pad_token_id": 0},
        "batch": {"input_ids": ids, "labels": ids},
    }
    exec(block, names)
    assert names["answers"].shape[0] == 2
    assert torch.isfinite(names["loss"])
    assert model.get_input_embeddings().weight.grad.abs().sum() > 0


def test_the_map_says_what_the_modules_say() -> None:
    assert write_map.PAGE.read_text(encoding="utf-8") == write_map.the_map(), "run: python docs/write_map.py"


def test_the_structure_on_the_page_is_free_of_circles_and_so_is_the_source() -> None:
    kept = (ROOT / "docs/structure/after.txt").read_text(encoding="utf-8")
    now = draw_structure.told(structure_of(read_tree()))
    for title in ("Arrows against the order", "Circles of files", "Circles of folders"):
        assert f"{title}\n  none\n" in kept
        assert f"{title}\n  none\n" in now


def test_the_structure_of_a_folder_is_drawn(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    tree, picture = tmp_path / "tree", tmp_path / "picture.svg"
    files = {
        "pyproject.toml": "[tool.setuptools.package-dir]\n'trimtab.axis' = 'axis'\n'trimtab.cli' = 'cli'\n",
        "axis/floor.py": "def load():\n    import trimtab.cli.main\n",
        "cli/main.py": "from trimtab.axis.floor import load\n",
    }
    for name, text in files.items():
        (tree / name).parent.mkdir(parents=True, exist_ok=True)
        (tree / name).write_text(text, encoding="utf-8")
    assert draw_structure.main(["--tree", str(tree), "--svg", str(picture)]) == 0
    printed = capsys.readouterr().out
    assert "Arrows against the order\n  axis/floor.py -> cli/main.py\n" in printed
    assert "Circles of files\n  axis/floor.py, cli/main.py\n" in printed
    assert "   2 lines  axis/floor.py: load\n" in printed
    drawn = ElementTree.parse(picture)
    titles = [title.text for title in drawn.iter("{http://www.w3.org/2000/svg}title")]
    assert sorted(str(title) for title in titles) == ["axis imports cli: 1", "cli imports axis: 1"]
    assert len([box for box in drawn.iter() if box.get("class") == "box circle"]) == 2


def test_a_revision_is_read_as_a_folder_is() -> None:
    needs.tool("git", get="apt install git")
    if subprocess.run(["git", "rev-parse", "HEAD"], cwd=ROOT, capture_output=True, check=False).returncode:
        pytest.skip("needs the repository: git clone it")
    modules = {module.path: module for module in read_tree("HEAD")}
    assert modules["axis/errors.py"].name == "trimtab.axis.errors" and "UserError" in modules["axis/errors.py"].text
    assert draw_structure.main(["--tree", "no-such-revision"]) == 2


def test_every_file_that_the_documents_link_to_is_there() -> None:
    for page in PAGES:
        for target in re.findall(r"\]\((?!https?:)([^)#]+)", page.read_text(encoding="utf-8")):
            assert (page.parent / target).exists(), f"{page.name} links to {target}"


def test_every_recipe_that_the_readme_names_ships() -> None:
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    named = set(re.findall(r"\b((?:smollm2|qwen3|llama|gemma)[\w.\-]*/(?:sft|demo))\b", text))
    assert named
    assert named <= set(shipped_recipes())


def test_the_scripts_for_clusters_parse() -> None:
    needs.tool("bash", get="apt install bash")
    text = (ROOT / "docs/clusters.md").read_text(encoding="utf-8")
    for script in re.findall(r"```bash\n(.*?)```", text, re.DOTALL):
        subprocess.run(["bash", "-n"], input=script, text=True, check=True)
    (manifest,) = re.findall(r"```yaml\n(.*?)```", text, re.DOTALL)
    service, job = yaml.safe_load_all(manifest)
    (command,) = job["spec"]["template"]["spec"]["containers"][0]["args"]
    subprocess.run(["bash", "-n"], input=command, text=True, check=True)
    assert service["metadata"]["name"] == job["spec"]["template"]["spec"]["subdomain"]
    for name in re.findall(r"accelerate_configs/([\w-]+)\.yaml|CONFIGS/([\w-]+)\.yaml", text):
        assert "".join(name) in accelerate_configs()


# All of our Markdown.
PAGES = sorted([*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md"), ROOT / "benchmarks" / "README.md"])
GLOSSARY = ROOT / "docs" / "glossary.md"
WIDTH, CELL, GLOSSARY_LINES = 100, 20, 70
THE_MODULES_OWN_WORDS = ROOT / "docs" / "map.md"  # the first lines of the modules, as write_map.py copies them


def prose_of(text: str) -> list[tuple[int, str]]:
    """Numbered lines outside of code blocks."""
    found, fenced = [], False
    for number, line in enumerate(text.splitlines(), 1):
        if line.lstrip().startswith("```"):
            fenced = not fenced
        elif not fenced:
            found.append((number, line))
    return found


def cells_of(line: str) -> list[str]:
    """The cells of a table's row; none of any other line."""
    row = line.strip()
    return [cell.strip() for cell in re.split(r"(?<!\\)\|", row)[1:-1]] if row.startswith("|") else []


def too_long(text: str) -> list[int]:
    """Numbers of the lines over 100 columns; tables, code blocks and the targets of links may be longer."""
    return [
        number
        for number, line in prose_of(text)
        if not cells_of(line) and len(re.sub(r"(?<=\])\([^)]*\)|https?://\S+", "", line)) > WIDTH
    ]


def overfull(text: str) -> list[str]:
    """Cells of tables with more than 20 words."""
    return [cell for _, line in prose_of(text) for cell in cells_of(line) if len(cell.split()) > CELL]


def ragged(text: str) -> list[int]:
    """Numbers of the rows that have other cells than the row above them."""
    lines = dict(prose_of(text))
    return [
        number
        for number, line in lines.items()
        if (above := cells_of(lines.get(number - 1, ""))) and cells_of(line) and len(above) != len(cells_of(line))
    ]


def ruled_out(text: str) -> list[str]:
    """What the glossary's last column names."""
    rows = [cells_of(line) for _, line in prose_of(text)]
    return [word.strip() for row in rows[1:] if len(row) == 3 for word in row[2].split(",") if word.strip(" -not")]


def used(words: list[str], text: str) -> list[str]:
    """Those of the words that a text uses, however its lines break; code may bear any name."""
    plain = " ".join(re.sub(r"`[^`]*`", "", " ".join(line for _, line in prose_of(text))).split())
    return [word for word in words if re.search(rf"\b{re.escape(word)}\b", plain, re.IGNORECASE)]


def test_no_line_of_the_documents_is_longer_than_100_columns() -> None:
    assert too_long(f"| {'a ' * 99} |\n```\n{'b ' * 99}\n```\n[name](https://{'c' * 99})\n{'d ' * 51}") == [6]
    assert {str(page): long for page in PAGES if (long := too_long(page.read_text(encoding="utf-8")))} == {}


def test_no_cell_of_a_table_has_more_than_20_words() -> None:
    assert overfull("| a | b |\n|---|---|\n| c \\| " + "d " * 18 + "| " + "e " * 21 + "|") == [("e " * 21).strip()]
    assert {str(page): full for page in PAGES if (full := overfull(page.read_text(encoding="utf-8")))} == {}


def test_every_row_of_a_table_has_the_cells_of_its_head() -> None:
    assert ragged("| a | b |\n|---|---|\n| c \\| d | e |\n| f |") == [4]
    assert {str(page): torn for page in PAGES if (torn := ragged(page.read_text(encoding="utf-8")))} == {}


def test_the_glossary_is_a_page() -> None:
    assert len(GLOSSARY.read_text(encoding="utf-8").splitlines()) <= GLOSSARY_LINES
    for page in (ROOT / "README.md", ROOT / "CONTRIBUTING.md"):
        assert "](docs/glossary.md)" in page.read_text(encoding="utf-8"), page.name


def test_the_documents_use_the_words_of_the_glossary() -> None:
    words = ruled_out(GLOSSARY.read_text(encoding="utf-8"))
    assert {"foretold", "live conversation", "further fine-tuning", "baked"} <= set(words)
    assert used(words, "A live\nconversation is `foretold`.") == ["live conversation"]
    pages = set(PAGES) - {GLOSSARY, THE_MODULES_OWN_WORDS}
    assert {str(page): bad for page in pages if (bad := used(words, page.read_text(encoding="utf-8")))} == {}


def test_every_heading_that_the_documents_link_to_is_there() -> None:
    for page in PAGES:
        for target, heading in re.findall(r"\]\((?!https?:)([^)#]*)#([^)]+)\)", page.read_text(encoding="utf-8")):
            there = (page.parent / target if target else page).read_text(encoding="utf-8")
            assert heading in headings(there), f"{page.name} links to {target}#{heading}"


def headings(text: str) -> set[str]:
    """A page's headings as GitHub names them in links."""
    titles = [line.lstrip("#").strip().lower() for _, line in prose_of(text) if line.startswith("#")]
    return {re.sub(r"[^\w\- ]", "", title).replace(" ", "-") for title in titles}
