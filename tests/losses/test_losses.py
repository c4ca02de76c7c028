"""The losses: the formula by hand, and gradients equal to plain autograd however the forward is run."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from conftest import ARCHITECTURES, HIDDEN, VOCAB, build_floor, build_model
from peft import LoraConfig, get_peft_model
from torch import Tensor

from trimtab.axis import ActivationController, Floor
from trimtab.losses import (
    axis_anchor_terms,
    axis_floor_loss,
    axis_floor_terms,
    chunked_divergence,
    divergence_terms,
    hinge,
    projections,
)


def two_layer_floor() -> Floor:
    """Width 2, layers 3 and 5: v = e1 and e2, tau 1 and 2, sigma 2 and 0.5."""
    return Floor((3, 5), torch.eye(2), torch.tensor([1.0, 2.0]), torch.tensor([2.0, 0.5]))


HIDDEN_A = torch.tensor([[[3.0, 9.0], [-1.0, 9.0], [-9.0, 9.0]]])  # p on e1: 3, -1, -9
HIDDEN_B = torch.tensor([[[9.0, 1.0], [9.0, 4.0], [9.0, -9.0]]])  # p on e2: 1, 4, -9
MASK = torch.tensor([[1, 1, 0]])


def test_formula_by_hand() -> None:
    terms = axis_floor_terms({3: HIDDEN_A, 5: HIDDEN_B}, two_layer_floor(), MASK)
    # layer 3: relu((1 - 3) / 2)^2 = 0, relu((1 + 1) / 2)^2 = 1; layer 5: relu((2 - 1) / 0.5)^2 = 4, relu(-4)^2 = 0
    assert terms.penalty.item() == pytest.approx((1 + 4) / 2)
    assert terms.tokens.item() == 2
    assert terms.violations.tolist() == [1, 1]
    assert terms.z_sum.tolist() == pytest.approx([(3 - 1) / 2, (1 + 4) / 0.5])


def test_the_mean_divides_by_masked_in_tokens_or_by_the_number_given() -> None:
    states = {3: HIDDEN_A, 5: HIDDEN_B}
    assert axis_floor_loss(states, two_layer_floor(), MASK).item() == pytest.approx(2.5 / 2)
    assert axis_floor_loss(states, two_layer_floor(), MASK, n_tokens=10).item() == pytest.approx(0.25)
    nothing = torch.zeros_like(MASK)
    assert axis_floor_loss(states, two_layer_floor(), nothing).item() == 0.0


def test_a_sequence_is_in_floor_order_and_bool_masks_are_the_same() -> None:
    by_name = axis_floor_loss({5: HIDDEN_B, 3: HIDDEN_A}, two_layer_floor(), MASK)
    assert axis_floor_loss([HIDDEN_A, HIDDEN_B], two_layer_floor(), MASK.bool()).equal(by_name)


def test_the_penalty_is_one_sided_and_squared() -> None:
    x = torch.tensor([-3.0, 0.0, 0.5, 1.0, 1.5, 40.0], requires_grad=True)
    value = hinge(x)
    assert value.tolist() == [0, 0, 0.25, 1, 2.25, 1600]
    (slope,) = torch.autograd.grad(value.sum(), x)
    assert slope.tolist() == [0, 0, 1, 2, 3, 80]


def test_margin_is_in_sigma() -> None:
    terms = axis_floor_terms({3: HIDDEN_A, 5: HIDDEN_B}, two_layer_floor(), MASK, margin=1.5)
    # shortfalls -1, 1, 2, -4 become 0.5, 2.5, 3.5, -2.5
    assert terms.penalty.item() == pytest.approx((0.25 + 6.25 + 12.25) / 2)
    assert terms.violations.tolist() == [2, 1]


def test_base_relative_target_replaces_tau() -> None:
    base = torch.tensor([[[5.0, -1.0, 0.0]], [[1.0, 5.0, 0.0]]])
    terms = axis_floor_terms({3: HIDDEN_A, 5: HIDDEN_B}, two_layer_floor(), MASK, base_projections=base)
    # layer 3: (5 - 3) / 2 = 1 and (-1 + 1) / 2 = 0; layer 5: (1 - 1) / 0.5 = 0 and (5 - 4) / 0.5 = 2
    assert terms.penalty.item() == pytest.approx((1 + 4) / 2)
    assert terms.violations.tolist() == [1, 1]


def test_anchor_is_two_sided() -> None:
    base = torch.tensor([[[5.0, -3.0, 0.0]], [[1.0, 5.0, 0.0]]])
    # layer 3: ((3 - 5) / 2)^2 = 1, ((-1 + 3) / 2)^2 = 1; layer 5: 0, ((4 - 5) / 0.5)^2 = 4
    value = axis_anchor_terms({3: HIDDEN_A, 5: HIDDEN_B}, base, two_layer_floor(), MASK)
    assert value.item() == pytest.approx((1 + 1 + 4) / 2)
    own = projections({3: HIDDEN_A, 5: HIDDEN_B}, two_layer_floor())
    assert own.shape == (2, 1, 3) and not own.requires_grad
    assert axis_anchor_terms({3: HIDDEN_A, 5: HIDDEN_B}, own, two_layer_floor(), MASK).item() == 0.0


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
def test_tokens_left_out_don_t_matter_whatever_they_hold(bad: float) -> None:
    spoilt = HIDDEN_A.clone()
    spoilt[0, 2] = bad
    spoilt.requires_grad_()
    floor, base = two_layer_floor(), torch.zeros(2, 1, 3)
    clean = {3: HIDDEN_A.clone().requires_grad_(), 5: HIDDEN_B}
    for loss in (
        lambda states: axis_floor_loss(states, floor, MASK),
        lambda states: axis_anchor_terms(states, base, floor, MASK),
    ):
        found, wanted = loss({3: spoilt, 5: HIDDEN_B}), loss(clean)
        assert found.equal(wanted)
        (gradient,) = torch.autograd.grad(found, spoilt)
        assert gradient.equal(torch.autograd.grad(wanted, clean[3])[0])
    assert torch.isfinite(axis_floor_terms({3: spoilt, 5: HIDDEN_B}, floor, MASK).z_sum).all()


def test_wrong_shapes_are_told() -> None:
    with pytest.raises(ValueError, match="prompt-learning"):
        axis_floor_terms({3: HIDDEN_A, 5: HIDDEN_B}, two_layer_floor(), torch.ones(1, 4))
    with pytest.raises(ValueError, match="1 hidden states for 2 floor layers"):
        axis_floor_terms([HIDDEN_A], two_layer_floor(), MASK)


def logits_pair(seed: int = 0, tokens: int = 7, words: int = 50) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    student = torch.randn(tokens, words, generator=generator).requires_grad_()
    return student, torch.randn(tokens, words, generator=generator) * 3


def by_torch(student: Tensor, teacher: Tensor, kind: str, beta: float) -> Tensor:
    """The divergence by torch's kl_div and torch's distributions, in float64."""
    s, t = student.double().log_softmax(-1), teacher.double().log_softmax(-1)

    def kl(p: Tensor, q: Tensor) -> Tensor:
        return torch.nn.functional.kl_div(q, p, reduction="none", log_target=True).sum(-1)

    if kind == "jsd":
        mixture = (beta * t.exp() + (1 - beta) * s.exp()).log()
        return beta * kl(t, mixture) + (1 - beta) * kl(s, mixture)
    return kl(t, s) if kind == "forward_kl" else kl(s, t)


@pytest.mark.parametrize("kind", ["forward_kl", "reverse_kl", "jsd"])
def test_divergence_equals_torch_in_value_and_gradient(kind: Any) -> None:
    student, teacher = logits_pair()
    found = divergence_terms(student, teacher, kind, jsd_beta=0.3)
    wanted = by_torch(student, teacher, kind, 0.3)
    assert found.shape == (7,) and (found > 0).all()
    torch.testing.assert_close(found, wanted.float(), atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(
        torch.autograd.grad(found.sum(), student)[0],
        torch.autograd.grad(wanted.sum(), student)[0].float(),
        atol=1e-5,
        rtol=1e-4,
    )
    assert divergence_terms(teacher, teacher, kind).abs().max() < 1e-6
    assert divergence_terms(student.bfloat16(), teacher.bfloat16(), kind).dtype == torch.float32
    assert divergence_terms(student[:0], teacher[:0], kind).sum().item() == 0.0


@pytest.mark.parametrize("kind", ["forward_kl", "reverse_kl", "jsd"])
def test_top_k_is_the_divergence_of_merged_outcomes(kind: Any) -> None:
    student, teacher = logits_pair(1)
    full = divergence_terms(student, teacher, kind)
    smaller = [divergence_terms(student, teacher, kind, top_k=k) for k in (1, 5, 20, 49, 50)]
    for one, other in itertools.pairwise([*smaller, full]):  # a finer partition never has less
        assert (one <= other + 1e-5).all()
    torch.testing.assert_close(smaller[-1], full)
    kept = teacher.topk(5).indices
    s, t = student.softmax(-1).gather(-1, kept), teacher.softmax(-1).gather(-1, kept)
    s, t = torch.cat([s, 1 - s.sum(-1, keepdim=True)], -1), torch.cat([t, 1 - t.sum(-1, keepdim=True)], -1)
    torch.testing.assert_close(smaller[1], by_torch(s.log(), t.log(), kind, 0.5).float(), atol=1e-4, rtol=1e-4)
    assert divergence_terms(teacher, teacher, kind, top_k=3).abs().max() < 1e-6
    peaked = torch.zeros(1, 50).index_fill(1, torch.tensor([3]), 80.0)  # the K hold all the mass there is
    assert torch.isfinite(divergence_terms(student[:1], peaked, kind, top_k=2)).all()


def by_enumeration(
    student: Tensor, teacher: Tensor, kind: str, beta: float, top_k: int | None
) -> tuple[Tensor, Tensor]:
    """Divergence and its gradient by the student's logits, of one token, outcome by outcome in float64.

    With Q the student's probability of an outcome, P the teacher's and d = dD/dQ, an outcome of tokens i has the gradient
    q_i (d - sum Q d) by their logits, and none where q_i is 0.
    """
    q, p = student.double().softmax(-1), teacher.double().softmax(-1)
    size = len(p)
    groups = [[i] for i in range(size)]
    if top_k is not None and top_k < size:
        kept = teacher.log_softmax(-1).topk(top_k).indices.tolist()
        groups = [*([i] for i in kept), [i for i in range(size) if i not in kept]]
    value, slopes = 0.0, []
    for group in groups:
        one, other = float(p[group].sum()), float(q[group].sum())
        mixed = beta * one + (1 - beta) * other
        if kind == "forward_kl":
            value += 0.0 if one == 0 else math.inf if other == 0 else one * math.log(one / other)
            slopes.append(0.0 if other == 0 else -one / other)
        elif kind == "reverse_kl":
            value += 0.0 if other == 0 else math.inf if one == 0 else other * math.log(other / one)
            slopes.append(0.0 if other == 0 else math.inf if one == 0 else math.log(other / one))
        else:
            value += beta * one * math.log(one / mixed) if one else 0.0
            value += (1 - beta) * other * math.log(other / mixed) if other else 0.0
            slopes.append((1 - beta) * math.log(other / mixed) if other else 0.0)
    mean = sum(float(q[group].sum()) * slope for group, slope in zip(groups, slopes, strict=True) if q[group].sum() > 0)
    gradient = torch.zeros(size, dtype=torch.float64)
    for group, slope in zip(groups, slopes, strict=True):
        for i in group:
            gradient[i] = q[i] * (slope - mean) if q[i] > 0 else 0.0
    return torch.tensor(value, dtype=torch.float64), gradient


@pytest.mark.parametrize("kind", ["forward_kl", "reverse_kl", "jsd"])
@pytest.mark.parametrize("top_k", [None, 1, 2, 3])
def test_impossible_tokens(kind: Any, top_k: int | None) -> None:
    """Logits of -inf in every place of both sides, in both at once, and in all that is not kept."""
    generator = torch.Generator().manual_seed(3)
    masks = [mask for mask in itertools.product((False, True), repeat=4) if not all(mask)]
    pairs = list(itertools.product(masks, masks))
    student, teacher = (
        torch.randn(len(pairs), 4, generator=generator).masked_fill(
            torch.tensor([pair[side] for pair in pairs]), -math.inf
        )
        for side in (0, 1)
    )
    student.requires_grad_()
    found = divergence_terms(student, teacher, kind, jsd_beta=0.3, top_k=top_k)
    wanted = [by_enumeration(s, t, kind, 0.3, top_k) for s, t in zip(student.detach(), teacher, strict=True)]
    values = torch.stack([value for value, _ in wanted])
    torch.testing.assert_close(found.double(), values, atol=1e-5, rtol=1e-5)
    finite = values.isfinite()
    assert int(finite.sum()) >= len(masks) and (kind != "jsd" or bool(finite.all()))
    (gradient,) = torch.autograd.grad(found[finite].sum(), student)
    slopes = torch.stack([slope for _, slope in wanted])
    torch.testing.assert_close(gradient[finite].double(), slopes[finite], atol=1e-5, rtol=1e-4)
    hidden = student.detach()[finite].clone().requires_grad_()  # the identity for a head
    total = chunked_divergence(hidden, teacher[finite], lambda h: h, kind, jsd_beta=0.3, top_k=top_k, chunk=7)
    torch.testing.assert_close(total, found[finite].sum(), atol=1e-4, rtol=1e-5)
    torch.testing.assert_close(torch.autograd.grad(total, hidden)[0], gradient[finite], atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("kind", ["forward_kl", "reverse_kl", "jsd"])
@pytest.mark.parametrize("chunk", [1, 3, 100])
@pytest.mark.parametrize("top_k", [None, 6])
def test_chunked_divergence_is_the_unchunked_one(kind: Any, chunk: int, top_k: int | None) -> None:
    generator = torch.Generator().manual_seed(2)
    weight = torch.randn(40, 12, generator=generator)
    student = torch.randn(8, 12, generator=generator).requires_grad_()
    teacher = torch.randn(8, 12, generator=generator)

    def head(hidden: Tensor) -> Tensor:
        return torch.tanh(hidden @ weight.T / 4) * 4

    wanted = divergence_terms(head(student), head(teacher), kind, top_k=top_k).sum()
    found = chunked_divergence(student, teacher, head, kind, top_k=top_k, chunk=chunk)
    torch.testing.assert_close(found, wanted)
    torch.testing.assert_close(
        torch.autograd.grad(3 * found, student)[0], torch.autograd.grad(3 * wanted, student)[0], atol=1e-6, rtol=1e-5
    )
    with torch.no_grad():
        torch.testing.assert_close(chunked_divergence(student, teacher, head, kind, top_k=top_k, chunk=chunk), found)
    assert chunked_divergence(student[:0], teacher[:0], head, kind).item() == 0.0


def test_chunked_divergence_holds_one_chunk_of_logits() -> None:
    """The widest tensor that the head ever makes."""
    widths = []

    def head(hidden: Tensor) -> Tensor:
        widths.append(hidden.shape[0])
        return hidden @ torch.ones(12, 40)

    chunked_divergence(torch.randn(100, 12).requires_grad_(), torch.randn(100, 12), head, chunk=16).backward()
    assert max(widths) == 16 and sum(widths) == 200


def test_weights_scale_each_tokens_penalty() -> None:
    floor = two_layer_floor()
    hidden = {3: HIDDEN_A, 5: HIDDEN_B}
    weights = torch.rand(MASK.shape, generator=torch.Generator().manual_seed(5))
    found = axis_floor_terms(hidden, floor, MASK, weights=weights)
    rows = torch.zeros(())
    for row in range(MASK.shape[0]):
        for token in range(MASK.shape[1]):
            alone = torch.zeros_like(MASK)
            alone[row, token] = MASK[row, token]
            rows = rows + weights[row, token] * axis_floor_terms(hidden, floor, alone).penalty
    torch.testing.assert_close(found.penalty, rows)
    assert found.unweighted == axis_floor_terms(hidden, floor, MASK).penalty


# ---- gradients on real models ----

IDS = torch.randint(3, VOCAB, (2, 12), generator=torch.Generator().manual_seed(1))
ANSWER = torch.zeros(2, 12, dtype=torch.bool)
ANSWER[0, 5:] = True
ANSWER[1, 3:9] = True


def adapted(architecture: str) -> Any:
    """A tiny model with a LoRA whose B is not zero, in training mode."""
    torch.manual_seed(3)
    model = get_peft_model(
        build_model(architecture), LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM")
    )
    generator = torch.Generator().manual_seed(4)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            parameter.data = torch.randn(parameter.shape, generator=generator) * 0.05
    return model.train()


def gradients(model: Any, loss: Tensor) -> dict[str, Tensor]:
    """Gradients of the adapter's weights, zero where there is none; the model's own are cleared."""
    model.zero_grad(set_to_none=True)
    loss.backward()
    return {
        n: torch.zeros_like(p) if p.grad is None else p.grad for n, p in model.named_parameters() if p.requires_grad
    }


def cross_entropy(logits: Tensor, mask: Tensor, ids: Tensor) -> Tensor:
    """Mean negative log-likelihood of the tokens in the mask."""
    return torch.nn.functional.cross_entropy(logits[:, :-1][mask[:, 1:]].float(), ids[:, 1:][mask[:, 1:]])


def reference(model: Any, floor: Floor, margin: float = 0.0, **inputs: Any) -> dict[str, Tensor]:
    """Gradient of CE + penalty written out with output_hidden_states (its entry i + 1 is the output of layer i)."""
    output = model(input_ids=IDS, output_hidden_states=True, use_cache=False, **inputs)
    penalty = torch.zeros(())
    for i, layer in enumerate(floor.layers):
        p = (output.hidden_states[layer + 1].float() * floor.directions[i]).sum(-1)
        x = torch.clamp((floor.tau[i] - p) / floor.sigma[i] + margin, min=0)
        penalty = penalty + (x**2)[ANSWER].sum()
    assert penalty > 0.5  # else the comparison would say nothing about it
    return gradients(model, cross_entropy(output.logits, ANSWER, IDS) + penalty / len(floor.layers) / ANSWER.sum())


def ours(model: Any, floor: Floor, margin: float = 0.0, **inputs: Any) -> dict[str, Tensor]:
    """The same with the recording hooks and the loss of the package."""
    controller = ActivationController.of(model)
    with controller.recording(floor.layers) as recording:
        output = model(input_ids=IDS, use_cache=False, **inputs)
        states = {layer: recording.last(layer, with_grad=True) for layer in floor.layers}
    penalty = axis_floor_loss(states, floor, ANSWER, margin=margin)
    return gradients(model, cross_entropy(output.logits, ANSWER, IDS) + penalty)


def assert_same(found: dict[str, Tensor], wanted: dict[str, Tensor], tolerance: float = 1e-5) -> None:
    """Equal within ``tolerance`` of the largest gradient, which itself must not be small."""
    assert found.keys() == wanted.keys()
    scale = max(float(g.abs().max()) for g in wanted.values())
    assert scale > 1e-3
    for name, gradient in wanted.items():
        assert float((found[name] - gradient).abs().max()) <= tolerance * max(scale, 1.0), name


def no_checkpointing(model: Any) -> None:
    """Leave the model as it is."""


def non_reentrant(model: Any) -> None:
    """The usual checkpointing."""
    model.enable_input_require_grads()
    model.base_model.model.gradient_checkpointing_enable({"use_reentrant": False})


def reentrant(model: Any) -> None:
    """The old one, in whose regions hooks would see tensors without gradient."""
    model.enable_input_require_grads()
    model.base_model.model.gradient_checkpointing_enable({"use_reentrant": True})


@pytest.mark.slow
@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("checkpointing", [no_checkpointing, non_reentrant, reentrant])
def test_gradient_equals_plain_autograd(architecture: str, checkpointing: Callable[[Any], None]) -> None:
    floor = build_floor((1, 2), tau=2.0)
    wanted = reference(adapted(architecture), floor)
    model = adapted(architecture)
    checkpointing(model)
    layer = model.base_model.model.model.layers[1]
    assert layer.gradient_checkpointing is (checkpointing is not no_checkpointing)
    if layer.gradient_checkpointing:
        assert layer._gradient_checkpointing_func.keywords["use_reentrant"] is (checkpointing is reentrant)
    assert_same(ours(model, floor), wanted)


@pytest.mark.slow
def test_gradient_above_the_floor() -> None:
    floor = build_floor((0, 2), tau=2.0)
    wanted = reference(adapted("llama"), floor, margin=0.7)
    assert_same(ours(adapted("llama"), floor, margin=0.7), wanted)
    plain = reference(adapted("llama"), floor)
    assert any(not torch.allclose(plain[name], wanted[name], atol=1e-4) for name in plain)


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("architecture", ["llama", "gemma3_text"])
def test_padding_changes_nothing(architecture: str, side: str) -> None:
    floor = build_floor((1, 2), tau=2.0)
    model = adapted(architecture)
    controller = ActivationController.of(model)

    def terms(ids: Tensor, attention: Tensor, mask: Tensor) -> Any:
        with controller.recording(floor.layers) as recording:
            model(input_ids=ids, attention_mask=attention, use_cache=False)
            states = {layer: recording.last(layer) for layer in floor.layers}
        return axis_floor_terms(states, floor, mask)

    plain = terms(IDS, torch.ones_like(IDS), ANSWER)
    pads = torch.zeros(2, 5, dtype=IDS.dtype)
    together = (lambda pad, x: torch.cat([pad, x], 1)) if side == "left" else (lambda pad, x: torch.cat([x, pad], 1))
    padded = terms(together(pads, IDS), together(pads, torch.ones_like(IDS)), together(pads.bool(), ANSWER))
    assert padded.tokens == plain.tokens
    torch.testing.assert_close(padded.penalty, plain.penalty, atol=1e-4, rtol=1e-5)
    torch.testing.assert_close(padded.z_sum, plain.z_sum, atol=1e-4, rtol=1e-5)
    assert_same(gradients(model, padded.penalty), gradients(model, plain.penalty))


@pytest.mark.parametrize("architecture", ["llama", "qwen3"])
def test_packing_changes_nothing(architecture: str) -> None:
    """One row of both sequences, told apart by position_ids alone, as TRL's padding-free collator makes it."""
    floor = build_floor((1, 2), tau=2.0)
    model = adapted(architecture)
    controller = ActivationController.of(model)

    def penalty(mask: Tensor, **inputs: Tensor) -> Tensor:
        with controller.recording(floor.layers) as recording:
            model(**inputs, use_cache=False)
            states = {layer: recording.last(layer, with_grad=True) for layer in floor.layers}
        return axis_floor_loss(states, floor, mask)

    apart = penalty(ANSWER, input_ids=IDS)
    positions = torch.arange(12).repeat(2)[None]
    packed = penalty(ANSWER.reshape(1, -1), input_ids=IDS.reshape(1, -1), position_ids=positions)
    torch.testing.assert_close(packed, apart, atol=1e-5, rtol=1e-5)
    assert_same(gradients(model, packed), gradients(model, apart))
    # told apart by nothing they'd see each other: the check above can fail
    mixed = penalty(ANSWER.reshape(1, -1), input_ids=IDS.reshape(1, -1), position_ids=torch.arange(24)[None])
    assert not torch.allclose(mixed, apart, atol=1e-3)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_bf16_autocast(architecture: str) -> None:
    """bfloat16 has 8 bits, so gradients agree to a few per cent of the largest; the penalty itself is taken in float32."""
    floor = build_floor((1, 2), tau=2.0)
    wanted = reference(adapted(architecture), floor)
    model = adapted(architecture)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = ours(model, floor)
    assert all(gradient.dtype == torch.float32 for gradient in found.values())
    assert_same(found, wanted, tolerance=0.06)


def test_projection_inside_autocast_is_not_rounded() -> None:
    """At p = 300 and sigma 1 a bfloat16 projection would be off by up to a whole sigma."""
    floor = Floor((0,), torch.eye(HIDDEN)[:1], torch.tensor([300.7]), torch.ones(1))
    state = torch.full((1, 4, HIDDEN), 300.0)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        terms = axis_floor_terms([state], floor, torch.ones(1, 4))
        anchor = axis_anchor_terms({0: state}, torch.full((1, 1, 4), 300.7), floor, torch.ones(1, 4))
        read = projections({0: state + 0.3}, floor)
    assert terms.penalty.item() == pytest.approx(4 * 0.7**2, rel=1e-3)
    assert anchor.item() == pytest.approx(4 * 0.7**2, rel=1e-3)
    assert math.isclose(float(read[0, 0, 0]), 300.3, rel_tol=1e-6)


def test_gradient_of_the_anchor_equals_plain_autograd() -> None:
    floor = build_floor((1, 3))  # the last layer too
    model = adapted("llama")
    controller = ActivationController.of(model)
    with torch.no_grad(), model.disable_adapter(), controller.recording(floor.layers) as recording:
        model(input_ids=IDS)
        base = projections({layer: recording.last(layer) for layer in floor.layers}, floor)
    with controller.recording(floor.layers) as recording:
        model(input_ids=IDS)
        found = axis_anchor_terms({layer: recording.last(layer) for layer in floor.layers}, base, floor, ANSWER)
    found_gradients = gradients(model, found)

    decoder_layers = model.base_model.model.model.layers
    seen: dict[int, Tensor] = {}
    handles = [
        decoder_layers[layer].register_forward_hook(lambda m, a, out, layer=layer: seen.__setitem__(layer, out))
        for layer in floor.layers
    ]
    model(input_ids=IDS)
    for handle in handles:
        handle.remove()
    total = sum(
        ((seen[layer] @ floor.directions[i] - base[i])[ANSWER] ** 2).sum() for i, layer in enumerate(floor.layers)
    )
    assert_same(found_gradients, gradients(model, torch.as_tensor(total) / 2))
