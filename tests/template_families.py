"""The model families' chat templates: short ones of our own that do what those do, what is right for each, and a tokenizer.

``chat_templates`` holds the templates; each says at its top what a renderer can trip over in it.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

MARK = r"<[^<>\s'\"{}]+>|\[/?[A-Z_]+\]"  # <|im_start|>, </think>, <turn|>, [INST]
FOLDER = Path(__file__).with_name("chat_templates")
OFF = {"enable_thinking": False}
EMPTY = "<think>\n\n</think>\n\n"
THINK = ("<think>", "</think>")


@dataclass(frozen=True)
class Family:
    """What is right for a family.

    Attributes:
        end: what ends a last answer.
        earlier: what ends one that a user turn follows; "" where it is the same.
        eos: the tokenizer's end.
        on: what prompts go on with after the template's own.
        off: the same with ``enable_thinking: false``.
        thought: marks of a thought.
        folds: whether a system prompt becomes part of the user's turn.
        developer: the role that a developer's message gets.
        tool: whether a tool's message is taken.
        real: files among TRL's templates that are the family's own.
    """

    end: str
    earlier: str = ""
    eos: str = "<|endoftext|>"
    on: str = ""
    off: str = ""
    thought: tuple[str, str] | None = None
    folds: bool = False
    developer: str = "system"
    tool: bool = False
    real: tuple[str, ...] = ()


DEEPSEEK = "<｜end▁of▁sentence｜>"
FINAL = "<|channel|>final<|message|>"
FAMILIES: dict[str, Family] = {
    "smollm2": Family("<|im_end|>", eos="<|im_end|>", developer="developer", tool=True),
    "qwen3": Family("<|im_end|>", on=EMPTY, thought=THINK, tool=True, real=("qwen3",)),
    "qwen3_moe": Family("<|im_end|>", tool=True, real=("qwen3_instruct_2507",)),
    "qwen3_5": Family("<|im_end|>", on="\n</think>\n\n", thought=THINK, tool=True, real=("qwen3_5_think", "qwen3_6")),
    "llama3": Family("<|eot_id|>", developer="developer", tool=True, real=("llama3", "llama3_1", "llama3_2")),
    "gemma2": Family("<end_of_turn>", folds=True, developer="user", real=("gemma",)),
    "gemma3": Family("<end_of_turn>", real=("gemma3",)),
    "gemma4": Family(
        "<turn|>", thought=("<|channel>", "<channel|>"), developer="developer", real=("gemma4",)
    ),
    "olmo3": Family("<|endoftext|>", earlier="<|im_end|>"),
    "mistral_older": Family("</s>", eos="</s>", folds=True, developer="user"),
    "mistral": Family("</s>", eos="</s>"),
    "phi": Family("<|end|>", real=("phi3", "phi3_5")),
    "glm": Family("<|user|>", on="\n<think></think>\n", off="\n", thought=THINK, tool=True, real=("glm4moe",)),
    "gpt_oss": Family(
        "<|return|>", earlier="<|end|>", eos="<|return|>", on=FINAL, off=FINAL, developer="developer", real=("gptoss",),
        thought=("<|channel|>analysis<|message|>", f"<|end|><|start|>assistant{FINAL}"),
    ),
    "deepseek": Family(
        DEEPSEEK, eos=DEEPSEEK, on="\n</think>\n\n", off="\n</think>\n\n", thought=THINK, tool=True, real=("deepseek_r1_distill",)
    ),
    "command": Family("<|END_RESPONSE|>", eos="<|END_OF_TURN_TOKEN|>", real=("cohere2",)),
    "granite": Family("<|end_of_text|>", eos="<|end_of_text|>", developer="developer", tool=True),
    "smollm3": Family("<|im_end|>", thought=THINK, tool=True),
}  # fmt: skip


def own_template(name: str) -> str:
    """Our short template of a family."""
    return (FOLDER / f"{name}.jinja").read_text(encoding="utf-8")


def family_tokenizer(template: str, eos: str = "<|endoftext|>") -> Any:
    """A byte-level tokenizer in which all that looks like a mark in the template is a token of its own."""
    pieces = [f"<|{role}|>" for role in ("system", "user", "assistant", "end")]
    special = list(dict.fromkeys(["<|endoftext|>", "<bos>", eos, *pieces, *re.findall(MARK, template)]))
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)  # type: ignore[assignment]
    tokenizer.decoder = decoders.ByteLevel()  # type: ignore[assignment]
    trainer = trainers.BpeTrainer(
        vocab_size=len(special) + 280,
        special_tokens=special,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(["Tell me of the sea, the ships and the harbour."], trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token="<bos>",
        eos_token=eos,
        pad_token="<|endoftext|>",
        padding_side="left",
        chat_template=template,
    )
