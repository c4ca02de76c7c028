"""Faults of a recipe: all of them together, each with its place and its remedy."""

from __future__ import annotations

import contextlib
import difflib
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

from trimtab.axis.errors import UserError


@dataclass(frozen=True)
class Fault:
    """One fault.

    Attributes:
        fault: what is wrong.
        remedy: what to do about it.
        key: dotted key, such as ``train.learning_rate``; "" where no key is at fault.
        file: the file, or ``command line`` for an override.
        line: line in the file, from 1, where it is known.
    """

    fault: str
    remedy: str
    key: str = ""
    file: str = ""
    line: int | None = None

    @property
    def place(self) -> str:
        """File, line and key, as far as they are known."""
        where = f"{self.file}:{self.line}" if self.line is not None else self.file
        return ": ".join(part for part in (where, self.key) if part)

    def __str__(self) -> str:
        place = f"{self.place}: " if self.place else ""
        return f"{place}{self.fault}\n  remedy: {self.remedy}"


class RecipeError(UserError):
    """Every fault of a recipe at once, in :attr:`faults`."""

    def __init__(self, faults: Sequence[Fault]) -> None:
        assert faults, "a RecipeError needs at least one fault"
        self.faults = list(faults)
        first = self.faults[0]
        super().__init__(first.fault, remedy=first.remedy, file=first.file or None, key=first.key or None)
        if len(self.faults) == 1:
            self.args = (str(first),)
        else:
            listed = "\n".join(f"{number}. {fault}" for number, fault in enumerate(self.faults, start=1))
            self.args = (f"the recipe has {len(self.faults)} faults:\n{listed}",)


class Findings:
    """Faults of checks that don't depend on each other: each check is run, and all that they find is told at once."""

    def __init__(self) -> None:
        self.faults: list[Fault] = []

    @contextlib.contextmanager
    def of_a_check(self) -> Iterator[None]:
        """Take the faults that a check raises; what comes after it in the block is left out."""
        try:
            yield
        except RecipeError as error:
            self.add(error.faults)
        except UserError as error:
            self.add([Fault(error.fault, error.remedy, error.key or "", error.file or "")])

    def add(self, faults: Sequence[Fault]) -> None:
        """Take faults that were not told already."""
        for fault in faults:
            if not any(fault.fault == told.fault and nested(fault.key, told.key) for told in self.faults):
                self.faults.append(fault)

    def tell(self) -> None:
        """Raise what was found, if anything was.

        Raises:
            RecipeError: with every fault.
        """
        if self.faults:
            raise RecipeError(self.faults)


def nested(key: str, other: str) -> bool:
    """Whether two dotted keys are one, or one lies in the other."""
    return f"{key}.".startswith(f"{other}.") or f"{other}.".startswith(f"{key}.")


def did_you_mean(word: str, known: Iterable[str], otherwise: str) -> str:
    """A remedy that names the likeliest known word, or ``otherwise``."""
    close = difflib.get_close_matches(word, list(known), n=1, cutoff=0.6)
    return f"did you mean {close[0]!r}?" if close else otherwise
