"""Every answer of the evaluation with its scores, so that whoever reads the report can look behind a figure."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from trimtab.eval.answers.arms import Answers, Item
from trimtab.eval.answers.evaluation import Evaluation
from trimtab.eval.measures.suite import Measure, Suite
from trimtab.eval.schema import AnswerRow, ScoredAnswer
from trimtab.recipes import data

DIGITS = 3


def measure(evaluation: Evaluation) -> Suite:
    """Answers under roles, of the default Assistant, to benign requests, under benign system prompts, and in conversations."""
    kinds = data.role_kinds()
    rows = _rows(
        evaluation, "roles", evaluation.roles, evaluation.on_roles, [kinds[i.cluster] for i in evaluation.roles]
    )
    rows += _rows(
        evaluation, "default", evaluation.defaults, evaluation.on_default, ["default"] * len(evaluation.defaults)
    )
    rows += _rows(evaluation, "benign", evaluation.benign, evaluation.on_benign, ["benign"] * len(evaluation.benign))
    items, systems = evaluation.benign_systems
    if items:
        kinds_of_system = [row.kind for row in systems]
        rows += _rows(evaluation, "benign_systems", items, evaluation.on_benign_systems, kinds_of_system)
    talks, played = evaluation.talks, evaluation.on_talks
    for turn in range(len(played["base"]) if played else 0):
        answers = {arm: turns[turn] for arm, turns in played.items()}
        going = [k for k, prompt in enumerate(answers["base"].prompts) if prompt]
        items = [Item(talks[k].id, talks[k].id, answers["base"].prompts[k]) for k in going]
        domains = [talks[k].domain or "of your file" for k in going]
        rows += _rows(evaluation, "conversations", items, answers, domains, turn=turn + 1, places=going)
    return Suite(answers=rows)


def _rows(
    evaluation: Evaluation,
    suite: str,
    items: Sequence[Item],
    answers: Mapping[str, Answers],
    kinds: Sequence[str],
    *,
    turn: int = 1,
    places: Sequence[int] | None = None,
) -> list[AnswerRow]:
    second = evaluation.second_reader
    persona = evaluation.persona(answers)
    other = evaluation.persona(answers, second) if second is not None else None
    relevance = evaluation.relevance(answers) if suite != "conversations" else {}
    z = {arm: evaluation.ruler.z(given.means) for arm, given in answers.items()}
    where = range(len(items)) if places is None else places
    found = []
    for item, kind, place in zip(items, kinds, where, strict=True):
        system = "\n\n".join(m["content"] for m in item.prompt if m["role"] in ("system", "developer") and m["content"])
        said = {
            arm: ScoredAnswer(
                text=given.texts[place],
                persona=_known(persona[arm][place]),
                other_reader=_known(other[arm][place]) if other else None,
                relevance=_known(relevance[arm][place]) if arm in relevance else None,
                z=_known(z[arm][place]),
            )
            for arm, given in answers.items()
        }
        row = AnswerRow(
            id=item.id,
            suite=suite,
            kind=kind,
            cluster=item.cluster,
            turn=turn,
            system=system,
            question=item.question,
            answers=said,
        )
        found.append(row)
    return found


def _known(value: float) -> float | None:
    return None if value != value else round(value, DIGITS)


MEASURE = Measure(measure)
