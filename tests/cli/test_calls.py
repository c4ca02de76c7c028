"""What ``trimtab check`` counts is what the stages do: the calls of ``generate`` of real jobs, and of shipped recipes."""

from __future__ import annotations

import contextlib
import importlib
import json
import math
import re
import threading
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import yaml
from conftest import build_floor
from tiny_recipe import write_recipe
from transformers.generation.utils import GenerationMixin

from trimtab.axis.chat_format import ChatFormat
from trimtab.axis.models import load_tokenizer
from trimtab.axis.sampling import Answer, SamplingOptions
from trimtab.cli.calls import Call, calls_of, count, rollout_calls, training_shape
from trimtab.cli.check import strategy_of
from trimtab.cli.launch import resolve_accelerate_config
from trimtab.cli.work import Speed
from trimtab.eval.stages import eval_stage
from trimtab.pipeline.run import open_run
from trimtab.recipes.loader import load_recipe, shipped_recipes
from trimtab.recipes.methods import RowMethod
from trimtab.train.rollouts import RolloutPlan, RolloutSource
from trimtab.train.row_trainers import benign_plan, rollout_plan

pytestmark = pytest.mark.slow  # whole runs, counted

EVAL = {
    "roles": 3, "questions": 2, "conversations": 2, "turns": 3, "benign": 5, "benign_systems": 3, "lookalikes": 2,
    "professional": 4, "case_studies": 1,
    "sampling": {"max_new_tokens": 4, "batch_size": 8}, "reextract_roles": 2, "reextract_questions": 2,
    "susceptibility_roles": 2, "boundary_probes": 3, "capability": ["instructions"], "capability_limit": 5, "bootstrap": 200,
}  # fmt: skip


@pytest.fixture
def counter(monkeypatch: pytest.MonkeyPatch) -> Counter[tuple[int, int]]:
    """(rows, most tokens of an answer) of every call of ``generate``, and how often."""
    seen: Counter[tuple[int, int]] = Counter()
    generate = GenerationMixin.generate

    def counting(self: Any, *args: Any, **kwargs: Any) -> Any:
        if self.config.num_hidden_layers == 1:  # the toy of the rehearsal
            return generate(self, *args, **kwargs)
        ids = kwargs["input_ids"]
        config = kwargs.get("generation_config")
        longest = config.max_new_tokens if config is not None else kwargs["max_length"] - ids.shape[1]
        seen[ids.shape[0], longest] += 1
        return generate(self, *args, **kwargs)

    monkeypatch.setattr(GenerationMixin, "generate", counting)
    return seen


def of_plan(calls: list[Call]) -> Counter[tuple[int, int]]:
    return Counter((call.rows, call.steps) for call in calls)


@pytest.mark.parametrize("method", ["sft", "distill", "grpo", "dpo"])
def test_counted_calls_are_those_of_a_real_job(
    method: str, counter: Counter[tuple[int, int]], model_folder: Any, tmp_path: Path
) -> None:
    path = write_recipe(tmp_path / "recipe.yaml", model_folder("llama"), method)
    if method == "sft":
        path.write_text(
            yaml.safe_dump({**yaml.safe_load(path.read_text(encoding="utf-8")), "eval": EVAL}), encoding="utf-8"
        )
    loaded = load_recipe(path)
    counted = count(loaded.recipe, 1)
    train = importlib.import_module(f"trimtab.train.{method}").main
    assert train(["--config", str(path), "--output_dir", str(tmp_path / "run"), "--quiet"]) == 0
    assert of_plan([*counted.before, *counted.rollouts]) == counter
    if method == "sft":
        counter.clear()
        eval_stage(open_run(loaded, output_dir=str(tmp_path / "run")))
        assert of_plan([*counted.after, *counted.capability]) == counter


class Ranks:
    """The ranks of a job as threads, which meet wherever the sources of rollouts do."""

    def __init__(self, count: int) -> None:
        self.count = count
        self.asked: list[list[tuple[list[int], SamplingOptions]]] = [[] for _ in range(count)]
        self._barrier = threading.Barrier(count)
        self._given = [0.0] * count

    def over_all(self, rank: int, value: Any, combine: Callable[[list[Any]], Any]) -> Any:
        self._given[rank] = value
        self._barrier.wait()
        found = combine(list(self._given))
        self._barrier.wait()
        return found

    def trainer(self, rank: int) -> Any:
        """What a source needs of a trainer whose vLLM answers every row at its greatest length."""

        @contextlib.contextmanager
        def sampling(step: int | None, strength: float, options: SamplingOptions) -> Iterator[Any]:
            def sample(rows: Sequence[Sequence[int]], seeds: Sequence[int]) -> Iterator[Answer]:
                self.asked[rank].append((list(map(len, rows)), options))
                for index in range(len(rows)):
                    yield Answer(index, " word" * options.max_new_tokens, [0] * options.max_new_tokens, ended=False)

            yield sample

        return SimpleNamespace(
            vllm=SimpleNamespace(sampling=sampling),
            accelerator=SimpleNamespace(
                process_index=rank, num_processes=self.count, device=torch.device("cpu"),
                reduce=lambda tensor, _: self.over_all(rank, tensor, lambda each: torch.stack(each).sum(0)),
            ),
            most=lambda value: self.over_all(rank, value, max),
            state=SimpleNamespace(global_step=0),
        )  # fmt: skip

    def play(self, plan: RolloutPlan, form: ChatFormat, folder: Path, longest: int | None) -> list[Call]:
        """All rounds of a plan, and the calls that sampling by transformers would make of the rows."""

        def run(rank: int) -> None:
            source = RolloutSource(plan, form, build_floor(), folder, max_length=longest)
            source.bind(self.trainer(rank))
            for number in range(math.ceil(len(plan.order) / (plan.rows_a_step * plan.every))):
                source({"row": plan.rows_of(number, rank, self.count)[:1]})

        with ThreadPoolExecutor(self.count) as pool:
            list(pool.map(run, range(self.count)))
        calls: list[Call] = []
        for asked in zip(*self.asked, strict=True):  # all ranks sample as often
            options = asked[0][1]
            calls += calls_of([lengths for lengths, _ in asked], options.max_new_tokens, options.batch_size, "")
        return calls


@pytest.fixture(scope="module")
def form_of_smollm2() -> ChatFormat:
    return ChatFormat(load_tokenizer("smollm2-135m"))


def distinct_recipes() -> list[str]:
    """Shipped recipes that differ in more than the model."""

    def told_apart(name: str) -> str:
        recipe = load_recipe(name).recipe
        return json.dumps([recipe.data.model_dump(), recipe.method.model_dump(), recipe.train], sort_keys=True)

    return list({told_apart(name): name for name in sorted(shipped_recipes())}.values())


@pytest.mark.parametrize("name", distinct_recipes())
def test_hours_of_shipped_recipes_are_those_of_their_calls(
    name: str, form_of_smollm2: ChatFormat, tmp_path: Path
) -> None:
    """Rounds of every shipped recipe, played by the code that plays them, by as many processes as its header says."""
    loaded = load_recipe(name, ["train.max_steps=40"])
    recipe, (engine, *_) = loaded.recipe, [*re.findall(r"--accelerate (\S+)", loaded.text.split("\n\n")[0]), "cpu"]
    processes = strategy_of(resolve_accelerate_config(engine), None).processes
    arguments = training_shape(recipe, processes)
    if isinstance(recipe.method, RowMethod):
        plan = rollout_plan(recipe, arguments)
    else:
        plan = benign_plan(recipe, arguments)
    played = Ranks(processes).play(plan, form_of_smollm2, tmp_path, recipe.row_length)
    counted = list(rollout_calls(plan, processes, "", recipe.row_length))
    assert sum(call.answer for call in counted) == pytest.approx(sum(call.answer for call in played), rel=0.02)
    speed = Speed(8e9, 16e9, 36)
    assert speed.seconds(counted) == pytest.approx(speed.seconds(played), rel=0.1)
