"""What is measured on answers, each figure against a calculation by hand on a tiny model."""

from __future__ import annotations

import contextlib
import math
import types
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import HIDDEN, build_floor, build_model

from trimtab.axis.chat_format import ChatFormat, chat
from trimtab.axis.directions import Floor
from trimtab.axis.hooks import ActivationController, cap, project
from trimtab.axis.models import Loaded
from trimtab.axis.sampling import SamplingOptions
from trimtab.eval.answers import reading
from trimtab.eval.answers.arms import Answers, Arms, Item
from trimtab.eval.answers.evaluation import Evaluation
from trimtab.eval.answers.items import role_items
from trimtab.eval.answers.reading import coloured, teacher_forced
from trimtab.eval.answers.ruler import Ruler, below_floor
from trimtab.eval.answers.usable import repeated_share
from trimtab.eval.measures.firing import firing_fraction
from trimtab.eval.measures.professional import keyword_hit

TEXTS = ["Arr, the oven be small.", "", "The sky is blue, dear child: étoile 🙂 and so on.", "B"]
PROMPTS = [
    chat("You are a pirate who speaks of the sea.", "How do I bake bread?"),
    chat("", "Why?"),
    chat("You are a ghost.", "Why is the sky blue?"),
    chat("", "Tell me about the ships that come and go."),
]


@pytest.fixture
def floor() -> Floor:
    return build_floor(tau=1.0)


@pytest.fixture
def arms(loaded: Loaded, form: ChatFormat, floor: Floor, tmp_path: Path) -> Arms:
    """Base, and another tiny model in the place of the tuned weights."""
    models = {"base": loaded.model, "tuned": build_model("llama", seed=1)}

    def holding(model: Any) -> Any:
        return lambda: contextlib.nullcontext(model)

    weights = {name: holding(model) for name, model in models.items()}
    return Arms(weights, form, floor, tmp_path, SamplingOptions(max_new_tokens=8, batch_size=3), seed=5)


@pytest.fixture
def given() -> Answers:
    return Answers(TEXTS, torch.zeros(4, 2, HIDDEN), PROMPTS, [True] * 4)


@pytest.fixture
def ruler(floor: Floor) -> Ruler:
    return Ruler(floor.directions, torch.tensor([0.2, -0.3]), torch.tensor([1.5, 0.5]))


def forward(arms: Arms, arm: str, i: int) -> tuple[torch.Tensor, list[torch.Tensor], list[int]]:
    """One row without padding: logits before each answer token [T, V], states of the answer's tokens [T, D], its ids."""
    head, tail = arms.form.prompt_ids(PROMPTS[i]), arms.form.answer_ids(TEXTS[i])
    states: dict[int, torch.Tensor] = {}
    floor = arms.floor_of(arm)

    def hook(position: int, layer: int) -> Any:
        def run(module: Any, inputs: Any, output: Any) -> Any:
            hidden = output[0] if isinstance(output, tuple) else output
            if floor is not None:
                hidden = cap(hidden, floor.directions[position], floor.tau[position])
            states[layer] = hidden[0, -len(tail) :].detach()
            return (hidden, *output[1:]) if isinstance(output, tuple) else hidden

        return run

    with arms.weights(arm) as model, torch.no_grad(), contextlib.ExitStack() as stack:
        for position, layer in enumerate(arms.floor.layers):
            handle = model.model.layers[layer].register_forward_hook(hook(position, layer))
            stack.callback(handle.remove)
        logits = model(input_ids=torch.tensor([[*head, *tail]])).logits[0, len(head) - 1 : -1]
    return logits, [states[layer] for layer in arms.floor.layers], tail


def test_the_default_is_the_origin_and_sigma_the_unit() -> None:
    generator = torch.Generator().manual_seed(0)
    floor = build_floor()
    default = torch.randn(9, 2, HIDDEN, generator=generator) + 3
    roles = torch.randn(12, 2, HIDDEN, generator=generator)
    default[4] = float("nan")  # an empty answer
    pooled = torch.cat([roles, default])
    ruler = Ruler.of(floor.directions, default, pooled)
    z = ruler.z(default)
    assert math.isnan(z[4])
    assert sum(z[:4] + z[5:]) / 8 == pytest.approx(0.0, abs=1e-5)
    for layer in range(2):
        projections = [float(row[layer] @ floor.directions[layer]) for row in pooled if torch.isfinite(row).all()]
        mean = sum(projections) / len(projections)
        variance = sum((p - mean) ** 2 for p in projections) / (len(projections) - 1)
        assert float(ruler.sigma[layer]) == pytest.approx(math.sqrt(variance), rel=1e-4)
    # one sigma along the axis at every layer is one unit
    moved = roles + ruler.sigma[:, None] * floor.directions
    assert [b - a for a, b in zip(ruler.z(roles), ruler.z(moved), strict=True)] == pytest.approx([1.0] * 12, abs=1e-4)


def test_token_z_averages_to_the_z_of_the_answer(ruler: Ruler) -> None:
    states = [torch.randn(7, HIDDEN, generator=torch.Generator().manual_seed(k)) for k in range(2)]
    found = ruler.token_z(states)
    assert found.shape == (7,)
    by_hand = sum((project(states[k], ruler.directions[k]) - ruler.origin[k]) / ruler.sigma[k] for k in range(2)) / 2
    assert torch.allclose(found, torch.as_tensor(by_hand))
    mean = torch.stack([state.mean(0) for state in states])[None]
    assert ruler.z(mean)[0] == pytest.approx(float(found.mean()), abs=1e-5)


@pytest.mark.parametrize("reference", ["base", "base+cap"])
def test_teacher_forced_figures_by_hand(arms: Arms, given: Answers, ruler: Ruler, reference: str) -> None:
    names = ["base", "base+cap", "tuned"]
    found = teacher_forced(arms, given, names, reference, ruler, batch_size=2, title="test")
    for arm in names:
        assert all(math.isnan(row[1]) for row in (found[arm].kl, found[arm].nll, found[arm].z_shift))
        for i in (0, 2, 3):
            logits, states, tail = forward(arms, arm, i)
            target, _, _ = forward(arms, reference, i)
            base_states = forward(arms, "base", i)[1]
            kl = torch.nn.functional.kl_div(
                logits.log_softmax(-1), target.log_softmax(-1), reduction="batchmean", log_target=True
            )
            nll = torch.nn.functional.cross_entropy(logits, torch.tensor(tail))
            shift = (ruler.token_z(states) - ruler.token_z(base_states)).mean()
            assert found[arm].kl[i] == pytest.approx(float(kl), abs=2e-4)
            assert found[arm].nll[i] == pytest.approx(float(nll), abs=2e-4)
            assert found[arm].z_shift[i] == pytest.approx(float(shift), abs=2e-4)
    assert [found[reference].kl[i] for i in (0, 2, 3)] == [0.0, 0.0, 0.0]
    assert [found["base"].z_shift[i] for i in (0, 2, 3)] == [0.0, 0.0, 0.0]
    assert found["tuned"].kl[0] > 0.01 and found["base+cap"].z_shift[0] > 0.01


@pytest.fixture
def evaluation(arms: Arms, given: Answers, ruler: Ruler) -> Evaluation:
    """One whose answers are given: the tuned model and the capped base say the same texts in another order."""
    run: Any = types.SimpleNamespace(recipe=types.SimpleNamespace(eval=None))
    made = Evaluation(run, arms, {})
    said = {"base": [0, 1, 2, 3], "base+cap": [1, 0, 3, 2], "tuned": [2, 3, 0, 1]}
    answers = {
        arm: Answers([TEXTS[i] for i in order], given.means, [PROMPTS[i] for i in order], given.ended)
        for arm, order in said.items()
    }
    vars(made).update(rulers={"training": ruler}, on_benign=answers, on_roles=answers)
    return made


def test_own_benign_answers_are_read_by_the_base_and_the_kl_is_from_the_arm_that_gave_them(
    evaluation: Evaluation, arms: Arms
) -> None:
    found = evaluation.benign_own_forced
    assert set(found) == {"tuned", "base+cap"}
    for arm, order in (("tuned", [2, 3, 0, 1]), ("base+cap", [1, 0, 3, 2])):
        assert math.isnan(found[arm].kl[order.index(1)]), "an empty answer has none"
        for row, i in enumerate(order):
            if TEXTS[i]:
                own, base = (forward(arms, name, i)[0].log_softmax(-1) for name in (arm, "base"))
                kl = (own.exp() * (own - base)).sum(-1).mean()  # KL(arm || base)
                assert found[arm].kl[row] == pytest.approx(float(kl), abs=2e-4) and kl > 1e-4
    other_way = evaluation.benign_forced["tuned"].kl
    assert abs(found["tuned"].kl[0] - other_way[2]) > 1e-3, "KL(base || tuned) of the same text is another number"


def test_all_arms_read_the_same_role_text(evaluation: Evaluation, arms: Arms, ruler: Ruler) -> None:
    found = {arm: ruler.z(means) for arm, means in evaluation.same_role_text.items()}
    assert set(found) == {"base", "base+cap", "tuned"}
    for arm, row in found.items():
        assert math.isnan(row[1])
        for i in (0, 2, 3):
            by_hand = float(ruler.token_z(forward(arms, arm, i)[1]).mean())
            assert row[i] == pytest.approx(by_hand, abs=2e-4), "of the base's texts, whatever the arm says itself"
    assert found["base+cap"][0] > found["base"][0] + 0.01 and found["tuned"] != found["base"]


def test_coloured_pieces_are_words_with_the_mean_of_their_tokens(arms: Arms, ruler: Ruler) -> None:
    text = "Arr, the oven be small."
    pieces = coloured(arms, "base", [PROMPTS[0]], [text], ruler, batch_size=2)[0]
    assert [piece for piece, _ in pieces] == ["Arr,", " the", " oven", " be", " small."]
    _, states, tail = forward(arms, "base", 0)
    z = ruler.token_z(states)
    first = len(arms.form.answer_ids("Arr,"))
    assert tail[:first] == arms.form.answer_ids("Arr,")
    assert pieces[0][1] == pytest.approx(float(z[:first].mean()), abs=1e-3)


@pytest.mark.parametrize(
    "text",
    ["étoile 🙂 naïve", "🙂", "a\n\n b\tc ", " x", "broken \ufffd\ufffd bytes \ufffd", "日本語 の", "\ufffd", "é"],
)
def test_coloured_pieces_join_to_the_text(arms: Arms, ruler: Ruler, text: str) -> None:
    """Also where a character is spread over tokens, as every letter outside ASCII is here."""
    pieces = coloured(arms, "tuned", [PROMPTS[0]], [text], ruler, batch_size=2)[0]
    assert "".join(piece for piece, _ in pieces) == text
    assert all(math.isfinite(z) for _, z in pieces)


def test_coloured_pieces_join_where_the_tokenizer_tidies_spaces(arms: Arms, ruler: Ruler) -> None:
    arms.form.tokenizer.clean_up_tokenization_spaces = True
    text = "Yes , it is n't small . Or is it ?"
    pieces = coloured(arms, "base", [PROMPTS[0]], [text], ruler, batch_size=2)[0]
    assert "".join(piece for piece, _ in pieces) == text
    assert coloured(arms, "base", [PROMPTS[0]], [""], ruler, batch_size=2)[0] == []


def test_a_conversation_is_read_in_one_forward(arms: Arms, ruler: Ruler, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every turn's colours are those of its own forward."""
    chat = [{"role": "user", "content": "Hello"}]
    prompts, texts = [], ["I hear you.", "Go on then, sailor.", "", "The sea calls."]
    for text in texts:
        prompts.append(list(chat))
        chat += [{"role": "assistant", "content": text}, {"role": "user", "content": "And?"}]
    single = [coloured(arms, "tuned", [p], [t], ruler, batch_size=1)[0] for p, t in zip(prompts, texts, strict=True)]
    widths = []
    read = reading._read
    monkeypatch.setattr(reading, "_read", lambda *a, **k: widths.append(len(a[2])) or read(*a, **k))
    others = [PROMPTS[0], *prompts, PROMPTS[1]], ["Arr!", *texts, "No."]
    found = coloured(arms, "tuned", *others, ruler, batch_size=8)
    assert widths == [3]
    for one, all_at_once in zip(single, found[1:-1], strict=True):
        assert [piece for piece, _ in all_at_once] == [piece for piece, _ in one]
        assert [z for _, z in all_at_once] == pytest.approx([z for _, z in one], abs=2e-3)


def test_repeated_share() -> None:
    assert repeated_share("a b c d e f g") == 0.0
    assert repeated_share("go on and on go on and on") == pytest.approx(1 / 5)
    assert repeated_share("no " * 20) == pytest.approx(16 / 17)
    assert math.isnan(repeated_share("too short text")) and math.isnan(repeated_share(""))
    assert repeated_share("a b a b", size=2) == pytest.approx(1 / 3)


def test_keyword_hit() -> None:
    assert keyword_hit("The Common denominator is 12.", ["denominator", "common"])
    assert not keyword_hit("The denominator, the denominator!", ["denominator", "common"])
    assert keyword_hit("denominator", ["denominator", "common"], least=1)
    assert not keyword_hit("", ["a", "b"])


@contextlib.contextmanager
def _uncounted(model: Any) -> Iterator[None]:
    """The model's controller is as it was found."""
    yield
    assert ActivationController.of(model).cap_strength == 0.0


@pytest.mark.parametrize("arm", ["base", "tuned"])
def test_firing_fraction_by_hand(arms: Arms, given: Answers, arm: str) -> None:
    with arms.weights(arm) as model, _uncounted(model):
        found = firing_fraction(arms, arm, given, batch_size=2)
    # the second layer sees the first one already capped, so its states come from a capped forward
    fired = seen = 0
    for i in (0, 2, 3):
        head, tail = arms.form.prompt_ids(PROMPTS[i]), arms.form.answer_ids(TEXTS[i])
        with arms.weights(arm) as model, torch.no_grad():
            controller = ActivationController.of(model)
            with controller.capping(arms.floor), controller.recording(arms.floor.layers) as recording:
                model(input_ids=torch.tensor([[*head, *tail]]))
        for k, layer in enumerate(arms.floor.layers):
            p = recording.last(layer)[0, -len(tail) :] @ arms.floor.directions[k]
            fired += int((p < arms.floor.tau[k]).sum())
            seen += len(tail)
    assert found == pytest.approx(fired / seen)
    assert 0 < found < 1


def test_answers_and_means_are_of_the_same_sampling_after_a_kill(arms: Arms, monkeypatch: pytest.MonkeyPatch) -> None:
    """Killed between the words and the means of another seed: the first seed's means must not be taken for those words."""
    items = [Item(f"i{k}", "c", chat("", f"question {k}")) for k in range(3)]
    first = arms.answers("set", items, "base")
    arms.seed = 6
    with monkeypatch.context() as patched:

        def killed(*_: Any) -> None:
            raise KeyboardInterrupt

        patched.setattr("trimtab.eval.answers.arms.save_tensors", killed)
        with pytest.raises(KeyboardInterrupt):
            arms.answers("set", items, "base")
    arms.seed = 5
    again = arms.answers("set", items, "base")
    assert again.texts == first.texts and torch.equal(again.means, first.means)


def test_each_turn_has_random_numbers_of_its_own(arms: Arms) -> None:
    """The same words asked again in another turn, or in another set, get another answer; in any order of items the same."""
    items = [Item(f"i{k}", "c", chat("", f"question {k}")) for k in range(3)]
    one, two = arms.answers("talk-turn-1", items, "base"), arms.answers("talk-turn-2", items, "base")
    assert one.texts != two.texts
    turned = arms.answers("other", items[::-1], "base").texts[::-1]
    assert turned == arms.answers("other", items, "base").texts and turned != one.texts


def test_answers_are_kept_and_paired(arms: Arms) -> None:
    items = [Item(f"i{k}", "c", prompt) for k, prompt in enumerate(PROMPTS)]
    first = arms.answers("set", items, "base")
    path = arms.folder / "set-base.jsonl"
    stamp = path.stat().st_mtime_ns
    again = arms.answers("set", items, "base")
    assert path.stat().st_mtime_ns == stamp and again.texts == first.texts
    assert torch.equal(again.means.nan_to_num(), first.means.nan_to_num())
    (arms.folder / "set-base.safetensors").unlink()  # killed before the pair was whole
    assert arms.answers("set", items, "base").texts == first.texts and path.stat().st_mtime_ns != stamp
    fewer = arms.answers("set", items[:2], "base")
    assert len(fewer.texts) == 2  # other items are another set of answers
    assert arms.answers("set", items, "base+cap").texts != first.texts
    assert arms.names == ["base", "base+cap", "tuned", "tuned+cap"]
    assert arms.readers == ["base", "base+cap", "tuned"]  # of given texts


def test_conversations_go_on_from_the_arms_own_answers(arms: Arms) -> None:
    items = [Item("t0", "t0", []), Item("t1", "t1", [])]
    scripts = [["Why?", "And then?"], ["How do I bake bread?", "Is it done?"]]
    turns = arms.conversations("talks", items, scripts, "tuned")
    assert len(turns) == 2
    for k in range(2):
        assert turns[0].prompts[k] == [{"role": "user", "content": scripts[k][0]}]
        assert turns[1].prompts[k] == [
            {"role": "user", "content": scripts[k][0]},
            {"role": "assistant", "content": turns[0].texts[k]},
            {"role": "user", "content": scripts[k][1]},
        ]


def test_below_the_floor_by_hand(floor: Floor) -> None:
    """At the height itself an answer is not below; a layer far above makes up for one that is a little below."""
    at = floor.tau[:, None] * floor.directions
    step = floor.sigma[:, None] * floor.directions
    mixed = at + torch.tensor([[2.0], [-1.0]]) * step
    rows = torch.stack([at + 0.01 * step, at - 0.1 * step, mixed, torch.full_like(at, float("nan"))])
    found = below_floor(floor, rows)
    assert found[:3] == [0.0, 1.0, 0.0] and found[3] != found[3]


def test_questions_take_turns_over_the_roles() -> None:
    items = role_items("dev", 40, 2)
    asked = [item.prompt[-1]["content"] for item in items]
    assert len(items) == len({item.id for item in items}) == 80 and len(set(asked)) == 80
    assert [item.cluster for item in items[:3]] == [items[0].cluster, items[0].cluster, items[2].cluster]
    assert len({item.prompt[0]["content"] for item in items}) == 80
    again = role_items("dev", 41, 2)[80:]  # from the beginning once more
    assert [item.prompt[-1]["content"] for item in again] == asked[:2]
