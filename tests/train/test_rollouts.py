"""Capped rollouts on the fly: the order of rows, what they are sampled from, and what lies on disk."""

from __future__ import annotations

import json
import threading
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import datasets
import pytest
import torch
from accelerate import Accelerator
from conftest import build_floor, build_model, save_model
from peft import LoraConfig, PeftModel, get_peft_model
from peft.tuners.tuners_utils import BaseTunerLayer
from tiny_recipe import write_recipe
from transformers import AutoModelForCausalLM

from trimtab.axis import ActivationController, Floor, UserError, sampling
from trimtab.axis.chat_format import ChatFormat, chat
from trimtab.axis.files import read_jsonl, write_jsonl
from trimtab.axis.sampling import SamplingOptions, sample_batch
from trimtab.pipeline.run import open_run
from trimtab.recipes import data
from trimtab.recipes.data import Split
from trimtab.recipes.loader import load_recipe
from trimtab.recipes.sections import DataSection
from trimtab.train.rollouts import (
    IGNORED,
    RolloutPlan,
    RolloutSource,
    TrainPrompt,
    check_lengths,
    tokens_of,
    training_order,
)
from trimtab.train.sft import build_trainer, training_arguments
from trimtab.train.sources import benign_sources, drift_sources, from_file

FLOOR = build_floor((1, 2), tau=6.0)  # high: the cap changes what is said
GREEDY = SamplingOptions(max_new_tokens=6, temperature=0, batch_size=3)
DRIFT = [TrainPrompt(f"d{i}", "drift", "You are a pirate.", (f"question {i}",), "pirate") for i in range(7)]
BENIGN = [TrainPrompt(f"b{i}", "benign", "", (f"request {i}",), "benign") for i in range(5)]


# ---- the order ----


@pytest.mark.parametrize("ranks", [1, 2, 3])
@pytest.mark.parametrize(("batch_size", "share"), [(8, 0.25), (4, 0.3), (1, 0.25), (3, 0.5), (2, 0.0), (5, 0.99)])
def test_each_rank_has_the_same_number_of_benign_rows_at_the_same_time(
    ranks: int, batch_size: int, share: float
) -> None:
    micro = 40
    order = training_order(
        DRIFT, BENIGN, micro_batches=micro, ranks=ranks, batch_size=batch_size, benign_share=share, seed=3
    )
    assert len(order) == micro * ranks * batch_size
    batches = [order[i : i + batch_size] for i in range(0, len(order), batch_size)]
    counts = [sum(prompt.kind == "benign" for prompt in batch) for batch in batches]
    for step in range(micro):  # accelerate gives batch n of a step to rank n
        assert len(set(counts[step * ranks : (step + 1) * ranks])) == 1
        done = counts[: (step + 1) * ranks]
        assert (
            abs(sum(done) - share * batch_size * len(done)) <= ranks
        )  # the share is kept all along, not only at the end
    assert max(counts) - min(counts) <= 1


def test_the_order_goes_through_each_list_in_shuffled_passes() -> None:
    def make(seed: int) -> list[TrainPrompt]:
        return training_order(DRIFT, BENIGN, micro_batches=7, ranks=1, batch_size=4, benign_share=0.25, seed=seed)

    order = make(0)
    assert order == make(0) != make(1)
    drift = [prompt.id for prompt in order if prompt.kind == "drift"]
    assert len(drift) == 21
    for start in (0, 7, 14):
        assert Counter(drift[start : start + 7]) == Counter(prompt.id for prompt in DRIFT)
    assert drift[:7] != drift[7:14]


def test_nothing_to_train_on_is_told() -> None:
    with pytest.raises(UserError, match="data: there is nothing to train on"):
        training_order([], BENIGN, micro_batches=1, ranks=1, batch_size=1, benign_share=0.0, seed=0)
    with pytest.raises(UserError, match="nothing to train on"):
        training_order(DRIFT, [], micro_batches=1, ranks=1, batch_size=1, benign_share=0.5, seed=0)


def make_plan(order: list[TrainPrompt] | None = None, **changes: Any) -> RolloutPlan:
    """4 steps of 4 rows, a round every 2 steps, strength 1 annealed linearly, greedy."""
    settings: dict[str, Any] = {
        "order": [DRIFT[0], DRIFT[1], DRIFT[2], BENIGN[0]] * 4 if order is None else order,
        "rows_a_step": 4,
        "batch_size": 4,
        "every": 2,
        "total_steps": 4,
        "strength": 1.0,
        "schedule": "linear",
        "options": GREEDY,
        "seed": 5,
        **changes,
    }
    return RolloutPlan(**settings)


@pytest.mark.parametrize("ranks", [1, 2])
def test_ranks_share_a_round_without_overlap(ranks: int) -> None:
    order = training_order(DRIFT, BENIGN, micro_batches=10, ranks=ranks, batch_size=2, benign_share=0.5, seed=0)
    plan = make_plan(order, rows_a_step=2 * 2 * ranks, batch_size=2, every=2, total_steps=5)
    assert plan.round_of(len(order) - 1) == 2
    seen: list[int] = []
    for number in range(3):
        for rank in range(ranks):
            rows = plan.rows_of(number, rank, ranks)
            assert all(plan.round_of(row) == number and row // 2 % ranks == rank for row in rows)
            seen += rows
    assert sorted(seen) == list(range(len(order)))
    assert len(plan.rows_of(2, 0, ranks)) == 4  # the last round is cut short


# ---- sampling ----


class Samples:
    """Counts how often, and how, the model is sampled, and lets the real function do it."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.calls: list[dict[str, Any]] = []

        def watched(model: Any, form: ChatFormat, prompts: Any, indices: Any, options: Any, **settings: Any) -> Any:
            adapter = next(m for m in model.modules() if isinstance(m, BaseTunerLayer))
            self.calls.append(
                {"floor": settings["floor"], "strength": settings["strength"], "off": adapter.disable_adapters}
                | {"rows": len(indices), "prompts": prompts, "thread": threading.get_ident()}
            )
            return sample_batch(model, form, prompts, indices, options, **settings)

        monkeypatch.setattr(sampling, "sample_batch", watched)


def make_trainer(seed: int = 0) -> Any:
    """What the source needs of a trainer: a PEFT model whose adapter speaks otherwise than its base."""
    model = get_peft_model(build_model("llama"), LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM"))
    shake(model, seed)
    return SimpleNamespace(
        accelerator=Accelerator(cpu=True),
        model=model,
        model_wrapped=model,
        vllm=None,
        most=int,
        state=SimpleNamespace(global_step=0),
    )


def shake(model: Any, seed: int) -> None:
    """Give the adapter other weights, as a training step does."""
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            parameter.data = torch.randn(parameter.shape, generator=generator) * 0.3


def make_source(
    folder: Path, form: ChatFormat, trainer: Any, plan: RolloutPlan | None = None, **changes: Any
) -> RolloutSource:
    """A bound source."""
    floor: Floor | None = changes.pop("floor", FLOOR)
    source = RolloutSource(plan or make_plan(**changes), form, floor, folder, max_length=None)
    source.bind(trainer)
    return source


def rows_of(source: RolloutSource, first: int, end: int) -> dict[str, list[Any]]:
    """Rows as a trainer takes them."""
    return source({"row": list(range(first, end))})


def answer(form: ChatFormat, model: Any, prompt: TrainPrompt, floor: Floor | None, strength: float = 1.0) -> str:
    """The answer of a model by itself."""
    ids = form.prompt_ids(chat(prompt.system, prompt.turns[0]))
    return sample_batch(model, form, [ids], [0], GREEDY, seeds=[0], floor=floor, strength=strength)[0].text


def texts(folder: Path, number: int) -> dict[int, str]:
    """Answers of a round on disk."""
    rows = read_jsonl(folder / f"round-{number:04d}-of-rank-0.jsonl")
    return {row["row"]: row["completion"][0]["content"] for row in rows}


def test_rounds_are_sampled_with_the_weights_of_their_moment(tmp_path: Path, form: ChatFormat) -> None:
    trainer = make_trainer()
    source = make_source(tmp_path, form, trainer)
    dataset = source.dataset()
    assert len(dataset) == 16 and dataset[:4] == {"row": [0, 1, 2, 3]}
    assert not list(tmp_path.iterdir()), "a data loader that looks ahead asks for numbers alone"
    rows_of(source, 0, 4)
    assert [path.name for path in tmp_path.iterdir()] == ["round-0000-of-rank-0.jsonl"]
    assert texts(tmp_path, 0)[1] == answer(form, trainer.model, DRIFT[1], FLOOR)
    shake(trainer.model, seed=1)
    rows_of(source, 4, 8)  # the same round: the text is the old one
    assert texts(tmp_path, 0)[5] != answer(form, trainer.model, DRIFT[1], FLOOR)
    rows_of(source, 8, 12)
    second = texts(tmp_path, 1)
    assert sorted(second) == list(range(8, 16))
    assert second[9] == answer(form, trainer.model, DRIFT[1], FLOOR, 0.5)
    assert second[9] != texts(tmp_path, 0)[1]


def test_drift_is_sampled_capped_and_benign_from_the_plain_base(
    tmp_path: Path, form: ChatFormat, monkeypatch: pytest.MonkeyPatch
) -> None:
    trainer = make_trainer()
    samples = Samples(monkeypatch)
    rows_of(make_source(tmp_path, form, trainer), 0, 1)
    kinds = [(call["floor"] is FLOOR, call["off"], call["rows"]) for call in samples.calls]
    assert kinds == [
        (True, False, 3),
        (True, False, 3),
        (False, True, 2),
    ]  # 6 drift rows in batches of 3, then 2 benign
    found = texts(tmp_path, 0)
    capped, uncapped = (answer(form, trainer.model, DRIFT[0], floor) for floor in (FLOOR, None))
    assert found[0] == capped != uncapped
    tuned = answer(form, trainer.model, BENIGN[0], None)
    with trainer.model.disable_adapter():
        base, base_capped = (answer(form, trainer.model, BENIGN[0], floor) for floor in (None, FLOOR))
    assert found[3] == base and base not in (tuned, base_capped)
    rows = read_jsonl(tmp_path / "round-0000-of-rank-0.jsonl")
    assert {(row["kind"], row["cap_strength"]) for row in rows} == {("drift", 1.0), ("benign", 0.0)}
    assert ActivationController.of(trainer.model).cap_strength == 0.0  # off again


@pytest.mark.slow
@pytest.mark.parametrize("accumulation", [1, 2])
def test_a_round_is_what_the_checkpoint_of_its_step_says(tmp_path: Path, accumulation: int) -> None:
    """By the trainer itself, whose loader looks a batch ahead; beside it an evaluation on rows of tokens."""
    model = save_model(tmp_path / "model")
    rows = {"per_device_train_batch_size": 4, "gradient_accumulation_steps": accumulation}
    recipe = write_recipe(tmp_path / "recipe.yaml", model, max_steps=4, save_steps=1, save_total_limit=4, **rows)
    changes = ["method.regenerate_every=1", "data.conversation_turns=0"]
    run = open_run(load_recipe(recipe, changes), output_dir=str(tmp_path / "run"))
    variant = run.variant(control=False)
    FLOOR.save(variant.floor_path)
    trainer = build_trainer(run, training_arguments(run, variant, True), variant)
    trainer.train()
    form, plain = ChatFormat(trainer.processing_class), AutoModelForCausalLM.from_pretrained(model)
    options = SamplingOptions(max_new_tokens=8, temperature=0)
    changed = 0
    for step in range(1, 4):
        tuned = PeftModel.from_pretrained(plain, variant.checkpoints / f"checkpoint-{step}")
        records = read_jsonl(variant.rollouts / f"round-{step:04d}-of-rank-0.jsonl")
        drift = [record for record in records if record["kind"] == "drift"]
        prompts = [form.prompt_ids(record["prompt"]) for record in drift]
        said = sample_batch(
            tuned, form, prompts, range(len(drift)), options, seeds=[0] * len(drift), floor=FLOOR,
            strength=drift[0]["cap_strength"],
        )  # fmt: skip
        assert [record["completion"][0]["content"] for record in drift] == [answer.text for answer in said], step
        plain = tuned.unload()
        before = sample_batch(plain, form, prompts, range(len(drift)), options, seeds=[0] * len(drift), floor=FLOOR)
        changed += sum(one.text != other.text for one, other in zip(said, before, strict=True))
    assert changed > 2, "the weights do change what is said"
    tokens = datasets.Dataset.from_list([{"input_ids": [5, 6, 7, 8], "labels": [-100, 6, 7, 8], "anchor": False}] * 4)
    assert trainer.evaluate(tokens)["eval_loss"] > 0


def test_strength_is_annealed_by_round(tmp_path: Path, form: ChatFormat, monkeypatch: pytest.MonkeyPatch) -> None:
    samples = Samples(monkeypatch)
    plan = make_plan(every=1, schedule="cosine")
    source = make_source(tmp_path, form, make_trainer(), plan)
    for row in (0, 4, 8, 12):
        rows_of(source, row, row + 1)
    found = [call["strength"] for call in samples.calls if call["floor"] is not None]
    wanted = [1.0, 0.8535533905932737, 0.5, 0.14644660940672627]
    assert sorted(set(found), reverse=True) == pytest.approx(wanted)
    strengths = [{r["cap_strength"] for r in read_jsonl(p) if r["kind"] == "drift"} for p in sorted(tmp_path.iterdir())]
    assert [value for one in strengths for value in one] == pytest.approx(wanted)


@pytest.mark.parametrize("changes", [{"strength": 0.0}, {"floor": None}])
def test_without_strength_or_floor_nothing_is_capped(tmp_path: Path, form: ChatFormat, changes: dict[str, Any]) -> None:
    trainer = make_trainer()
    rows_of(make_source(tmp_path, form, trainer, **changes), 0, 1)
    assert texts(tmp_path, 0)[0] == answer(form, trainer.model, DRIFT[0], None)
    assert {row["cap_strength"] for row in read_jsonl(tmp_path / "round-0000-of-rank-0.jsonl")} == {0.0}


def test_sampling_leaves_random_state_mode_and_checkpointing_alone(tmp_path: Path, form: ChatFormat) -> None:
    trainer = make_trainer()
    model = trainer.model.train()
    base = model.base_model.model
    base.gradient_checkpointing_enable({"use_reentrant": True}, every_n_layers=2)
    layers = base.model.layers
    before = [(layer.gradient_checkpointing, layer._gradient_checkpointing_func) for layer in layers]
    assert [enabled for enabled, _ in before] == [True, False, True, False]
    torch.manual_seed(9)
    state = torch.random.get_rng_state()
    plan = make_plan(options=SamplingOptions(max_new_tokens=6, batch_size=3))
    rows_of(make_source(tmp_path, form, trainer, plan), 0, 1)
    assert torch.random.get_rng_state().equal(state)
    assert model.training and all(layer.training for layer in layers)
    assert [(layer.gradient_checkpointing, layer._gradient_checkpointing_func) for layer in layers] == before
    assert all(p.requires_grad == ("lora_" in name) for name, p in model.named_parameters())


def test_rounds_on_disk_are_read_again(tmp_path: Path, form: ChatFormat, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "round-0000-of-rank-0.jsonl"
    first = rows_of(make_source(tmp_path, form, make_trainer()), 0, 8)
    written = path.read_bytes()
    samples = Samples(monkeypatch)
    # after a kill: another process, whose weights are those of an earlier checkpoint
    again = rows_of(make_source(tmp_path, form, make_trainer(seed=8)), 0, 8)
    assert again == first and not samples.calls and path.read_bytes() == written

    rows = read_jsonl(path)
    for spoilt in (rows[:-1], [{**row, "identity": "of another order"} for row in rows]):
        write_jsonl(path, spoilt)
        assert rows_of(make_source(tmp_path, form, make_trainer()), 0, 8) == first
        assert samples.calls and path.read_bytes() == written
        samples.calls.clear()


def test_turns_before_the_last_are_sampled_along_the_way(
    tmp_path: Path, form: ChatFormat, monkeypatch: pytest.MonkeyPatch
) -> None:
    long = TrainPrompt("talk/3", "drift", "You are a ghost.", ("first", "second", "third"), "talk")
    trainer = make_trainer()
    samples = Samples(monkeypatch)
    order = [DRIFT[0], long, DRIFT[1], BENIGN[0]] * 2
    source = make_source(tmp_path, form, trainer, make_plan(order))
    rows_of(source, 0, 4)
    row = next(r for r in read_jsonl(tmp_path / "round-0000-of-rank-0.jsonl") if r["row"] == 1)
    roles = [message["role"] for message in row["prompt"]]
    assert roles == ["system", "user", "assistant", "user", "assistant", "user"]
    assert [m["content"] for m in row["prompt"] if m["role"] == "user"] == list(long.turns)
    assert row["prompt"][2]["content"] == answer(form, trainer.model, long, FLOOR)
    # 6 rows have a first turn, 2 a second and a third; then the benign rows
    assert [call["rows"] for call in samples.calls] == [3, 3, 2, 2, 2]
    for depth in (2, 4):
        ids = form.prompt_ids(row["prompt"][:depth])
        wanted = sample_batch(trainer.model, form, [ids], [0], GREEDY, seeds=[0], floor=FLOOR)[0].text
        assert row["prompt"][depth]["content"] == wanted
    # only the last answer carries labels
    made = rows_of(source, 1, 2)
    tail = row["completion_ids"] + ([form.end_token] if row["ended"] else [])
    assert [label for label in made["labels"][0] if label != IGNORED] == tail
    assert made["input_ids"] == [form.prompt_ids(row["prompt"]) + tail]


def test_every_rank_samples_equally_often(tmp_path: Path, form: ChatFormat, monkeypatch: pytest.MonkeyPatch) -> None:
    """One rank has a conversation, the other has none: under ZeRO-3 a call too few would make the other wait for ever."""
    long = TrainPrompt("talk/2", "drift", "", ("first", "second"), "talk")
    order = [long, DRIFT[0], DRIFT[1], DRIFT[2]]
    plan = make_plan(order, batch_size=2, every=1, total_steps=1)
    samples = Samples(monkeypatch)
    barrier, numbers = threading.Barrier(2), [0, 0]

    def play(rank: int) -> None:
        def most(number: int) -> int:  # a collective: it waits for the other rank, and breaks if that never comes
            numbers[rank] = number
            barrier.wait(60)
            largest = max(numbers)
            barrier.wait(60)
            return largest

        trainer = make_trainer()
        trainer.most = most
        trainer.accelerator = SimpleNamespace(
            process_index=rank, num_processes=2, device=torch.device("cpu"),
            reduce=lambda tensor, reduction: tensor, unwrap_model=lambda model: model,
            state=trainer.accelerator.state,
        )  # fmt: skip
        make_source(tmp_path, form, trainer, plan)._load(0)

    with ThreadPoolExecutor(2) as ranks:
        list(ranks.map(play, range(2)))
    by_thread: dict[int, list[int]] = {}
    for call in samples.calls:
        by_thread.setdefault(call["thread"], []).append(call["rows"])
    counts = sorted(by_thread.values(), reverse=True)
    assert counts == [[2, 1], [2, 0]]
    assert [len(read_jsonl(tmp_path / f"round-0000-of-rank-{rank}.jsonl")) for rank in range(2)] == [2, 2]


def test_a_round_that_another_rank_lacks_is_sampled_by_all(
    tmp_path: Path, form: ChatFormat, monkeypatch: pytest.MonkeyPatch
) -> None:
    """After a kill between the files of two ranks: the one that has its own must take part, or the other waits for ever."""
    trainer = make_trainer()
    first = rows_of(make_source(tmp_path, form, trainer), 0, 8)
    samples = Samples(monkeypatch)
    accelerator = trainer.accelerator
    for lacking, calls in ((0.0, 0), (1.0, 3)):
        trainer.accelerator = SimpleNamespace(
            process_index=0, num_processes=1, device=torch.device("cpu"), state=accelerator.state,
            reduce=lambda tensor, reduction, lacking=lacking: tensor + lacking, unwrap_model=accelerator.unwrap_model,
        )  # fmt: skip
        assert rows_of(make_source(tmp_path, form, trainer), 0, 8) == first
        assert len(samples.calls) == calls


# ---- tokens ----


def test_tokens_of_labels_the_answer_and_its_end_alone(form: ChatFormat) -> None:
    prompt = chat("You are a pirate.", "Where is the harbour?")
    head, tail = form.prompt_ids(prompt), form.answer_ids("by the sea")
    ids, labels, *_ = tokens_of(form, prompt, "by the sea", True, None)
    assert ids == [*head, *tail, form.end_token]
    assert labels == [IGNORED] * len(head) + [*tail, form.end_token]
    assert form.tokenizer.decode(ids).endswith("by the sea<|im_end|>")
    cut, cut_labels, *_ = tokens_of(form, prompt, "by the sea", False, None)
    assert cut == head + tail and cut_labels[-1] == tail[-1]  # no end is taught where none was sampled
    short = tokens_of(form, prompt, "by the sea", True, len(head) + 2)
    assert short.ids == ids[: len(head) + 2] and short.labels == labels[: len(head) + 2]
    assert (short.turns_dropped, short.tokens_lost) == (0, len(tail) - 1)
    none = tokens_of(form, prompt, "by the sea", True, len(head) - 3)
    assert set(none.labels) == {IGNORED} and none.tokens_lost == len(tail) + 1
    assert tokens_of(form, prompt, "", True, None).labels[-1] == form.end_token


def test_a_rows_labels_are_the_tokens_that_were_sampled(tmp_path: Path, form: ChatFormat) -> None:
    """Random tokens: most answers hold pieces of characters, and words in pieces that their text would join."""
    trainer = make_trainer()
    plan = make_plan(options=SamplingOptions(max_new_tokens=6, temperature=1.0, top_p=1.0, batch_size=3))
    made = rows_of(make_source(tmp_path, form, trainer, plan), 0, 8)
    others = 0
    for row, (prompt, labels) in enumerate(zip(plan.order, made["labels"], strict=False)):
        if prompt.kind == "benign":
            continue
        ids = form.prompt_ids(chat(prompt.system, prompt.turns[0]))
        seeds = [plan.seed_of(row, 0)]
        said = sample_batch(trainer.model, form, [ids], [0], plan.options, seeds=seeds, floor=FLOOR)[0]
        assert made["input_ids"][row][: len(ids)] == ids
        assert labels[len(ids) :] == said.ids + [form.end_token] * said.ended
        others += form.answer_ids(said.text) != said.ids
    assert others >= 3
    # an older version's round has no ids, and its text is all there is
    path = tmp_path / "round-0000-of-rank-0.jsonl"
    records = read_jsonl(path)
    write_jsonl(path, [{k: v for k, v in record.items() if k != "completion_ids"} for record in records])
    old = rows_of(make_source(tmp_path, form, trainer, plan), 0, 8)
    for record, labels in zip(records, old["labels"], strict=True):
        tail = form.answer_ids(record["completion"][0]["content"]) + [form.end_token] * record["ended"]
        assert labels[-len(tail) :] == tail


@pytest.mark.parametrize("text", ["the harbour", "naïve 🦜"])
def test_tokens_that_a_text_would_join_stay_apart(form: ChatFormat, text: str) -> None:
    prompt = chat("", "Say it.")
    pieces = [token for letter in text for token in form.answer_ids(letter)][:-1]  # cut in the middle of the parrot
    assert form.answer_ids(form.tokenizer.decode(pieces)) != pieces
    row = tokens_of(form, prompt, pieces, False, None)
    assert row.labels[-len(pieces) :] == pieces and row.ids[-len(pieces) :] == pieces


TALK = [
    {"role": "system", "content": "You are a ghost."},
    *[{"role": role, "content": f"{role} says {number}"} for number in range(4) for role in ("user", "assistant")][:-1],
]


def test_the_oldest_turns_go_and_the_answer_stays(form: ChatFormat) -> None:
    answer = "an answer of some length"
    lengths = [len(form.prompt_ids([TALK[0], *TALK[1 + 2 * dropped :]])) for dropped in range(4)]
    tail = [*form.answer_ids(answer), form.end_token]
    for dropped, length in enumerate(lengths):
        for max_length in (length + len(tail), (lengths[dropped - 1] if dropped else 10**6) + len(tail) - 1):
            row = tokens_of(form, TALK, answer, True, max_length)
            assert row.ids == form.prompt_ids([TALK[0], *TALK[1 + 2 * dropped :]]) + tail
            assert [label for label in row.labels if label != IGNORED] == tail
            assert (row.turns_dropped, row.tokens_lost) == (dropped, 0)
    # the last turn alone does not fit: the answer loses its end, and is not taught to stop there
    row = tokens_of(form, TALK, answer, True, lengths[-1] + len(tail) - 2)
    assert (row.turns_dropped, row.tokens_lost) == (3, 2)
    assert [label for label in row.labels if label != IGNORED] == tail[:-2]


def test_a_row_is_trained_with_the_turns_that_its_sampler_saw(
    tmp_path: Path, form: ChatFormat, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    long = TrainPrompt("talk/4", "drift", "You are a ghost.", ("the first", "the second", "the third", "the last"), "")
    whole = len(form.prompt_ids([*chat(long.system, "".join(long.turns))]))
    samples, trainer = Samples(monkeypatch), make_trainer()
    plan = make_plan([long] * 4, rows_a_step=4, every=1, total_steps=1)
    source = RolloutSource(plan, form, FLOOR, tmp_path, max_length=whole + 30)
    source.bind(trainer)
    with caplog.at_level("INFO", "trimtab"):
        made = rows_of(source, 0, 4)
    assert "4 of 4 rows are without their oldest turns" in caplog.text and "lose the end" not in caplog.text
    (record, *_) = records = read_jsonl(tmp_path / "round-0000-of-rank-0.jsonl")
    assert [message["content"] for message in record["prompt"] if message["role"] != "assistant"] == [
        long.system, *long.turns[record["turns_dropped"] :]
    ]  # fmt: skip
    assert 0 < record["turns_dropped"] < 3
    last = [prompt for call in samples.calls[-2:] for prompt in call["prompts"]]
    for record, ids, labels in zip(records, made["input_ids"], made["labels"], strict=True):
        tail = record["completion_ids"] + [form.end_token] * record["ended"]
        assert ids[: -len(tail)] in last and len(ids) <= whole + 30
        assert [label for label in labels if label != IGNORED] == tail


def test_an_answer_that_the_last_turn_leaves_no_room_for_is_told(
    tmp_path: Path, form: ChatFormat, caplog: pytest.LogCaptureFixture
) -> None:
    prompt = len(form.prompt_ids(chat(DRIFT[0].system, DRIFT[0].turns[0])))
    source = RolloutSource(make_plan([DRIFT[0]] * 8), form, FLOOR, tmp_path, max_length=prompt + 2)
    source.bind(make_trainer())
    made = rows_of(source, 0, 8)
    records = read_jsonl(tmp_path / "round-0000-of-rank-0.jsonl")
    assert "8 of 8 rows lose the end of their answer" in caplog.text and "train.max_length" in caplog.text
    for record, labels in zip(records, made["labels"], strict=True):
        assert labels[prompt:] == record["completion_ids"][:2]


def test_prompts_are_held_against_the_longest_row_beforehand(
    form: ChatFormat, caplog: pytest.LogCaptureFixture
) -> None:
    options = SamplingOptions(max_new_tokens=20)
    question = "a question longer than those of all the pirates, about the sea and its ships"
    talk = TrainPrompt("mine.jsonl/2", "drift", "", ("short", question), "")
    alone = len(form.prompt_ids(chat("", question)))
    with pytest.raises(UserError, match=rf"1 of 2 prompts .*the longest, mine.jsonl/2, has {alone}") as caught:
        check_lengths(form, [DRIFT[0], talk], alone + 20, options)
    assert caught.value.key == "train.max_length" and f"train.max_length={alone + 21}" in str(caught.value.remedy)
    check_lengths(form, [talk], alone + 21, options)
    assert "1 of 1 prompts are conversations that may outgrow" in caplog.text
    both = len(form.prompt_ids([*chat("", "short"), {"role": "assistant", "content": ""}, *chat("", talk.turns[-1])]))
    assert f"the longest with {both + 41} tokens" in caplog.text
    caplog.clear()
    check_lengths(form, [talk], both + 41, options)
    check_lengths(form, [talk], None, options)
    assert not caplog.text


# ---- sources ----

OTHERS: tuple[Split, Split] = ("dev", "test")


def test_sources_are_of_the_train_split_alone() -> None:
    section = DataSection(drift_prompts=30, role_questions=2, conversation_turns=3)
    drift, benign = drift_sources(section), benign_sources(section)
    assert len({prompt.id for prompt in drift}) == len(drift) and {p.kind for p in drift} == {"drift"}
    for split in OTHERS:
        others = {c.id for c in data.conversations(split)} | {f"prompt/{d.id}" for d in data.drift_prompts(split)}
        assert not others & {prompt.id.rsplit("/", 1)[0] for prompt in drift} and not others & {p.id for p in drift}
        roles = {role.name for role in data.roles(split)}
        assert roles and not roles & {prompt.source for prompt in drift}
        requests = {*data.benign_prompts(split), *data.questions(split)}
        assert requests and not requests & {prompt.turns[0] for prompt in benign}
    assert Counter(len(prompt.turns) for prompt in drift)[3] == len(data.conversations("train"))
    assert {prompt.system for prompt in benign} == set(data.default_prompts())


def test_prompts_from_a_file(tmp_path: Path) -> None:
    path = tmp_path / "mine.jsonl"
    row = {"prompt": [{"role": "system", "content": "S"}, {"role": "user", "content": "U"}], "source": "mine"}
    path.write_text(json.dumps(row) + "\n", encoding="utf-8")
    assert from_file(str(path), "drift") == [TrainPrompt("mine.jsonl/1", "drift", "S", ("U",), "mine")]
    assert drift_sources(DataSection(drift_file=str(path))) == from_file(str(path), "drift")
    assert benign_sources(DataSection(benign_file=str(path)))[0].kind == "benign"
    path.write_text(json.dumps({**row, "source": None}) + "\n\n" + json.dumps({"prompt": "V"}) + "\n", encoding="utf-8")
    again = from_file(str(path), "drift")  # written anew
    assert [(prompt.id, prompt.turns, prompt.source) for prompt in again] == [
        ("mine.jsonl/1", ("U",), "drift"),
        ("mine.jsonl/3", ("V",), "drift"),
    ]


def messages(text: str) -> list[dict[str, str]]:
    """Messages of a shorthand: ``s:S u:U`` is a system prompt S and a user's turn U."""
    roles = {"s": "system", "d": "developer", "u": "user", "a": "assistant", "t": "tool"}
    return [{"role": roles[word[0]], "content": word[2:]} for word in text.split()]


# messages -> system prompt, history and turns of the prompt; whether an answer is left out
SCRIPTS: dict[str, tuple[str, str, tuple[str, ...], bool]] = {
    "u:1": ("", "", ("1",), False),
    "s:S u:1 u:2 u:3": ("S", "", ("1", "2", "3"), False),
    "s:S u:1 a:A u:2": ("S", "u:1 a:A", ("2",), False),
    "s:S u:1 a:A u:2 a:B": ("S", "u:1 a:A", ("2",), True),
    "u:1 a:A u:2 u:3": ("", "u:1 a:A", ("2", "3"), False),
    "d:D u:1": ("", "d:D", ("1",), False),
    "s:S d:D u:1": ("S", "d:D", ("1",), False),
    "s:S s:T u:1": ("S", "s:T", ("1",), False),
    "s:S u:1 a:A s:T u:2": ("S", "u:1 a:A s:T", ("2",), False),
    "u:1 a:A t:3 a:B u:2": ("", "u:1 a:A t:3 a:B", ("2",), False),
    "a:Hello u:1": ("", "a:Hello", ("1",), False),
}


@pytest.mark.parametrize("script", SCRIPTS)
def test_nothing_of_a_row_is_lost(script: str, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Every message is in the chat up to the answer; an answer at the end is left out, and told."""
    system, history, turns, answered = SCRIPTS[script]
    path = tmp_path / "mine.jsonl"
    path.write_text(json.dumps({"messages": messages(script)}), encoding="utf-8")
    with caplog.at_level("INFO", "trimtab"):
        (prompt,) = from_file(str(path), "drift")
    assert (prompt.system, prompt.turns) == (system, turns)
    assert [*prompt.history] == [(message["role"], message["content"]) for message in messages(history)]
    kept = messages(script)[: -1 if answered else None]
    assert [*prompt.opening, *({"role": "user", "content": turn} for turn in turns[1:])] == kept
    said = "\n".join(caplog.messages)
    assert ("1 answers at the end are left out" in said) is answered
    count = history.count("a:")
    assert (f"{count} answers in the middle of conversations stand as they are" in said) is (count > 0)


@pytest.mark.parametrize(
    ("row", "fault"),
    [
        ({"prompt": []}, "`prompt` is an empty list"),
        ({"prompt": ["U"]}, "message 1 is text"),
        ({"prompt": messages("s:S")}, "it has no user turn"),
        ({"prompt": [{"role": "user", "content": " "}]}, r"message 1 \(user\) is empty"),
        ({"prompt": [{"role": "system"}, *messages("u:1")]}, "message 1 has no content"),
        ({"prompt": [{"role": "user", "content": [{"type": "image"}]}]}, "message 1 has a part that is no text: image"),
        ({"prompt": messages("u:1 a:Sure,")}, r"its prompt ends with message 2 \(assistant\)"),
        ({"prompt": messages("u:1 t:3")}, r"its prompt ends with message 2 \(tool\)"),
        ({"messages": messages("u:1 a:A t:3")}, r"message 3 \(tool\) follows the user's last turn"),
        ({"messages": messages("u:1 s:T u:2")}, r"message 2 \(system\) stands between user turns"),
        ({"messages": messages("u:1 u:2 a:A u:3")}, "messages 1 and 2 are both the user's, and answers follow"),
        ({"messages": messages("u:1 a:A a:B u:3")}, "messages 2 and 3 are both the assistant's"),
    ],
)
def test_a_bad_row_is_named(tmp_path: Path, row: Any, fault: str) -> None:
    path = tmp_path / "mine.jsonl"
    path.write_text(json.dumps({"prompt": "U"}) + "\n" + json.dumps(row) + "\n", encoding="utf-8")
    with pytest.raises(UserError, match=f"line 2: {fault}") as caught:
        from_file(str(path), "drift")
    assert (caught.value.file, caught.value.key) == (str(path), "data.drift_file") and caught.value.remedy


def test_what_stands_as_it_is_is_not_sampled(tmp_path: Path, form: ChatFormat) -> None:
    """A row's own answers are what the model reads before it answers the last turns."""
    path = tmp_path / "mine.jsonl"
    path.write_text(json.dumps({"messages": messages("s:S u:1 a:A s:T u:2 u:3")}), encoding="utf-8")
    (prompt,) = from_file(str(path), "drift")
    trainer = make_trainer()
    source = make_source(tmp_path / "rounds", form, trainer, make_plan([prompt, DRIFT[0], DRIFT[1], BENIGN[0]] * 2))
    rows_of(source, 0, 4)
    row = next(r for r in read_jsonl(tmp_path / "rounds" / "round-0000-of-rank-0.jsonl") if r["row"] == 0)
    assert row["prompt"][:5] == messages("s:S u:1 a:A s:T u:2") and row["prompt"][6:] == messages("u:3")
    ids = form.prompt_ids(row["prompt"][:5])
    assert (
        row["prompt"][5]["content"]
        == sample_batch(trainer.model, form, [ids], [0], GREEDY, seeds=[0], floor=FLOOR)[0].text
    )
