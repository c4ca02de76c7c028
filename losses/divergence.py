"""Divergences between the next-token distributions of a student and a teacher, and the same without ever holding all logits.

Shapes: M tokens, V vocabulary, D hidden size, K kept vocabulary entries.

With S the student's and T the teacher's distribution:

    forward_kl   KL(T || S)       covers what the teacher may say
    reverse_kl   KL(S || T)       the student keeps to what the teacher would say
    jsd          b KL(T || Q) + (1 - b) KL(S || Q),  Q = b T + (1 - b) S       (generalised Jensen-Shannon, GKD, arXiv 2306.13649)

A logit of -inf is a probability of 0: where p is 0, p log(p/q) is 0 whatever q is, and has no gradient; where q alone is 0, a
divergence is infinite, but for the JSD, whose mixture is 0 only where both are.

``top_k`` compares the teacher's K likeliest tokens and, as one further outcome, all others together. That is a divergence of its
own, never larger than the full one (merging outcomes cannot add information), and 0 where the two agree.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, Literal

import torch
from torch import Tensor

Kind = Literal["forward_kl", "reverse_kl", "jsd"]
Head = Callable[[Tensor], Tensor]

CHUNK = 256  # tokens whose logits are in memory at a time


def divergence_terms(
    student_logits: Tensor,
    teacher_logits: Tensor,
    kind: Kind = "forward_kl",
    *,
    jsd_beta: float = 0.5,
    top_k: int | None = None,
) -> Tensor:
    """Divergence per token, [M], float32, in nat.

    Args:
        student_logits: [M, V], with gradient.
        teacher_logits: [M, V], the reference.
        kind: which divergence.
        jsd_beta: weight b of the teacher in the mixture, between 0 and 1; ``jsd`` alone uses it.
        top_k: compare the teacher's K likeliest tokens and the rest as one; None compares all.
    """
    student = torch.log_softmax(student_logits.float(), dim=-1)
    teacher = torch.log_softmax(teacher_logits.float(), dim=-1)
    if top_k is not None and top_k < teacher.shape[-1]:
        kept = teacher.topk(top_k, dim=-1).indices
        student, teacher = _kept_and_rest(student, kept), _kept_and_rest(teacher, kept)
    if kind == "forward_kl":
        return _kl(teacher, student)
    if kind == "reverse_kl":
        return _kl(student, teacher)
    mixture = _mixture(teacher, student, jsd_beta)
    return jsd_beta * _kl(teacher, mixture) + (1 - jsd_beta) * _kl(student, mixture)


def _kl(p: Tensor, q: Tensor) -> Tensor:
    """KL(p || q) of log-probabilities, [M]."""
    ratio = (p - q).masked_fill(p == float("-inf"), 0.0)
    return (p.exp() * ratio).sum(-1)


def _mixture(teacher: Tensor, student: Tensor, beta: float) -> Tensor:
    """Log-probabilities of ``beta T + (1 - beta) S``."""
    never = (teacher == float("-inf")) & (student == float("-inf"))
    # filled beforehand: where both are -inf, the gradient of their sum is NaN, whatever becomes of the sum
    one, other = (part.masked_fill(never, 0.0) for part in (teacher, student))
    return torch.logaddexp(one + math.log(beta), other + math.log1p(-beta)).masked_fill(never, float("-inf"))


def _kept_and_rest(logprobs: Tensor, kept: Tensor) -> Tensor:
    """Log-probabilities [M, V] -> those of the K kept tokens [M, K] and of all others together, [M, K + 1]."""
    # summed over the others: 1 minus the sum of the K would be lost to cancellation where they hold nearly all
    others = logprobs.scatter(-1, kept, float("-inf"))
    never = (others == float("-inf")).all(-1, keepdim=True)
    rest = others.masked_fill(never, 0.0).logsumexp(-1, keepdim=True).masked_fill(never, float("-inf"))
    return torch.cat([logprobs.gather(-1, kept), rest], dim=-1)


def chunked_divergence(
    student_hidden: Tensor,
    teacher_hidden: Tensor,
    head: Head,
    kind: Kind = "forward_kl",
    *,
    jsd_beta: float = 0.5,
    top_k: int | None = None,
    chunk: int = CHUNK,
) -> Tensor:
    """Sum over tokens of the divergence, from final hidden states; never more than one [chunk, V] piece of logits in memory.

    The gradient with respect to the hidden states is worked out piece by piece in the forward, while each piece's logits are
    there, and only scaled in the backward: the head is not run again, and its weights, which may be gathered from shards for
    the forward alone, are not needed then. The head itself gets no gradient.

    Args:
        student_hidden: [M, D], with gradient.
        teacher_hidden: [M, D], without.
        head: hidden [m, D] -> logits [m, V].
        kind: which divergence: see :func:`divergence_terms`.
        jsd_beta: weight b of the teacher in the mixture, between 0 and 1; ``jsd`` alone uses it.
        top_k: compare the teacher's K likeliest tokens and the rest as one; None compares all.
        chunk: tokens a piece.
    """
    total: Tensor = _ChunkedDivergence.apply(  # type: ignore[no-untyped-call]
        student_hidden, teacher_hidden.detach(), head, kind, jsd_beta, top_k, chunk
    )
    return total


class _ChunkedDivergence(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        student: Tensor,
        teacher: Tensor,
        head: Head,
        kind: Kind,
        jsd_beta: float,
        top_k: int | None,
        chunk: int,
    ) -> Tensor:
        wanted = ctx.needs_input_grad[0]
        gradient = torch.zeros_like(student) if wanted else None
        total = student.new_zeros((), dtype=torch.float32)
        for start in range(0, student.shape[0], chunk):
            piece = slice(start, start + chunk)
            with torch.no_grad():
                reference = head(teacher[piece])
            with torch.set_grad_enabled(wanted):
                leaf = student[piece].detach().requires_grad_(wanted)
                value = divergence_terms(head(leaf), reference, kind, jsd_beta=jsd_beta, top_k=top_k).sum()
                if gradient is not None:
                    gradient[piece] = torch.autograd.grad(value, leaf)[0]
            total += value.detach()
        if gradient is not None:
            ctx.save_for_backward(gradient)
        return total

    @staticmethod
    def backward(ctx: Any, *outputs: Any) -> Any:
        (gradient,) = ctx.saved_tensors
        # in float32: the factor is a weight over a token count, and bfloat16 would round it
        return (gradient.float() * outputs[0]).to(gradient.dtype), None, None, None, None, None, None
