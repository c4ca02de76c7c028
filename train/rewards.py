"""Rewards for capped GRPO. Each is a TRL reward function, bound to the trainer whose model it reads.

A completion may hold several answers; its reward is the mean over them.
"""

from __future__ import annotations

import importlib
import logging
import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from trimtab.axis import UserError
from trimtab.axis.sampling import batches_on_all_ranks, pad_left
from trimtab.axis.scoring import SCORE_BATCH, answer_logprobs, persona_llr

log = logging.getLogger("trimtab")

Turn = tuple[list[dict[str, str]], str]
RewardFunction = Callable[..., list[float | None]]


class TurnReward:
    """A reward of single answers, turned into one of whole completions.

    Subclasses give :meth:`score`. TRL wants ``__name__``; the trainer is bound afterwards. One that calls the model must do
    as many forwards as every other rank: see :func:`~trimtab.axis.sampling.batches_on_all_ranks` and the trainer's ``most``.
    """

    name = ""

    def __init__(self) -> None:
        self.__name__ = self.name
        self.trainer: Any = None

    def __call__(self, turns: Sequence[Sequence[Turn]], **columns: Any) -> list[float | None]:
        """Mean over each completion's answers; None where none could be scored."""
        flat = [turn for row in turns for turn in row]
        scores = iter(self.score([messages for messages, _ in flat], [text for _, text in flat]))
        found: list[float | None] = []
        for row in turns:
            values = [value for value in (next(scores) for _ in row) if value == value]
            found.append(sum(values) / len(values) if values else None)
        return found

    def score(self, prompts: list[list[dict[str, str]]], texts: list[str]) -> list[float]:
        """Reward of each answer; NaN where it can't be scored."""
        raise NotImplementedError


class PersonaRatio(TurnReward):
    """Minus the persona log-likelihood ratio under the frozen base: text that the Assistant explains better than the role.

    Answers without a system prompt have no role to tell apart, and are not scored.
    """

    name = "persona_llr"

    def score(self, prompts: list[list[dict[str, str]]], texts: list[str]) -> list[float]:
        """-LLR of each answer, nat a token."""
        scored = [i for i, prompt in enumerate(prompts) if prompt[0]["role"] == "system"]
        values = [float("nan")] * len(texts)
        with self.trainer.as_base() as model:
            found = persona_llr(
                model,
                self.trainer.form,
                [prompts[i] for i in scored],
                [prompts[i][1:] for i in scored],
                [texts[i] for i in scored],
                title="reward: persona ratio",
                most=self.trainer.most,
            )
        for i, value in zip(scored, found, strict=True):
            values[i] = -value
        return values


class CappedSelfLikelihood(TurnReward):
    """Mean log-probability of the answer's tokens under the capped self: adapter off, cap on.

    Sharp, repetitive text is likely under most models: keep an eye on ``repetition_change`` in the report, or set ``train.beta``.
    """

    name = "capped_self"

    def score(self, prompts: list[list[dict[str, str]]], texts: list[str]) -> list[float]:
        """Log-probability a token, nat."""
        with self.trainer.as_base(capped=True) as model:
            sums = answer_logprobs(
                model, self.trainer.form, prompts, texts, title="reward: capped self", most=self.trainer.most
            )
        counts = [len(self.trainer.form.answer_ids(text)) for text in texts]
        return [value / count if count else float("nan") for value, count in zip(sums, counts, strict=True)]


class AboveFloor(TurnReward):
    """Share of (token, layer) slots of the answer that lie above the floor, in the model as it is now, uncapped.

    It reads the very projections that training moves, so it can be gamed: by moving them without another word in the text, and by
    text that happens to project high. Use it beside a reward of the text.
    """

    name = "above_floor"

    def __init__(self) -> None:
        super().__init__()
        log.warning(
            "the reward above_floor can be gamed: it rises without any change of the text; add one that reads the text"
        )

    @torch.no_grad()
    def score(self, prompts: list[list[dict[str, str]]], texts: list[str]) -> list[float]:
        """Share between 0 and 1."""
        trainer, form = self.trainer, self.trainer.form
        floor = trainer.floor
        tails = [form.answer_ids(text) for text in texts]
        rows = [[*form.prompt_ids(prompt), *tail] for prompt, tail in zip(prompts, tails, strict=True)]
        values = [float("nan")] * len(texts)
        scored = [i for i, tail in enumerate(tails) if tail]
        for batch in batches_on_all_ranks([len(rows[i]) for i in scored], SCORE_BATCH, trainer.most):
            chosen = [scored[k] for k in batch]
            tokens = [rows[i] for i in chosen] or [[form.end_token]]
            ids, mask = pad_left(tokens, form.tokenizer.pad_token_id, trainer.accelerator.device)
            with trainer.controller.uncapped(), trainer.controller.recording(floor.layers) as recording:
                trainer.model(input_ids=ids, attention_mask=mask, logits_to_keep=1)
            projections = trainer.penalty.base_projections(recording)
            above = projections >= floor.tau.to(projections.device)[:, None, None]
            for k, i in enumerate(chosen):
                values[i] = float(above[:, k, -len(tails[i]) :].float().mean())
        return values


class Judge(TurnReward):
    """An OpenAI-compatible judge's score 0 to 10 of how well the answer keeps to the helpful Assistant, scaled to 0 to 1.

    An answer without a score has no reward. An endpoint that does not answer several times in a row stops the run; it goes on
    from its last checkpoint.
    """

    name = "judge"

    def __init__(self, settings: Mapping[str, Any], cache: Path) -> None:
        super().__init__()
        from trimtab.axis.judge import assistant_judge

        rank = os.environ.get("RANK", "0")  # several processes would cut off each other's lines
        self._ask = assistant_judge(settings, cache if rank == "0" else cache.with_stem(f"{cache.stem}-{rank}"))

    def score(self, prompts: list[list[dict[str, str]]], texts: list[str]) -> list[float]:
        """Score between 0 and 1; NaN where the judge gave none."""
        scores = self._ask(list(zip(prompts, texts, strict=True)))
        return [float("nan") if score is None else score / 10 for score in scores]


SHIPPED: dict[str, Callable[[], TurnReward]] = {
    reward.name: reward for reward in (PersonaRatio, CappedSelfLikelihood, AboveFloor)
}


def make_rewards(entries: Sequence[Mapping[str, Any]], *, cache: Path) -> tuple[list[RewardFunction], list[float]]:
    """Reward functions and weights of a recipe's ``method.rewards``.

    Args:
        entries: name, weight, and the judge's settings.
        cache: where a judge's answers are kept.

    Raises:
        UserError: if a function can't be imported.
    """
    functions: list[RewardFunction] = []
    for entry in entries:
        if entry["name"] == "judge":
            functions.append(Judge(entry["judge"], cache))
        elif entry["name"] in SHIPPED:
            functions.append(SHIPPED[entry["name"]]())
        else:
            functions.append(_imported(entry["name"]))
    return functions, [float(entry["weight"]) for entry in entries]


def bind_rewards(functions: Sequence[RewardFunction], trainer: Any) -> None:
    """Give the shipped rewards the trainer whose model they read."""
    for function in functions:
        if isinstance(function, TurnReward):
            function.trainer = trainer


def _imported(name: str) -> RewardFunction:
    module, _, attribute = name.partition(":")
    try:
        function = getattr(importlib.import_module(module), attribute)
    except (ImportError, AttributeError, ValueError) as error:
        raise UserError(
            f"the reward {name!r} can't be imported: {error}",
            key="method.rewards",
            remedy=f"name one of {', '.join([*SHIPPED, 'judge'])}, or package.module:function that Python can import here",
        ) from error
    if not callable(function):
        raise UserError(f"the reward {name!r} is no function", key="method.rewards", remedy="name a function")
    return function  # type: ignore[no-any-return]
