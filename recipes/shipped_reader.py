"""A reader fitted on the texts that ship: what an evaluation and a reward of training share.

The texts are those of :func:`trimtab.recipes.data.reader_texts`. So the reader depends on the model that reads and on nothing
that is measured or trained with it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor

from trimtab.axis.chat_format import ChatFormat
from trimtab.axis.hooks import ActivationController
from trimtab.axis.reader import Reader, fit_reader, layers_to_read, left_out_scores, read_states, rows_to_read
from trimtab.recipes.data import KnownText


def read_known(
    model: Any,
    tokenizer: Any,
    form: ChatFormat | None,
    texts: Sequence[KnownText],
    *,
    title: str,
    most: Callable[[int], int] = int,
) -> tuple[tuple[int, ...], Tensor]:
    """The layers that a model is read at, and its states there on each text, [n, L, D].

    Args:
        model: the frozen model that reads, as it is now: switch adapters and caps outside.
        tokenizer: its tokenizer.
        form: its chat format; None for a model without one.
        texts: the texts.
        title: label of the progress bar.
        most: as of :func:`~trimtab.axis.sampling.batches_on_all_ranks`.
    """
    layers = layers_to_read(ActivationController.of(model).n_layers)
    given = rows_to_read(tokenizer, form, [text.question for text in texts], [text.answer for text in texts])
    return layers, read_states(model, tokenizer, given, layers, title=title, most=most)


def fit_known(texts: Sequence[KnownText], states: Tensor, layers: Sequence[int]) -> tuple[Reader, list[float]]:
    """The reader fitted on texts whose speaker is known, and the score of each by probes that had not seen its question.

    Args:
        texts: the texts.
        states: of each, from :func:`read_known`.
        layers: that were read.
    """
    personas, groups = [text.speaker == "persona" for text in texts], [text.question for text in texts]
    left_out = left_out_scores(states, personas, groups)
    return fit_reader(states, personas, left_out, layers), left_out.tolist()
