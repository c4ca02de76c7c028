"""Answers that stand already, as token rows, gone through in batches of like length."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

from trimtab.axis.chat_format import ChatFormat, Message
from trimtab.axis.progress import progress_bar
from trimtab.axis.sampling import batches_on_all_ranks


@dataclass(frozen=True)
class Given:
    """Token ids of answers that are read, not sampled.

    Attributes:
        prompts: ids before each answer.
        answers: ids of each answer; an empty one has none.
    """

    prompts: Sequence[Sequence[int]]
    answers: Sequence[Sequence[int]]

    @classmethod
    def of(cls, form: ChatFormat, prompts: Sequence[Sequence[Message]], texts: Sequence[str]) -> Given:
        """Answers as texts, each with the messages before it."""
        return cls([form.prompt_ids(prompt) for prompt in prompts], [form.answer_ids(text) for text in texts])

    def __len__(self) -> int:
        return len(self.answers)

    def rows(self, places: Sequence[int]) -> list[list[int]]:
        """Prompt and answer of these places."""
        return [[*self.prompts[i], *self.answers[i]] for i in places]

    def counts(self, places: Sequence[int]) -> list[int]:
        """Tokens of the answers of these places."""
        return [len(self.answers[i]) for i in places]

    def batches(self, batch_size: int, title: str, most: Callable[[int], int] = int) -> Iterator[list[int]]:
        """Places of the answers that have a token, in batches of like length, with a progress bar.

        Args:
            batch_size: rows a batch.
            title: label of the bar.
            most: as of :func:`~trimtab.axis.sampling.batches_on_all_ranks`, which may add empty batches.
        """
        there = [i for i, answer in enumerate(self.answers) if answer]
        lengths = [len(self.prompts[i]) + len(self.answers[i]) for i in there]
        with progress_bar(title, len(there)) as bar:
            for batch in batches_on_all_ranks(lengths, batch_size, most):
                yield [there[k] for k in batch]
                bar.advance(len(batch))
