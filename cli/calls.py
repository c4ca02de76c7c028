"""What a recipe will sample and train on, counted from the plan that its stages follow: every call of ``generate``, every row.

An answer is counted at its greatest length, and texts by their characters, since no tokenizer need be at hand.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

from trimtab.axis.chat_format import chat
from trimtab.axis.extraction import rollout_items
from trimtab.axis.sampling import batches_by_length
from trimtab.eval.answers.arms import arm_names
from trimtab.eval.answers.items import benign_items, default_items, role_items
from trimtab.eval.measures import all_measures
from trimtab.eval.measures.capability_tasks import size_of, tasks_of
from trimtab.pipeline.identity import plays_training_roles
from trimtab.pipeline.instrument import HELD_OUT, TRAIN, played
from trimtab.recipes import data
from trimtab.recipes.rules import MARKUP, tokens_in
from trimtab.recipes.schema import AxisSection, EvalSection, Recipe
from trimtab.recipes.sections import Sampling
from trimtab.train.conversations import conversation_prompts, prompts_a_generation
from trimtab.train.rollouts import SAMPLERS, RolloutPlan, TrainPrompt
from trimtab.train.row_trainers import benign_plan, rollout_plan
from trimtab.train.sources import drift_sources

OF_AXIS, OF_EVAL = "axis.sampling.batch_size", "eval.sampling.batch_size"


@dataclass(frozen=True)
class Call:
    """One call of ``generate``.

    Attributes:
        rows: rows of the batch.
        prompt: tokens up to the answer, of the longest row, to which the others are padded.
        answer: most tokens of the answer.
        key: of the recipe, that says how many rows a call may have.
    """

    rows: int
    prompt: int
    answer: int
    key: str

    @property
    def steps(self) -> int:
        """Tokens that are decoded: one more than the answer has where its mean is read, which wants the last one fed as well."""
        return self.answer + (self.key in (OF_AXIS, OF_EVAL))

    @property
    def cached(self) -> int:
        """Tokens that the KV cache holds at the end."""
        return self.rows * (self.prompt + self.answer)


@dataclass(frozen=True)
class Trained:
    """Rows of training, over the whole run and all processes.

    Attributes:
        tokens: of the method's own rows.
        benign: of the rows that the barrier holds.
        longest: tokens of the longest row.
    """

    tokens: float
    benign: float
    longest: int


@dataclass(frozen=True)
class Counted:
    """What a job calls and trains.

    Attributes:
        before: calls of the stages before training, on one device.
        rollouts: calls in training; all processes do theirs at the same time.
        after: calls of the evaluation, on one device, but for its capability tasks.
        capability: calls of those.
        trained: rows of training.
        micro_batches: of one process, the control's too.
    """

    before: list[Call]
    rollouts: list[Call]
    after: list[Call]
    capability: list[Call]
    trained: Trained
    micro_batches: int


@dataclass(frozen=True)
class TrainingShape:
    """The keys of TRL's configs that say how rows are spread over steps and processes, by those libraries' names."""

    world_size: int
    per_device_train_batch_size: int
    gradient_accumulation_steps: int
    max_steps: int
    steps_per_generation: int
    generation_batch_size: int
    num_generations: int
    num_iterations: int
    shuffle_dataset: bool
    seed: int


def count(recipe: Recipe, processes: int) -> Counted:
    """Count what a recipe samples and trains on.

    Args:
        recipe: the recipe.
        processes: in training.
    """
    before = [*_axis_calls(recipe), *_pair_calls(recipe)]
    rollouts: list[Call] = []
    trained, micro_batches = Trained(0, 0, 0), 0
    if recipe.eval.tuned is None:
        shape = training_shape(recipe, processes)
        rollouts, trained = _training(recipe, shape)
        micro_batches = shape.max_steps * shape.gradient_accumulation_steps * (1 + recipe.eval.control)
    return Counted(
        before, rollouts, list(_evaluation_calls(recipe)), list(_capability_calls(recipe)), trained, micro_batches
    )


def prompt_tokens(messages: Iterable[Mapping[str, str]]) -> int:
    """Tokens of a chat, about."""
    return sum(tokens_in(message["content"]) for message in messages if message["content"])


def calls_of(lengths: Sequence[Sequence[int]], answer: int, batch_size: int, key: str) -> list[Call]:
    """The calls in which rows are sampled; under ZeRO-3 and FSDP all processes call equally often.

    Args:
        lengths: tokens of each row's prompt, for each process.
        answer: most tokens of an answer.
        batch_size: rows a call.
        key: of the recipe, that says so.
    """
    batches = [[[rows[i] for i in batch] for batch in batches_by_length(rows, batch_size)] for rows in lengths]
    return [
        Call(max(map(len, side)), max(max(batch, default=0) for batch in side), answer, key)
        for side in itertools.zip_longest(*batches, fillvalue=[])
    ]


def _sampled(prompts: Iterable[int], section: Sampling, of: str) -> list[Call]:
    return calls_of([list(prompts)], section.max_new_tokens, section.batch_size, f"{of}.sampling.batch_size")


def _context(prompt: TrainPrompt, turn: int, answer: int, longest: int | None = None) -> int:
    """Tokens up to the answer of a turn, the answers before it at their greatest length.

    Args:
        prompt: the conversation.
        turn: counted from 0; -1 is the last.
        answer: most tokens of an answer.
        longest: tokens of the longest row, in which the oldest turns make room for the answer; None for any.
    """
    turn %= len(prompt.turns)
    said = prompt_tokens(prompt.opening) + sum(map(tokens_in, prompt.turns[1 : turn + 1]))
    whole = said + turn * (answer + MARKUP)
    return whole if longest is None else min(whole, longest - answer)


def _played(
    by_rank: Sequence[Sequence[TrainPrompt]], answer: int, batch_size: int, key: str, longest: int | None = None
) -> Iterator[Call]:
    """The calls in which conversations are played turn by turn, a batch of rows for each process."""
    for turn in range(max((len(prompt.turns) for prompts in by_rank for prompt in prompts), default=0)):
        lengths = [[_context(p, turn, answer, longest) for p in prompts if len(p.turns) > turn] for prompts in by_rank]
        yield from calls_of(lengths, answer, batch_size, key)


def _axis_calls(recipe: Recipe) -> Iterator[Call]:
    """The calls in which the training axis and the held-out one are extracted, one after the other."""
    if plays_training_roles(recipe.model_dump(mode="json")):
        yield from _extraction_calls(recipe.axis, TRAIN)
    if recipe.axis.held_out_roles:
        yield from _extraction_calls(recipe.axis, HELD_OUT)


def _extraction_calls(section: AxisSection, split: data.Split) -> list[Call]:
    roles, questions = played(section, split)
    items = rollout_items(roles, questions, data.default_prompts(), default_repeats=section.default_repeats)
    return _sampled((prompt_tokens(chat(item.system, item.question)) for item in items), section.sampling, "axis")


def _pair_calls(recipe: Recipe) -> Iterator[Call]:
    """The calls in which pairs are sampled before training, for the control too."""
    method = recipe.method
    if not method.makes_pairs or recipe.eval.tuned is not None:
        return
    sampling, key = method.answers(recipe.train), method.batch_key
    answer, batch = sampling.max_new_tokens, sampling.batch_size
    prompts = drift_sources(recipe.data)
    for _ in range(1 + recipe.eval.control):
        last = [_context(p, -1, answer, recipe.row_length) for p in prompts]
        longest = max(len(p.turns) for p in prompts)
        for turn in range(1, longest):
            going = [_context(p, turn - 1, answer, recipe.row_length) for p in prompts if len(p.turns) > turn]
            yield from calls_of([going], answer, batch, key)
        for _ in ("chosen", "rejected"):
            yield from calls_of([last], answer, batch, key)


def _training(recipe: Recipe, shape: TrainingShape) -> tuple[list[Call], Trained]:
    processes, method, longest = shape.world_size, recipe.method, recipe.row_length
    calls: list[Call] = []
    if method.trains_conversations:
        calls, trained = _conversations(recipe, shape)
    elif method.makes_pairs:
        trained = _pairs_trained(recipe, shape)
    else:
        plan = rollout_plan(recipe, shape)
        calls, trained = list(rollout_calls(plan, processes, method.batch_key, longest)), _rows_trained(plan, longest)
    if method.benign_beside and (beside := benign_plan(recipe, shape)) is not None:
        calls += rollout_calls(beside, processes, method.batch_key, longest)
        rows = _rows_trained(beside, longest)
        trained = Trained(trained.tokens, rows.benign, max(trained.longest, rows.longest))
    times = 1 + recipe.eval.control  # the control is trained as the adapter itself
    return calls * times, Trained(trained.tokens * times, trained.benign * times, trained.longest)


def training_shape(recipe: Recipe, processes: int) -> TrainingShape:
    """How a recipe's rows are spread, with the libraries' defaults where it says nothing."""
    train = recipe.train
    micro, accumulation = (
        int(train.get("per_device_train_batch_size", 8)),
        int(train.get("gradient_accumulation_steps", 1)),
    )
    a_micro_step = micro * processes
    given = train.get("generation_batch_size")
    per_generation = int(given) // a_micro_step if given else int(train.get("steps_per_generation") or accumulation)
    return TrainingShape(
        world_size=processes,
        per_device_train_batch_size=micro,
        gradient_accumulation_steps=accumulation,
        max_steps=int(train.get("max_steps", 0)),
        steps_per_generation=max(per_generation, 1),
        generation_batch_size=a_micro_step * max(per_generation, 1),
        num_generations=int(train.get("num_generations", 8)),
        num_iterations=int(train.get("num_iterations", 1)),
        shuffle_dataset=train.get("shuffle_dataset") is not False,
        seed=int(train.get("seed", 0)),
    )


def rollout_calls(plan: RolloutPlan, processes: int, key: str, longest: int | None) -> Iterator[Call]:
    """The calls in which the rounds of a plan are sampled."""
    answer, batch = plan.options.max_new_tokens, plan.options.batch_size
    rounds = math.ceil(len(plan.order) / max(plan.rows_a_step * plan.every, 1))
    for number in range(rounds):
        rows = [plan.rows_of(number, rank, processes) for rank in range(processes)]
        for kind in SAMPLERS:
            chosen = [[plan.order[row] for row in own if plan.sampler_of(row) == kind] for own in rows]
            yield from _played(chosen, answer, batch, key, longest)


def _rows_trained(plan: RolloutPlan, longest: int | None) -> Trained:
    answer = plan.options.max_new_tokens
    lengths = [_context(p, -1, answer, longest) + answer for p in plan.order]
    benign = sum(length for length, p in zip(lengths, plan.order, strict=True) if p.kind == "benign")
    return Trained(sum(lengths) - benign, benign, max(lengths, default=0))


def _pairs_trained(recipe: Recipe, shape: TrainingShape) -> Trained:
    answer = recipe.method.answers(recipe.train).max_new_tokens
    lengths = [_context(p, -1, answer, recipe.row_length) + answer for p in drift_sources(recipe.data)]
    rows = recipe.method.answers_a_row * _rows(shape)
    return Trained(rows * sum(lengths) / len(lengths), 0, max(lengths))


def _rows(shape: TrainingShape) -> int:
    """Rows of the whole run over all processes."""
    a_step = shape.per_device_train_batch_size * shape.gradient_accumulation_steps * shape.world_size
    return a_step * shape.max_steps


def _conversations(recipe: Recipe, shape: TrainingShape) -> tuple[list[Call], Trained]:
    sampling, key = recipe.method.answers(recipe.train), recipe.method.batch_key
    answer, batch = sampling.max_new_tokens, sampling.batch_size
    prompts = conversation_prompts(recipe, prompts_a_generation(shape))
    calls: list[Call] = []
    lengths: list[int] = []
    for by_rank in grpo_generations(prompts, shape):
        calls += _played(by_rank, answer, batch, key)
        lengths += [_context(p, -1, answer) + answer for p in itertools.chain(*by_rank)]
    mean = sum(lengths) / max(len(lengths), 1)
    return calls, Trained(_rows(shape) * mean, 0, max(lengths, default=0))


def grpo_generations(prompts: Sequence[TrainPrompt], shape: TrainingShape) -> Iterator[list[list[TrainPrompt]]]:
    """The prompts that each process answers in each generation, as TRL's sampler hands them out."""
    from trl.trainer.utils import RepeatSampler

    own = shape.per_device_train_batch_size * shape.steps_per_generation
    of_all = own * shape.world_size
    serves = shape.steps_per_generation * shape.num_iterations
    generations = math.ceil(shape.max_steps * shape.gradient_accumulation_steps / serves)
    sampler = RepeatSampler(
        prompts,
        mini_repeat_count=shape.num_generations,
        batch_size=prompts_a_generation(shape),
        shuffle=shape.shuffle_dataset,
        seed=shape.seed,
    )
    handed = itertools.chain.from_iterable(itertools.repeat(sampler))  # an epoch after the other
    for _ in range(generations):
        chosen = [prompts[i] for i in itertools.islice(handed, of_all)]
        yield [chosen[rank * own : (rank + 1) * own] for rank in range(shape.world_size)]


def _evaluation_calls(recipe: Recipe) -> Iterator[Call]:
    """The calls of the evaluation: what all measures share, arm by arm, and what each asks for itself."""
    section = recipe.eval
    for _ in range(3 if section.reextract_roles else 0):  # tuned, base, base+cap
        yield from _extraction_calls(_reextraction(recipe), TRAIN)
    once = list(_arm_calls(section))
    for _ in range(_arms(section)):
        yield from once
    again = _asked(item.prompt for item in role_items(section.split, section.roles, section.questions))
    for _ in range(2 * len(section.durability)):  # the tuned weights and the base, each tuned further
        yield from _sampled(again, section.sampling, "eval")


def _reextraction(recipe: Recipe) -> AxisSection:
    size = {"roles": recipe.eval.reextract_roles, "questions": recipe.eval.reextract_questions}
    return recipe.axis.model_copy(update=size)


def _asked(prompts: Iterable[Iterable[Mapping[str, str]]]) -> list[int]:
    return [prompt_tokens(prompt) for prompt in prompts]


def _arm_calls(section: EvalSection) -> Iterator[Call]:
    """The calls of one arm: what all measures share, and what each asks for itself."""
    for items in (
        role_items(section.split, section.roles, section.questions),
        default_items(section.split, section.roles, section.questions),
        benign_items(section.split, section.benign),
    ):
        yield from _sampled(_asked(item.prompt for item in items), section.sampling, "eval")
    for measure in all_measures():
        for asked in measure.asks(section):
            talks = [_as_prompt(before, turns) for before, turns in zip(asked.before, asked.turns, strict=True)]
            yield from _played([talks], section.sampling.max_new_tokens, section.sampling.batch_size, OF_EVAL)


def _arms(section: EvalSection) -> int:
    return len(arm_names(section))


def _capability_calls(recipe: Recipe) -> Iterator[Call]:
    """The calls of lm-eval's tasks in every arm."""
    section = recipe.eval
    for size in map(size_of, tasks_of(section.capability, section.capability_limit)):
        if size.answer:
            lengths = [[size.prompt] * size.documents]
            key = "eval.capability_batch"
            yield from calls_of(lengths, size.answer, section.capability_batch, key) * _arms(section)


def _as_prompt(before: Sequence[Mapping[str, str]], turns: Sequence[str]) -> TrainPrompt:
    """A conversation of the evaluation as one that is played in training: user turns after some messages."""
    return TrainPrompt("", "drift", "", tuple(turns), "", tuple((m["role"], m["content"]) for m in before))
