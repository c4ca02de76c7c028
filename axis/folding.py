"""The form in which a chat template takes messages: all of them in its rendering, once and in their order.

An order of roles is tried with probes in the messages' places. What a template does not take as it is, an instruction of a role
that it does not know or in a place where it has none, becomes part of a message that it takes.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence

from trimtab.axis.errors import UserError
from trimtab.axis.template import ChatTemplate, probes

INSTRUCTIONS = ("system", "developer")  # roles that speak to the model before the user does

# One message as the template takes it: its role, and the places of the given messages that it is made of.
Part = tuple[str, tuple[int, ...]]


class NoPlace(UserError):
    """There is no turn that an instruction could become a part of."""


def find_parts(template: ChatTemplate, roles: Sequence[str]) -> list[Part]:
    """The first form that is rendered whole, rather one that still is once the conversation has gone on.

    An older template of Mistral puts the system prompt before the last user turn: it would wander from turn to turn.

    Raises:
        UserError: if there is none; it says which message is at fault, in most of the forms.
    """
    forms: list[Callable[[Sequence[str]], list[Part]]] = [_as_they_are]
    if any(role in INSTRUCTIONS for role in roles):
        forms += [_developers_as_system, _one_system, _no_system]
    further = [*roles, "assistant", "user"] if roles and roles[-1] == "user" else roles
    faults: list[UserError] = []
    whole: list[list[Part]] = []
    for form in forms:
        try:
            parts = form(roles)
            _check(template, parts)
            whole.append(parts)
            _check(template, form(further))
            return parts
        except UserError as error:
            faults.append(error)
    if whole:
        return whole[0]
    by_what = {str(fault): fault for fault in reversed(faults)}
    usual = statistics.mode(map(str, faults))
    raise next((fault for fault in faults if isinstance(fault, NoPlace)), by_what[usual])


def _check(template: ChatTemplate, parts: Sequence[Part]) -> None:
    places = [(role, place) for role, members in parts for place in members]
    words = probes(len(places))
    messages = [{"role": role, "content": "\n\n".join(words[place] for place in members)} for role, members in parts]
    text = template.render(messages, generation=parts[-1][0] != "assistant")
    before = 0
    for role, place in places:
        times, found = text.count(words[place]), text.find(words[place])
        fault = "leaves out" if not times else "repeats" if times > 1 else "moves" if found < before else ""
        if fault:
            raise UserError(
                f"{template.name} {fault} message {place + 1} ({role})",
                remedy="leave such messages out, give the conversation as the template takes it, or mend the template",
            )
        before = found


def _as_they_are(roles: Sequence[str]) -> list[Part]:
    return [(role, (place,)) for place, role in enumerate(roles)]


def _developers_as_system(roles: Sequence[str]) -> list[Part]:
    return [("system" if role in INSTRUCTIONS else role, members) for role, members in _as_they_are(roles)]


def _one_system(roles: Sequence[str]) -> list[Part]:
    """What stands at the beginning is one system message; what comes later is part of the user's turn."""
    first = next((place for place, role in enumerate(roles) if role not in INSTRUCTIONS), len(roles))
    head: list[Part] = [("system", tuple(range(first)))] if first else []
    return head + _into_users(_as_they_are(roles)[first:])


def _no_system(roles: Sequence[str]) -> list[Part]:
    return _into_users(_as_they_are(roles))


def _into_users(parts: Sequence[Part]) -> list[Part]:
    """Instructions before the user turn that follows them; or after the one that they follow, where an answer comes next."""
    made: list[Part] = []
    waiting: tuple[int, ...] = ()
    for role, members in [*parts, ("", ())]:
        if role in INSTRUCTIONS:
            waiting += members
            continue
        if waiting and role == "user":
            members, waiting = (*waiting, *members), ()
        elif waiting:
            if not made or made[-1][0] != "user":
                raise NoPlace("a chat must go on with a user turn after the system prompt", remedy="mend the messages")
            made[-1], waiting = ("user", (*made[-1][1], *waiting)), ()
        if role:
            made.append((role, members))
    return made
