"""What may change, and by how much at most: changes of the tuned model beside the cap's own, and the claims that rest on them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from trimtab.eval import ids
from trimtab.eval.answers.arms import CONTROL
from trimtab.eval.grading import Light, too_few, worst
from trimtab.eval.measures.suite import EffectValues
from trimtab.eval.schema import Claim, SideEffect
from trimtab.eval.wording import estimate_text, inline_name, number

RULE = "Green: the whole interval lies within the limit. Amber: the value does. Red: it does not."


SIDES = {
    "tuned": ("", ""),
    "base+cap": (ids.OF_THE_CAP, ": the cap itself"),
    CONTROL: (ids.OF_THE_CONTROL, " (control)"),
}


def changes(
    identifier: str,
    name: str,
    meaning: str,
    clusters: Sequence[str],
    values: Mapping[str, Sequence[float]],
    limit: float,
    *,
    crossed: Sequence[str] | None = None,
    control: bool = False,
) -> list[EffectValues]:
    """How much more of something bad there is than in the base: in the tuned model, which is limited, and under the cap.

    Args:
        identifier: of the tuned model's; the cap's and the control's are told by their endings.
        name: for people.
        meaning: what the share is of; "minus the base's" is added.
        clusters: of each item.
        values: arm -> 1 for each item where it is so, else 0.
        limit: by how much it may be more.
        crossed: as of :class:`~trimtab.eval.measures.suite.EffectValues`.
        control: give the control's as well, where there is one.
    """
    arms = [arm for arm in SIDES if arm in values and (control or arm != CONTROL)]
    return [
        EffectValues(
            f"{identifier}{SIDES[arm][0]}", f"{name}{SIDES[arm][1]}", "share", f"{meaning}; minus the base's.",
            clusters, [one - other for one, other in zip(values[arm], values["base"], strict=True)],
            limit if arm == "tuned" else None, one_sided=True, crossed=crossed,
        )
        for arm in arms
    ]  # fmt: skip


def within(identifier: str, name: str, effects: Sequence[SideEffect | None]) -> Claim:
    """The claim that effects stay within their limits, by their whole intervals; not measured where one of them is missing."""
    judged = [(effect, effect.limit) for effect in effects if effect is not None and effect.limit is not None]
    lights: list[Light] = []
    for effect, limit in judged:
        e = effect.estimate
        farthest = e.high if effect.one_sided else max(abs(e.low), abs(e.high))
        value = e.value if effect.one_sided else abs(e.value)
        lights.append("green" if farthest <= limit else "amber" if value <= limit else "red")
    if any(too_few(effect.by_cluster) for effect, _ in judged):
        lights = []
    said = "; ".join(
        f"{inline_name(effect.name)} {estimate_text(effect.estimate)} {effect.unit}, limit {number(limit)}"
        for effect, limit in judged
    )
    says = f"{said[:1].upper()}{said[1:]}." if said else "Not measured."
    measured = bool(judged) and len(judged) == len(effects)
    return Claim(id=identifier, name=name, light=worst(lights), says=says, rule=RULE, decides=True, measured=measured)
