"""Preference pairs: chosen from the capped self, rejected from the uncapped one, same prompt, same seed.

Both are the base model, so the pairs are made once, before training. A conversation's earlier turns are the capped self's,
shared by both. Pairs that do not differ are dropped and counted. The file is TRL's preference format, one JSON object a line
with ``prompt``, ``chosen`` and ``rejected`` as messages, and ``chat_template_kwargs`` where the recipe has some: any preference
trainer reads it. ``chosen_ended`` and ``rejected_ended`` say whether an answer ended by itself or was cut.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from trimtab.axis import Floor
from trimtab.axis.chat import ChatFormat, chat
from trimtab.axis.files import write_jsonl
from trimtab.axis.models import Loaded
from trimtab.axis.sampling import Answer, SamplingOptions, sample_answers
from trimtab.train.rollouts import TrainPrompt

log = logging.getLogger("trimtab")


def make_pairs(
    loaded: Loaded,
    form: ChatFormat,
    floor: Floor,
    prompts: Sequence[TrainPrompt],
    path: Path,
    *,
    options: SamplingOptions,
    strength: float,
    seed: int,
) -> dict[str, Any]:
    """Sample the pairs and write them.

    Args:
        loaded: the base model.
        form: chat format.
        floor: the cap's floor.
        prompts: drift prompts.
        path: where the pairs go (JSON Lines).
        options: sampling options.
        strength: strength of the cap.
        seed: sampling seed.

    Returns:
        Facts: ``pairs`` kept, ``same`` and ``empty`` dropped.
    """

    def answers(messages: Sequence[Sequence[dict[str, str]]], capped: bool, title: str) -> list[Answer]:
        return sample_answers(
            loaded.model, form, messages, options,
            seed=seed, floor=floor if capped else None, strength=strength, title=f"pairs: {title}",
        )  # fmt: skip

    chats = [chat(prompt.system, prompt.turns[0]) for prompt in prompts]
    longest = max(len(prompt.turns) for prompt in prompts)
    for turn in range(1, longest):  # play the turns before the last
        going = [i for i, prompt in enumerate(prompts) if len(prompt.turns) > turn]
        said = answers([chats[i] for i in going], True, f"turn {turn}")
        for i, answer in zip(going, said, strict=True):
            answered = {"role": "assistant", "content": answer.text}
            chats[i] = [*chats[i], answered, {"role": "user", "content": prompts[i].turns[turn]}]
    chosen = answers(chats, True, "chosen")
    rejected = answers(chats, False, "rejected")
    rows: list[dict[str, Any]] = []
    same = empty = 0
    for prompt, messages, good, bad in zip(prompts, chats, chosen, rejected, strict=True):
        if not good.text.strip() or not bad.text.strip():
            empty += 1
        elif good.text.strip() == bad.text.strip():
            same += 1
        else:
            rows.append(
                {
                    "prompt": form.fold(messages),
                    "chosen": [{"role": "assistant", "content": good.text}],
                    "rejected": [{"role": "assistant", "content": bad.text}],
                    "chosen_ended": good.ended,
                    "rejected_ended": bad.ended,
                    **({"chat_template_kwargs": form.template_kwargs} if form.template_kwargs else {}),
                    "id": prompt.id,
                    "source": prompt.source,
                    "cap_strength": strength,
                    "seed": seed,
                }
            )
    write_jsonl(path, rows)
    facts = {"pairs": len(rows), "same": same, "empty": empty}
    log.info("pairs: %d kept, %d dropped as both answers are the same, %d as one is empty", len(rows), same, empty)
    return facts
