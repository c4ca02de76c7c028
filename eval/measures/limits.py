"""Claims that rest on limits: what may change, and by how much at most."""

from __future__ import annotations

from collections.abc import Sequence

from trimtab.eval.grading import Light, too_few, worst
from trimtab.eval.schema import Claim, SideEffect
from trimtab.eval.wording import estimate_text, inline_name, number

RULE = "Green: the whole interval lies within the limit. Amber: the value does. Red: it does not."


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
