"""Rewards for capped GRPO. Each is a TRL reward function, bound to the trainer whose model it reads.

A completion may hold several answers; its reward is the mean over them. Log-probabilities are of the tokens that were sampled,
with the end of the answer: to stop is a choice of the policy's too, and an answer of no words is one that has to be scored.
``assistant`` and the judge read the text.
"""

from __future__ import annotations

import contextlib
import functools
import importlib
import inspect
import logging
import math
import os
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from trimtab.axis import UserError
from trimtab.axis.chat_format import ChatFormat
from trimtab.axis.echo import echoes
from trimtab.axis.files import fingerprint
from trimtab.axis.given import Given
from trimtab.axis.reader import Reader, read_states, rows_to_read
from trimtab.axis.sampling import batches_on_all_ranks, pad_left, seed_of
from trimtab.axis.scoring import SCORE_BATCH, given_logprobs, relevance
from trimtab.axis.substance import new_words, without_question
from trimtab.recipes import data
from trimtab.recipes.shipped_reader import fit_known, read_known

log = logging.getLogger("trimtab")

# Chosen on the gallery's dev split, read by SmolLM2. MIDDLE: relevance of what an answer adds, nat a token, at which it is half
# on the question, and SCALE how steeply that changes around it. Most non-answers that name the subject lie below 0 by that.
MIDDLE, SCALE = 0.2, 0.05
ENOUGH = 8  # new words of a whole answer: hollow phrases have 2 to 4, and half of the base's own answers 13 or more
OTHERS = 3  # questions that an answer is held against

Turn = tuple[list[dict[str, str]], str]
TurnIds = tuple[list[int], list[int]]
RewardFunction = Callable[..., Any]


@dataclass(frozen=True)
class Said:
    """One answer of a rollout.

    Attributes:
        messages: before the answer.
        text: the answer.
        before: the tokens before it, as they were sampled.
        ids: its tokens, with a thought before it if there is one, and the end of turn where it ended by itself; at least one.
    """

    messages: list[dict[str, str]]
    text: str
    before: list[int]
    ids: list[int]


class TurnReward:
    """A reward of single answers, turned into one of whole completions.

    Subclasses give :meth:`score`. TRL wants ``__name__``; the trainer is bound afterwards. One that calls the model must do
    as many forwards as every other rank: see :func:`~trimtab.axis.sampling.batches_on_all_ranks` and the trainer's ``most``.
    """

    name = ""

    def __init__(self) -> None:
        self.__name__ = self.name
        self.trainer: Any = None

    def __call__(
        self, turns: Sequence[Sequence[Turn]], turn_ids: Sequence[Sequence[TurnIds]], **columns: Any
    ) -> list[float | None]:
        """Mean over each completion's answers; None where none could be scored."""
        answers = [
            Said(messages, text, before, ids)
            for row, row_ids in zip(turns, turn_ids, strict=True)
            for (messages, text), (before, ids) in zip(row, row_ids, strict=True)
        ]
        scores = iter(self.score(answers))
        found: list[float | None] = []
        for row in turns:
            values = [value for value in (next(scores) for _ in row) if not math.isnan(value)]
            found.append(sum(values) / len(values) if values else None)
        return found

    def score(self, answers: Sequence[Said]) -> list[float]:
        """Reward of each answer; NaN where it can't be scored."""
        raise NotImplementedError

    def logprobs(self, model: Any, prompts: Sequence[list[int]], answers: Sequence[Said]) -> list[float]:
        """Mean log-probability of each answer's tokens after its prompt, nat a token."""
        given = Given(prompts, [answer.ids for answer in answers])
        title = f"reward: {self.name}"
        sums = given_logprobs(model, self.trainer.form, given, title=title, most=self.trainer.most)
        return [total / len(answer.ids) for total, answer in zip(sums, answers, strict=True)]


class AssistantAnswer(TurnReward):
    """An answer to the question, given by the Assistant: see :func:`assistant_rewards`.

    The reader is fitted once a run, on the texts that ship. All ranks read them, since each forward may be a collective. The
    first rank fits and keeps the reader, and every rank loads it, in a resumed run as well.

    Args:
        folder: where the reader is kept; None keeps none, and each rank fits its own.
    """

    name = "assistant"

    def __init__(self, folder: Path | None = None) -> None:
        super().__init__()
        self._folder = folder
        self._reader: Reader | None = None

    def score(self, answers: Sequence[Said]) -> list[float]:
        """Between 0 and 1; the question is the user's last message."""
        trainer = self.trainer
        questions, texts = [answer.messages[-1]["content"] for answer in answers], [answer.text for answer in answers]
        with trainer.as_base() as model:
            if self._reader is None:
                self._reader = self._fitted(model)
            return assistant_rewards(model, trainer.form, self._reader, questions, texts, most=trainer.most)

    def _fitted(self, model: Any) -> Reader:
        trainer, texts = self.trainer, data.reader_texts()
        name = f"reader-{fingerprint([asdict(text) for text in texts])[:12]}.safetensors"
        path = None if self._folder is None else self._folder / name
        if path is not None and not trainer.most(int(not path.exists())):  # there for every rank
            return Reader.load(path)
        title = f"reward: {self.name}: fitting the reader"
        layers, states = read_known(model, trainer.form.tokenizer, trainer.form, texts, title=title)
        if path is None:
            return fit_known(texts, states, layers)[0]
        if trainer.accelerator.is_main_process:
            fit_known(texts, states, layers)[0].save(path)
        trainer.accelerator.wait_for_everyone()
        return Reader.load(path)


def assistant_rewards(
    model: Any,
    form: ChatFormat,
    reader: Reader,
    questions: Sequence[str],
    answers: Sequence[str],
    *,
    title: str = "reward: assistant",
    most: Callable[[int], int] = int,
) -> list[float]:
    """Reward of answers to their questions by the Assistant, each between 0 and 1.

        r(y) = sigmoid(-s(y)) sigmoid((relevance(y') - MIDDLE) / SCALE) min(1, n(y) / ENOUGH)^2

    s: log-odds that a persona speaks, by the reader. y': what the answer adds, see
    :func:`~trimtab.axis.substance.without_question`. Relevance: see :func:`~trimtab.axis.scoring.relevance`, against questions of
    the train split that the question alone chooses, so that no other rollout changes a reward. n: how many words it adds, see
    :func:`~trimtab.axis.substance.new_words`. So a refusal, an offer or a vague sentence earns nothing by naming the subject.
    No part sees a system prompt. An answer that adds no word earns 0, and so does one that repeats the question.

    Args:
        model: the frozen base, adapter off, cap off.
        form: chat format.
        reader: fitted on that model.
        questions: the user's last message before each answer.
        answers: texts.
        title: label of the progress bar.
        most: as of :func:`~trimtab.axis.sampling.batches_on_all_ranks`.
    """
    counts = [new_words(question, answer) for question, answer in zip(questions, answers, strict=True)]
    kept = [i for i, count in enumerate(counts) if count and not echoes(answers[i], questions[i])]
    asked, said = [questions[i] for i in kept], [answers[i] for i in kept]
    given = rows_to_read(form.tokenizer, form, asked, said)
    odds = reader.log_odds(read_states(model, form.tokenizer, given, reader.layers, title=title, most=most))
    others = [other_questions(question) for question in asked]
    added = [without_question(question, answer) for question, answer in zip(asked, said, strict=True)]
    related = relevance(model, form, asked, added, others, title=title, most=most)
    whole = substance(torch.tensor([counts[i] for i in kept]))
    paid = torch.sigmoid(-torch.tensor(odds)) * on_question(torch.tensor(related)) * whole
    found = [0.0] * len(answers)
    for i, value in zip(kept, paid.tolist(), strict=True):
        found[i] = value
    return found


def on_question(related: Tensor) -> Tensor:
    """How much answers are on their question, between 0 and 1, by the relevance of what they add, nat a token."""
    return torch.sigmoid((related - MIDDLE) / SCALE)


def substance(counts: Tensor) -> Tensor:
    """How much answers say beyond their question, between 0 and 1, by their counts of new words."""
    return (counts / ENOUGH).clamp(max=1) ** 2


@functools.cache  # the completions of a prompt share it
def other_questions(question: str) -> tuple[str, ...]:
    """:data:`OTHERS` questions of the train split that an answer is held against: for one question always the same."""
    pool = [other for other in data.questions("train") if other != question]
    start = seed_of(["other questions", question])
    return tuple(pool[(start + k * (len(pool) // OTHERS)) % len(pool)] for k in range(OTHERS))


class PersonaRatio(TurnReward):
    """Minus the persona log-likelihood ratio under the frozen base: text that is likelier without the role's prompt than with it.

    It says how little of the prompt a text carries, and nothing else: a refusal, a stock phrase, an answer to another question
    score highest. Answers without a system prompt have no role to tell apart, and are not scored.
    """

    name = "persona_llr"

    def __init__(self) -> None:
        super().__init__()
        log.warning(
            "the reward persona_llr pays most for not answering: a refusal or a stock phrase carries least of a role's prompt; "
            "take the reward assistant, or add it"
        )

    def score(self, answers: Sequence[Said]) -> list[float]:
        """-LLR of each answer, nat a token."""
        under_role = [i for i, answer in enumerate(answers) if answer.messages[0]["role"] == "system"]
        chosen = [answers[i] for i in under_role]
        form = self.trainer.form
        prompts = [*(answer.before for answer in chosen), *(form.prompt_ids(answer.messages[1:]) for answer in chosen)]
        with self.trainer.as_base() as model:
            both = self.logprobs(model, prompts, [*chosen, *chosen])
        values = [float("nan")] * len(answers)
        for i, with_role, without in zip(under_role, both[: len(chosen)], both[len(chosen) :], strict=True):
            values[i] = without - with_role
        return values


class CappedSelfLikelihood(TurnReward):
    """Mean log-probability of the answer's tokens under the capped self: adapter off, cap on.

    Its largest value is at the capped self's likeliest text, not at what it usually says: stock phrases and repetition.
    """

    name = "capped_self"

    def __init__(self) -> None:
        super().__init__()
        log.warning(
            "the reward capped_self pays most for the likeliest text, such as stock phrases and repetition: keep an eye on "
            "repetition_change in the report and on train.beta, or take the reward assistant"
        )

    def score(self, answers: Sequence[Said]) -> list[float]:
        """Log-probability a token, nat."""
        with self.trainer.as_base(capped=True) as model:
            return self.logprobs(model, [answer.before for answer in answers], answers)


class CappedSelfRatio(TurnReward):
    """How much likelier the capped self would say it than the learner does, to the same prompt.

        r(y) = [ log p(y | capped self) - log p(y | learner, uncapped) ] / |y|        nat a token

    Its mean over the learner's own text is minus the KL divergence to the capped self, a token. A learner that is the capped self
    is paid nothing for any text, and one that says a phrase more often than the capped self does is paid less for it than for
    another: no phrase wins for good. It needs no system prompt.
    """

    name = "capped_self_llr"

    def score(self, answers: Sequence[Said]) -> list[float]:
        """Log-likelihood ratio of each answer, nat a token."""
        trainer, prompts = self.trainer, [answer.before for answer in answers]
        with trainer.as_base(capped=True) as model:
            wanted = self.logprobs(model, prompts, answers)
        with trainer.as_learner() as model:
            said = self.logprobs(model, prompts, answers)
        return [one - other for one, other in zip(wanted, said, strict=True)]


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
    def score(self, answers: Sequence[Said]) -> list[float]:
        """Share between 0 and 1."""
        trainer, form = self.trainer, self.trainer.form
        floor = trainer.floor
        rows = [[*answer.before, *answer.ids] for answer in answers]
        values = [float("nan")] * len(rows)
        for batch in batches_on_all_ranks([len(row) for row in rows], SCORE_BATCH, trainer.most):
            tokens = [rows[i] for i in batch] or [[form.end_token]]
            ids, mask = pad_left(tokens, form.tokenizer.pad_token_id, trainer.accelerator.device)
            with trainer.as_learner() as model, trainer.controller.recording(floor.layers) as recording:
                model(input_ids=ids, attention_mask=mask, logits_to_keep=1)
            projections = trainer.penalty.base_projections(recording)
            above = projections >= floor.tau.to(projections.device)[:, None, None]
            for k, i in enumerate(batch):
                values[i] = float(above[:, k, -len(answers[i].ids) :].float().mean())
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

    def score(self, answers: Sequence[Said]) -> list[float]:
        """Score between 0 and 1; NaN where the judge gave none."""
        scores = self._ask([(answer.messages, answer.text) for answer in answers])
        return [float("nan") if score is None else score / 10 for score in scores]


SHIPPED: dict[str, Callable[[], TurnReward]] = {
    reward.name: reward for reward in (AssistantAnswer, CappedSelfRatio, CappedSelfLikelihood, PersonaRatio, AboveFloor)
}


def make_rewards(entries: Sequence[Mapping[str, Any]], *, folder: Path) -> tuple[list[RewardFunction], list[float]]:
    """Reward functions and weights of a recipe's ``method.rewards``.

    Args:
        entries: name, weight, and the judge's settings.
        folder: of the run, where a judge's answers and the fitted reader are kept.

    Raises:
        UserError: if a function can't be imported.
    """
    functions: list[RewardFunction] = []
    for entry in entries:
        if entry["name"] == "judge":
            functions.append(Judge(entry["judge"], folder / "judge.jsonl"))
        elif entry["name"] == AssistantAnswer.name:
            functions.append(AssistantAnswer(folder))
        elif entry["name"] in SHIPPED:
            functions.append(SHIPPED[entry["name"]]())
        else:
            functions.append(imported_reward(entry["name"]))
    return functions, [float(entry["weight"]) for entry in entries]


def bind_rewards(functions: Sequence[RewardFunction], trainer: Any) -> None:
    """Give the shipped rewards the trainer whose model they read."""
    for function in functions:
        if isinstance(function, TurnReward):
            function.trainer = trainer


def imported_reward(name: str) -> RewardFunction:
    """A reward function of the user's, ``package.module:function``, whose faults are told as the user's.

    Raises:
        UserError: if it can't be imported; and when it is called, if it fails or doesn't give a number or None a completion.
    """
    module, _, attribute = name.partition(":")
    try:
        function = getattr(importlib.import_module(module), attribute)
    except Exception as error:  # importing runs the module, which may raise anything
        raise UserError(
            f"the reward {name!r} can't be imported: {error}",
            key="method.rewards",
            remedy=f"name one of {', '.join([*SHIPPED, 'judge'])}, or package.module:function that Python can import here",
        ) from error
    if not callable(function):
        raise UserError(f"the reward {name!r} is no function", key="method.rewards", remedy="name a function")
    return _told_as_the_users(name, function)


def _told_as_the_users(name: str, function: Callable[..., Any]) -> RewardFunction:
    @contextlib.contextmanager
    def its_faults() -> Iterator[None]:
        try:
            yield
        except Exception as error:
            place = traceback.extract_tb(error.__traceback__)[-1]
            raise UserError(
                f"the reward {name!r} failed: {type(error).__name__}: {error}",
                file=f"{place.filename}:{place.lineno}",
                key="method.rewards",
                remedy="mend it; the same command resumes from the last checkpoint",
            ) from error

    def numbers(values: Any, count: int) -> list[float | None]:
        try:
            found = [None if value is None else float(value) for value in values]
        except (TypeError, ValueError):
            found = []
        if len(found) != count or isinstance(values, str):
            raise UserError(
                f"the reward {name!r} gave {str(values)[:80]} for {count} completions",
                key="method.rewards",
                remedy="have it return a list with one number, or None, for each completion",
            )
        return found

    async def awaited(*, completions: Any, **columns: Any) -> list[float | None]:
        with its_faults():
            found = await function(completions=completions, **columns)
        return numbers(found, len(completions))

    def called(*, completions: Any, **columns: Any) -> list[float | None]:
        with its_faults():
            found = function(completions=completions, **columns)
        return numbers(found, len(completions))

    # TRL awaits those that are async, and logs them all under their names
    is_async = any(map(inspect.iscoroutinefunction, (function, getattr(function, "__call__", None))))  # noqa: B004
    reward: Any = awaited if is_async else called
    reward.__name__ = getattr(function, "__name__", name)
    return reward  # type: ignore[no-any-return]
