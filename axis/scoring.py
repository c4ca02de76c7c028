"""Text-only scores: log-probabilities of given answers under given prompts, and the persona log-likelihood ratio.

    LLR(y) = [ log p(y | role prompt, q) - log p(y | default prompt, q) ] / |y|        nat a token

scored by the frozen base, uncapped, so that it sees text alone and never the tuned model's activations. Positive = the text
is better explained by the role, negative = by the default Assistant.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from trimtab.axis.chat_format import ChatFormat, Message
from trimtab.axis.given import Given
from trimtab.axis.sampling import pad_left
from trimtab.axis.soundness import not_finite

SCORE_BATCH = 16  # answers a forward


def answer_logprobs(
    model: Any,
    form: ChatFormat,
    prompts: Sequence[Sequence[Message]],
    answers: Sequence[str],
    *,
    batch_size: int = SCORE_BATCH,
    title: str = "scoring",
    most: Callable[[int], int] = int,
) -> list[float]:
    """Summed log-probability of each answer's tokens after its prompt, in nat; 0 for an empty answer.

    Args:
        model: scored as it is now: switch adapters and caps outside.
        form: chat format.
        prompts: messages up to the answer, one list an answer.
        answers: texts.
        batch_size: rows a forward.
        title: label of the progress bar.
        most: as of :func:`~trimtab.axis.sampling.batches_on_all_ranks`.

    Raises:
        UserError: at the first batch whose log-probabilities are not numbers.
    """
    given = Given.of(form, prompts, answers)
    return given_logprobs(model, form, given, batch_size=batch_size, title=title, most=most)


@torch.no_grad()
def given_logprobs(
    model: Any,
    form: ChatFormat,
    given: Given,
    *,
    batch_size: int = SCORE_BATCH,
    title: str = "scoring",
    most: Callable[[int], int] = int,
) -> list[float]:
    """:func:`answer_logprobs` of answers that are token rows already.

    Args:
        model: scored as it is now: switch adapters and caps outside.
        form: chat format.
        given: the answers.
        batch_size: rows a forward.
        title: label of the progress bar.
        most: as of :func:`~trimtab.axis.sampling.batches_on_all_ranks`.
    """
    device = next(model.parameters()).device
    tokenizer: Any = form.tokenizer
    sums = [0.0] * len(given)
    for batch in given.batches(batch_size, title, most):
        ids, attention = pad_left(given.rows(batch) or [[form.end_token]], tokenizer.pad_token_id, device)
        counts = given.counts(batch)
        logits = model(input_ids=ids, attention_mask=attention, logits_to_keep=max(counts, default=0) + 1).logits
        found = [_chosen(logits[row, -n - 1 : -1], ids[row, -n:]).sum() for row, n in enumerate(counts)]
        for i, value in zip(batch, torch.stack(found).tolist() if found else [], strict=True):
            if math.isnan(value):
                raise not_finite(model, ids, attention)
            sums[i] = value
    return sums


def _chosen(logits: Tensor, targets: Tensor) -> Tensor:
    return torch.log_softmax(logits.float(), -1).gather(-1, targets[:, None])[:, 0]


def persona_llr(
    model: Any,
    form: ChatFormat,
    role_prompts: Sequence[Sequence[Message]],
    default_prompts: Sequence[Sequence[Message]],
    answers: Sequence[str],
    *,
    batch_size: int = SCORE_BATCH,
    title: str = "persona log-likelihood ratio",
    most: Callable[[int], int] = int,
) -> list[float]:
    """Persona log-likelihood ratio of each answer, nat a token; NaN for an empty answer.

    Args:
        model: the frozen base, adapter off, cap off.
        form: chat format.
        role_prompts: prompts with the role, one an answer.
        default_prompts: the same questions with the default prompt.
        answers: texts.
        batch_size: rows a forward.
        title: label of the progress bar.
        most: as of :func:`~trimtab.axis.sampling.batches_on_all_ranks`.
    """
    both = answer_logprobs(
        model, form, [*role_prompts, *default_prompts], [*answers, *answers],
        batch_size=batch_size, title=title, most=most,
    )  # fmt: skip
    counts = [len(form.answer_ids(answer)) for answer in answers]
    size = len(answers)
    return [(both[i] - both[size + i]) / counts[i] if counts[i] else float("nan") for i in range(size)]


def relevance(
    model: Any,
    form: ChatFormat,
    questions: Sequence[str],
    answers: Sequence[str],
    others: Sequence[Sequence[str]],
    *,
    batch_size: int = SCORE_BATCH,
    title: str = "relevance",
    most: Callable[[int], int] = int,
) -> list[float]:
    """How much likelier each answer is after its own question than after the likeliest of other questions, nat a token.

        r(y) = [ log p(y | q) - max_k log p(y | q_k) ] / |y|

    A text that would do for any question lies about 0 or below: a stock phrase, a refusal that names nothing, noise. NaN for an
    empty answer.

    Args:
        model: the frozen base, adapter off, cap off.
        form: chat format.
        questions: the user's last message before each answer.
        answers: texts.
        others: other questions, one list of one or more an answer.
        batch_size: rows a forward.
        title: label of the progress bar.
        most: as of :func:`~trimtab.axis.sampling.batches_on_all_ranks`.
    """
    asked = [[own, *rest] for own, rest in zip(questions, others, strict=True)]
    prompts = {q: form.prompt_ids([{"role": "user", "content": q}]) for row in asked for q in row}
    ids = [form.answer_ids(answer) for answer in answers]
    given = Given(
        [prompts[question] for row in asked for question in row],
        [answer for answer, row in zip(ids, asked, strict=True) for _ in row],
    )
    sums = iter(given_logprobs(model, form, given, batch_size=batch_size, title=title, most=most))
    found = []
    for answer, row in zip(ids, asked, strict=True):
        own, *rest = (next(sums) for _ in row)
        found.append((own - max(rest)) / len(answer) if answer else float("nan"))
    return found
