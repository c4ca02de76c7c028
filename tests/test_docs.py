"""What the documents say is run."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import build_floor, build_model

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


def test_every_file_that_the_documents_link_to_is_there() -> None:
    for page in [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *(ROOT / "docs").glob("*.md")]:
        for target in re.findall(r"\]\((?!https?:)([^)#]+)", page.read_text(encoding="utf-8")):
            assert (page.parent / target).exists(), f"{page.name} links to {target}"


def test_every_recipe_that_the_readme_names_ships() -> None:
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    named = set(re.findall(r"\b((?:smollm2|qwen3|llama|gemma)[\w.\-]*/(?:sft|demo))\b", text))
    assert named
    assert named <= set(shipped_recipes())
