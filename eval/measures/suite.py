"""What a measure is, and the suite that it returns: all that the report will say of it.

A measure is one file of :mod:`trimtab.eval.measures` that ends with ``MEASURE = Measure(...)``, and one line in
:data:`trimtab.eval.measures.ORDER`. It gives values by arm. Effects, retention, intervals and corrections are worked out
from them in :mod:`trimtab.eval.report.assemble`.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, fields
from typing import TYPE_CHECKING, Any, Literal

from trimtab.axis.replies import Missing
from trimtab.eval.schema import (
    AnswerRow,
    Capability,
    Claim,
    Durability,
    Estimate,
    Metric,
    RateTable,
    Rerouting,
    SideEffect,
    Trajectory,
    Transcript,
)

if TYPE_CHECKING:
    from trimtab.axis.chat_format import Message
    from trimtab.eval.answers.evaluation import Evaluation
    from trimtab.recipes.schema import EvalSection


@dataclass(frozen=True)
class MetricValues:
    """One metric: values by arm, one an answer, NaN where there is none.

    Attributes:
        id: stable name.
        name: for people.
        unit: such as ``nat/token``.
        meaning: one sentence on what is measured, on which text.
        toward: whether more or less of it means more Assistant.
        clusters: of each answer, for the bootstrap.
        values: arm -> values.
        quality: of the metric itself, such as its AUC.
        primary: whether the verdict is about it.
        anchor: the base's default Assistant's own level.
        crossed: question of each answer, where several clusters are asked the same: it is resampled too.
    """

    id: str
    name: str
    unit: str
    meaning: str
    toward: Literal["higher", "lower"]
    clusters: Sequence[str]
    values: Mapping[str, Sequence[float]]
    quality: Mapping[str, Estimate] = field(default_factory=dict)
    primary: bool = False
    anchor: Estimate | None = None
    crossed: Sequence[str] | None = None


@dataclass(frozen=True)
class EffectValues:
    """One side effect: its values, one an item, NaN where there is none; ``limit`` is what it may come to.

    ``one_sided``: only more of it is harm. ``crossed`` is as that of :class:`MetricValues`.
    """

    id: str
    name: str
    unit: str
    meaning: str
    clusters: Sequence[str]
    values: Sequence[float]
    limit: float | None = None
    one_sided: bool = False
    crossed: Sequence[str] | None = None


@dataclass(frozen=True)
class Unscored:
    """A prompt that the judge was asked and gave no score for, with the highest score that it may give."""

    prompt: str
    highest: int
    why: Missing


@dataclass
class Suite:
    """What a measure found; most measures have a few of these.

    Attributes:
        metrics: values whose retention the report gives.
        side_effects: values of what moved that should not.
        rates: side effects with intervals of their own, such as rates.
        tables: rates by class or category.
        capability: scores by task; their p-values are corrected when all are known.
        trajectories: z over the turns of conversations.
        prediction: arm -> R2 of an answer's position from the message before it.
        rerouting: where the persona went.
        durability: outcomes of durability runs.
        transcripts: texts to read.
        answers: every answer that was read.
        readers: which readers there were.
        axis_facts: for the report's part of that name.
        floor_facts: for the report's part of that name.
        warnings: what a reader has to know.
        unscored: what the judge is still to be asked.
    """

    metrics: list[MetricValues] = field(default_factory=list)
    side_effects: list[EffectValues] = field(default_factory=list)
    rates: list[SideEffect] = field(default_factory=list)
    tables: list[RateTable] = field(default_factory=list)
    capability: list[Capability] = field(default_factory=list)
    trajectories: list[Trajectory] = field(default_factory=list)
    prediction: dict[str, Estimate] = field(default_factory=dict)
    rerouting: list[Rerouting] = field(default_factory=list)
    durability: list[Durability] = field(default_factory=list)
    transcripts: list[Transcript] = field(default_factory=list)
    answers: list[AnswerRow] = field(default_factory=list)
    readers: list[dict[str, Any]] = field(default_factory=list)
    axis_facts: dict[str, Any] = field(default_factory=dict)
    floor_facts: dict[str, Any] = field(default_factory=dict)
    warnings: list[str] = field(default_factory=list)
    unscored: list[Unscored] = field(default_factory=list)

    def extend(self, other: Suite) -> None:
        """Take over what another measure found."""
        for part in fields(self):
            mine, its = getattr(self, part.name), getattr(other, part.name)
            if isinstance(mine, dict):
                mine.update(its)
            else:
                mine.extend(its)


@dataclass(frozen=True)
class Evidence:
    """What claims are made of: everything that was measured, with its intervals.

    ``names`` are those that a claim may ask for, measured or not; None takes any.
    """

    metrics: Sequence[Metric]
    side_effects: Sequence[SideEffect] = ()
    rerouting: Rerouting | None = None
    capability: Sequence[Capability] = ()
    durability: Sequence[Durability] = ()
    names: Collection[str] | None = None

    @property
    def primary(self) -> Metric | None:
        """The metric that the verdict is about; None where it was not measured."""
        return next((metric for metric in self.metrics if metric.primary), None)

    def metric(self, identifier: str) -> Metric | None:
        """A metric by its name; None where it was not measured.

        Raises:
            KeyError: if nothing is called so: of which :attr:`names` is the list.
        """
        self._refuse_unknown(identifier)
        return next((metric for metric in self.metrics if metric.id == identifier), None)

    def effect(self, identifier: str) -> SideEffect | None:
        """A side effect by its name, as :meth:`metric`."""
        self._refuse_unknown(identifier)
        return next((effect for effect in self.side_effects if effect.id == identifier), None)

    def _refuse_unknown(self, identifier: str) -> None:
        if self.names is not None and identifier not in self.names:
            raise KeyError(f"no metric and no side effect is called {identifier!r}")


ClaimRule = Callable[[Evidence], Claim]


@dataclass(frozen=True)
class Asked:
    """What every arm is asked for a measure.

    Attributes:
        before: messages before the first of these turns, of each conversation.
        turns: the user's turns, of each conversation; one where there is a single answer.
    """

    before: Sequence[Sequence[Message]]
    turns: Sequence[Sequence[str]]


def _nothing(section: EvalSection) -> Iterable[Asked]:  # noqa: ARG001
    return ()


@dataclass(frozen=True)
class Measure:
    """One thing that an evaluation asks.

    Attributes:
        measure: asks it.
        claims: rules of the claims that rest on it; a rule says so itself where nothing was measured.
        asks: what every arm is asked for it beyond what all measures share, for the plan of a recipe.
        names: of its metrics and side effects that its own claims ask for, and no other file.
    """

    measure: Callable[[Evaluation], Suite]
    claims: Sequence[ClaimRule] = ()
    asks: Callable[[EvalSection], Iterable[Asked]] = _nothing
    names: Sequence[str] = ()
