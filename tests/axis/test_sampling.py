"""Sampling: the same seed gives the same answers, batches don't change them, and answer means are those of a full forward."""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
from collections.abc import Iterator
from typing import Any

import pytest
import scipy.stats
import torch
from conftest import ARCHITECTURES, HIDDEN, LAYERS, build_floor, build_model
from peft import LoraConfig, get_peft_model
from template_families import FAMILIES, family_tokenizer, own_template
from torch import Tensor
from transformers import TemperatureLogitsWarper, TopPLogitsWarper
from transformers.generation.streamers import BaseStreamer

from trimtab.axis import ActivationController, Floor
from trimtab.axis.chat_format import ChatFormat, chat
from trimtab.axis.sampling import (
    Answer,
    SamplingOptions,
    _mixed,
    _RowSampler,
    answer_of,
    batches_by_length,
    candidates_of,
    exponentials,
    pad_left,
    sample_batch,
    seed_of,
)

QUESTIONS = ["Hi", "How do I bake bread at home when the oven is small?", "Why is the sky blue?", "The sea, the ships"]
GREEDY = SamplingOptions(max_new_tokens=12, temperature=0)
WARM = SamplingOptions(max_new_tokens=12, temperature=1.0, top_p=0.9)
HOT = SamplingOptions(max_new_tokens=12, temperature=1.0, top_p=1.0)


class ManyEnds(ChatFormat):
    """A chat format in which every seventh token ends an answer, so that random models end theirs at all lengths."""

    @property
    def end_ids(self) -> list[int]:
        return list(range(2, 300, 7))


def prompts(form: ChatFormat) -> list[list[int]]:
    return [form.prompt_ids(chat("", question)) for question in QUESTIONS]


def sample(model: Any, form: ChatFormat, rows: list[int] | None = None, **more: Any) -> list[Answer]:
    rows = list(range(len(QUESTIONS))) if rows is None else rows
    every = prompts(form)
    options = more.pop("options", WARM)
    seed = more.pop("seed", 5)
    seeds = [seed_of([seed, i]) for i in rows]
    return sample_batch(model, form, [every[i] for i in rows], rows, options, seeds=seeds, **more)


def full_mean(model: Any, prompt: list[int], answer: Answer, floor: Floor | None = None) -> Tensor:
    """Mean over the answer's tokens by one forward of prompt and answer, [N, D]."""
    controller = ActivationController.of(model)
    on = floor is not None
    states: list[Tensor] = []
    ids = torch.tensor([prompt + answer.ids])
    read = controller.reading(
        range(LAYERS), lambda layer, hidden: states.append(hidden[0, len(prompt) :].mean(0)), after_cap=on
    )
    with torch.no_grad(), read, controller.capping(floor or build_floor(), enabled=on):
        model(input_ids=ids)
    return torch.stack(states)


def test_same_seed_same_answers_and_other_seed_others(form: ChatFormat) -> None:
    model = build_model("llama")
    first, again, other = sample(model, form), sample(model, form), sample(model, form, seed=6)
    assert [a.ids for a in first] == [a.ids for a in again] != [a.ids for a in other]
    assert [a.index for a in first] == [0, 1, 2, 3]
    assert all(form.tokenizer.decode(a.ids, skip_special_tokens=True) == a.text for a in first)


def test_the_callers_random_state_and_mode_are_left_alone(form: ChatFormat) -> None:
    model = build_model("llama").train()
    torch.manual_seed(11)
    expected = torch.rand(3)
    torch.manual_seed(11)
    sample(model, form)
    assert torch.equal(torch.rand(3), expected) and model.training


def test_the_mixing_is_splitmix64() -> None:
    """The first numbers of the generator seeded with 1234567, which its author publishes."""
    states = [(1234567 + (i + 1) * 0x9E3779B97F4A7C15) % (1 << 64) for i in range(3)]
    mixed = _mixed(torch.tensor([state - (1 << 64) if state >> 63 else state for state in states]))
    assert [x % (1 << 64) for x in mixed.tolist()] == [6457827717110365317, 3203168211198807973, 9817491932198370423]


def test_the_random_numbers_are_exponential_and_know_row_position_and_token() -> None:
    seeds, tokens = torch.tensor([seed_of([i]) for i in range(50)]), torch.arange(1000).unsqueeze(0)
    found = torch.stack([exponentials(seeds, position, tokens) for position in range(4)])  # [4, 50, 1000]
    flat = found.flatten().numpy()
    assert flat.min() > 0 and len(set(flat.tolist())) > 0.995 * flat.size, "float32 has few twins among them"
    assert scipy.stats.kstest(flat, "expon").pvalue > 0.01
    for dimension in range(3):  # neighbours in any direction are strangers
        here, there = (found.narrow(dimension, start, found.shape[dimension] - 1).flatten() for start in (0, 1))
        assert abs(float(torch.corrcoef(torch.stack([here, there]))[0, 1])) < 4 / len(here) ** 0.5
    some = torch.tensor([[7, 900, 3]])
    assert torch.equal(exponentials(seeds[2:3], 1, some), found[1, 2, some[0]].unsqueeze(0))


@pytest.mark.parametrize("top_p", [1.0, 0.8])
def test_tokens_are_drawn_as_often_as_they_are_likely(top_p: float) -> None:
    options = SamplingOptions(temperature=0.7, top_p=top_p)
    logits = torch.tensor([[2.0, 1.0, 0.5, 0.0, -1.0, -2.0]])
    rows = 40_000
    sampler = _RowSampler(options, [seed_of([i]) for i in range(rows)], 3, torch.device("cpu"))
    for width in (3, 9):  # the first token of the answer, and the seventh
        drawn = sampler(torch.zeros(rows, width, dtype=torch.long), logits.expand(rows, -1))
        assert (drawn > float("-inf")).sum(-1).eq(1).all()
        counts = torch.bincount(drawn.argmax(-1), minlength=6)
        wanted = candidates_in_place(logits, 0.7, top_p).softmax(-1)[0].double() * rows
        kept = wanted > 0
        assert counts[~kept].sum() == 0
        assert scipy.stats.chisquare(counts[kept], wanted[kept] * rows / wanted.sum()).pvalue > 0.001


@pytest.mark.slow
@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("options", [GREEDY, WARM, HOT], ids=["greedy", "nucleus", "all tokens"])
def test_a_batch_of_one_gives_what_the_padded_batch_gives(
    architecture: str, options: SamplingOptions, form: ChatFormat
) -> None:
    model = build_model(architecture)
    ends = ManyEnds(form.tokenizer)
    together = sample(model, ends, options=options, means=True)
    for row in range(len(QUESTIONS)):
        (alone,) = sample(model, ends, [row], options=options, means=True)
        assert (alone.ids, alone.ended, alone.text) == (together[row].ids, together[row].ended, together[row].text)
        mean = together[row].mean
        assert alone.mean is not None and mean is not None
        assert torch.allclose(alone.mean, mean, atol=1e-4, equal_nan=True)


@pytest.mark.slow
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_answer_means_are_those_of_a_full_forward(architecture: str, form: ChatFormat) -> None:
    """Of all tokens of the answer, ended or cut; nothing that is sampled after its end counts, nor the end itself."""
    model = build_model(architecture)
    ends = ManyEnds(form.tokenizer)
    answers = [a for seed in range(4) for a in sample(model, ends, seed=seed, means=True)]
    answers += sample(model, form, means=True)  # which are cut
    every = prompts(form)
    compared = 0
    for answer in answers:
        assert answer.mean is not None and answer.mean.shape == (LAYERS, HIDDEN)
        if not answer.ids:
            assert answer.mean.isnan().all(), "there is no token to take a mean of"
            continue
        whole = full_mean(model, every[answer.index], answer)
        assert torch.allclose(answer.mean, whole, atol=1e-5, rtol=1e-5)
        compared += 1
    lengths = {len(a.ids) for a in answers}
    assert compared >= 8 and len(lengths) >= 4, "the rows must differ in length"
    assert {a.ended for a in answers} == {True, False}, "some must end by themselves, and some be cut"


def test_the_token_beyond_a_cut_answer_is_told_to_nobody(form: ChatFormat) -> None:
    """Means take one more forward; the answer, its length and what a stream shows are as without them."""
    model = build_model("llama")
    shown: list[int] = []

    class Streamer(BaseStreamer):
        def put(self, value: Tensor) -> None:
            shown.append(value.numel())

        def end(self) -> None:
            shown.append(0)

    for options in (GREEDY, WARM, dataclasses.replace(WARM, max_new_tokens=1)):
        plain, streamed = (
            sample(model, form, [1], options=options),
            sample(model, form, [1], options=options, means=True),
        )
        sample(model, form, [1], options=options, means=True, streamer=Streamer())
        assert streamed[0].ids == plain[0].ids and len(plain[0].ids) == options.max_new_tokens and not plain[0].ended
        assert shown == [len(prompts(form)[1]), *[1] * options.max_new_tokens, 0]
        shown.clear()


def test_capped_answer_means_are_what_the_next_layers_saw(form: ChatFormat) -> None:
    model = build_model("llama")
    floor = build_floor(tau=2.0)
    every = prompts(form)
    capped, plain = sample(model, form, floor=floor, means=True), sample(model, form)
    assert [a.ids for a in capped] != [a.ids for a in plain]
    for answer in capped:
        assert answer.mean is not None
        assert torch.allclose(answer.mean, full_mean(model, every[answer.index], answer, floor), atol=1e-5, rtol=1e-5)
        lifted = (answer.mean[list(floor.layers)] * floor.directions).sum(-1)
        assert (lifted > floor.tau - 1e-4).all()
    assert [a.ids for a in sample(model, form, floor=floor, strength=0.0)] == [a.ids for a in plain]
    assert ActivationController.of(model).cap_strength == 0


def test_settings_of_the_checkpoint_do_not_leak_in(form: ChatFormat) -> None:
    model = build_model("llama")
    for options in (GREEDY, WARM):
        expected = [a.ids for a in sample(model, form, options=options)]
        own = model.generation_config
        own.repetition_penalty, own.min_p, own.num_beams, own.no_repeat_ngram_size = 3.0, 0.5, 2, 2
        own.suppress_tokens = sorted({token for ids in expected for token in ids})
        assert [a.ids for a in sample(model, form, options=options)] == expected
        assert model.generation_config is own, "and they are left as they were"
        own.repetition_penalty, own.min_p, own.num_beams, own.no_repeat_ngram_size = 1.0, None, 1, 0
        own.suppress_tokens = None


def test_an_adapter_samples_with_its_weights_and_without_the_checkpoints_settings(form: ChatFormat) -> None:
    plain = [a.ids for a in sample(build_model("llama"), form, options=GREEDY)]
    model: Any = get_peft_model(build_model("llama"), LoraConfig(target_modules="all-linear", r=2))
    own = model.generation_config
    own.repetition_penalty = 3.0
    assert [a.ids for a in sample(model, form, options=GREEDY)] == plain, "a fresh adapter changes nothing"
    assert model.get_base_model().generation_config is own
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            parameter.data.fill_(0.3)
    assert [a.ids for a in sample(model, form, options=GREEDY)] != plain


def test_no_end_token_at_all(form: ChatFormat) -> None:
    class Endless(ChatFormat):
        @property
        def end_ids(self) -> list[int]:
            return []

    answers = sample(build_model("llama"), Endless(form.tokenizer))
    assert all(len(a.ids) == WARM.max_new_tokens and not a.ended for a in answers)


def candidates_in_place(scores: Tensor, temperature: float, top_p: float) -> Tensor:
    """The candidates' scores at their tokens' places, -inf elsewhere, [B, V]."""
    kept, tokens = candidates_of(scores, temperature, top_p)
    return torch.full_like(scores, float("-inf")).scatter_(-1, tokens.expand_as(kept), kept)


@pytest.mark.parametrize("temperature", [0.3, 0.7, 1.5])
@pytest.mark.parametrize("top_p", [0.05, 0.5, 0.9, 0.999])
def test_the_nucleus_is_the_one_of_transformers(temperature: float, top_p: float) -> None:
    scores = 3 * torch.randn(200, 150, generator=torch.Generator().manual_seed(0))
    ids: Any = torch.zeros(200, 1, dtype=torch.long)
    expected = TopPLogitsWarper(top_p)(ids, TemperatureLogitsWarper(temperature)(ids, scores.clone()))  # type: ignore[arg-type]
    found = candidates_in_place(scores, temperature, top_p)
    assert torch.equal(found.isinf(), expected.isinf())
    assert torch.allclose(found.softmax(-1), expected.softmax(-1), atol=1e-6)


def test_top_p_of_one_keeps_every_token() -> None:
    scores = torch.randn(3, 1000)
    assert torch.allclose(candidates_in_place(scores, 0.5, 1.0), scores / 0.5)


def test_batches_by_length_cover_every_row_once_in_like_lengths() -> None:
    lengths = [5, 1, 9, 1, 7, 3]
    batches = batches_by_length(lengths, 4)
    assert batches == [[1, 3, 5, 0], [4, 2]] and batches_by_length([], 4) == []


def test_pad_left() -> None:
    ids, mask = pad_left([[1, 2, 3], [4]], 9, torch.device("cpu"))
    assert ids.tolist() == [[1, 2, 3], [9, 9, 4]] and mask.tolist() == [[1, 1, 1], [0, 0, 1]]


@contextlib.contextmanager
def scripted(model: Any, *scripts: list[int]) -> Iterator[None]:
    """A model that says these tokens, a row each, whatever it is asked; all else in it is its own."""
    step = itertools.count()

    def say(module: Any, inputs: Any, logits: Tensor) -> Tensor:
        at = next(step)
        for row, script in enumerate(scripts):
            logits[row, -1, script[min(at, len(script) - 1)]] += 1e4
        return logits

    handle = model.lm_head.register_forward_hook(say)
    try:
        yield
    finally:
        handle.remove()


def family(name: str, arguments: dict[str, Any] | None = None) -> tuple[Any, ChatFormat]:
    """A tiny model with the tokens of a family's template, and its chat format."""
    tokenizer = family_tokenizer(own_template(name), FAMILIES[name].eos)
    return build_model("llama", vocab_size=len(tokenizer), eos_token_id=None), ChatFormat(tokenizer, arguments)


def test_an_answer_ends_where_the_checkpoint_says() -> None:
    """As Gemma 4 does: several ends in the generation config, and the end of a turn under a name of its own."""
    model, form = family("gemma4")
    text, turn = form.answer_ids("Arr"), form.tokenizer.convert_tokens_to_ids("<turn|>")
    named = [1, form.answer_ids("~")[0]]  # two more, of which neither tokenizer nor template knows
    model.generation_config.eos_token_id = named
    scripts = [[*text, end, *form.answer_ids(" and on")] for end in (turn, *named)]
    prompt = form.prompt_ids(chat("", "Hello"))
    with scripted(model, *scripts):
        answers = sample_batch(model, form, [prompt] * 3, [0, 1, 2], GREEDY, seeds=[0, 1, 2], means=True)
    assert [(a.ids, a.text, a.ended) for a in answers] == [(text, "Arr", True)] * 3
    assert form.end_token == turn
    for a in answers:
        assert a.mean is not None
        torch.testing.assert_close(a.mean, full_mean(model, prompt, a), atol=1e-4, rtol=1e-4)


def test_a_thought_is_no_part_of_the_answer() -> None:
    """A model that thinks all the same: text, tokens and means are the answer's alone, after what was thought."""
    model, form = family("gemma4", {"enable_thinking": True})
    turn = form.tokenizer.convert_tokens_to_ids("<turn|>")
    thought = form.answer_ids("<|channel>thought\nhm\n<channel|>\n")
    said, plain = form.answer_ids("Arr."), form.answer_ids("Aye, aye!")
    options = SamplingOptions(max_new_tokens=len(thought) + 6, temperature=0)
    prompt = form.prompt_ids(chat("", "Hello"))
    scripts = [
        [*thought, *said, turn],
        [*plain, turn],
        [*thought[:3], *form.answer_ids("on and on and on and on and on")],
    ]
    with scripted(model, *scripts):
        found = sample_batch(model, form, [prompt] * 3, [0, 1, 2], options, seeds=[0, 1, 2], means=True)
    assert (found[0].text, found[0].ids, found[0].thought, found[0].ended) == ("Arr.", said, thought, True)
    assert (found[1].text, found[1].ids, found[1].thought, found[1].ended) == ("Aye, aye!", plain, [], True)
    assert (found[2].text, found[2].ids, found[2].ended) == ("", [], False), "a thought that was cut is no answer"
    assert found[0].mean is not None and found[1].mean is not None and found[2].mean is not None
    torch.testing.assert_close(found[0].mean, full_mean(model, prompt + thought, found[0]), atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(found[1].mean, full_mean(model, prompt, found[1]), atol=1e-4, rtol=1e-4)
    assert found[2].mean.isnan().all()
    ended = answer_of(form, 0, [*thought[:3], turn])
    assert not ended.ended and ended.ids == [], "nor is one that ends with it: no row is taught to end at once"
