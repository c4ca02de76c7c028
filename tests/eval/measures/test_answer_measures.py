"""Measures that read answers, on a tiny model that answers and reads; and their arithmetic on answers that are given."""

from __future__ import annotations

import math
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from conftest import build_arms, build_tokenizer
from hand_made import ARMS, PLAIN, KnownReader, evaluation, given

from trimtab.axis.chat_format import ChatFormat, chat
from trimtab.axis.reader import Reader
from trimtab.axis.sampling import SamplingOptions
from trimtab.axis.scoring import answer_logprobs
from trimtab.eval import ids
from trimtab.eval.answers.arms import Answers, Item
from trimtab.eval.answers.evaluation import OTHERS, Evaluation
from trimtab.eval.answers.items import benign_system_items
from trimtab.eval.answers.readers import AnswerReader
from trimtab.eval.answers.refusing import refuses
from trimtab.eval.answers.sets import SETS
from trimtab.eval.intervals import clustered_rate
from trimtab.eval.measures import benign_systems, every_answer, on_topic, refusals, who_speaks
from trimtab.eval.measures.instruction_rules import follows
from trimtab.eval.measures.suite import EffectValues, Evidence, Measure, Suite
from trimtab.eval.report.assemble import effect_of
from trimtab.eval.schema import Claim
from trimtab.recipes import data
from trimtab.recipes.data import Conversation
from trimtab.recipes.schema import EvalSection

SIZE = {
    "roles": 6, "questions": 2, "conversations": 3, "turns": 2, "benign": 6, "benign_systems": 6, "lookalikes": 4,
    "transcripts": 3, "reextract_roles": 0, "bootstrap": 200,
}  # fmt: skip


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Evaluation:
    """A whole evaluation of a tiny model: it answers, and it is its own reader."""
    folder = tmp_path_factory.mktemp("answers")
    options = SamplingOptions(max_new_tokens=8, batch_size=32)
    arms = build_arms(ChatFormat(build_tokenizer()), folder / "eval", options, names=ARMS)
    section = EvalSection.model_validate(SIZE)
    run: Any = SimpleNamespace(recipe=SimpleNamespace(eval=section), held_out_axis_path=folder / "none")
    return Evaluation(run, arms, {"model": "tiny"})


def effects_of(suite: Suite) -> dict[str, EffectValues]:
    return {effect.id: effect for effect in suite.side_effects}


def tables_of(suite: Suite) -> dict[str, Any]:
    return {table.id: {row.label: row.arms for row in table.rows} for table in suite.tables}


def claim_of(measure: Measure, suite: Suite, identifier: str) -> Claim:
    effects = [found for given in suite.side_effects if (found := effect_of(given, 200, 0)) is not None]
    claims = [rule(Evidence([], effects)) for rule in measure.claims]
    return next(claim for claim in claims if claim.id == identifier)


# ---- on topic ----

LOOP = "I walk the halls. " * 12
OFF = "The question that you ask has many sides to it."  # likelier after another question


def test_off_the_question_is_what_another_question_explains_better_an_echo_or_no_answer() -> None:
    asked = evaluation({}).roles
    echo = f"You ask: {asked[3].question} Well."
    tuned = [OFF, LOOP, "", echo, *[PLAIN] * 8]
    made = evaluation(
        {"roles": {"base": [OFF, *[PLAIN] * 11], "base+cap": [PLAIN] * 12, "tuned": tuned}}, relevance={OFF: -0.1}
    )
    found = on_topic.off_topic(made, made.on_roles)
    assert found == {"base": [1.0, *[0.0] * 11], "base+cap": [0.0] * 12, "tuned": [1.0] * 4 + [0.0] * 8}
    suite = on_topic.measure(made)
    change = effects_of(suite)[ids.OFF_TOPIC]
    assert list(change.values) == [0.0, 1.0, 1.0, 1.0, *[0.0] * 8] and change.one_sided
    assert change.limit == on_topic.OFF_TOPIC_LIMIT and change.clusters == made.role_clusters
    cap = effects_of(suite)[f"{ids.OFF_TOPIC}{ids.OF_THE_CAP}"]
    assert list(cap.values) == [-1.0, *[0.0] * 11] and cap.limit is None
    rows = tables_of(suite)["off_topic"]
    assert list(rows) == [SETS[key] for key in ("roles", "default", "benign")]
    assert rows[SETS["roles"]]["tuned"] == clustered_rate([1.0] * 4 + [0.0] * 8, made.role_clusters)
    assert rows[SETS["benign"]]["tuned"].value == 0


def test_a_relevance_of_0_is_off_and_an_unknown_one_is_neither() -> None:
    made = evaluation({}, relevance={PLAIN: 0.0})
    assert on_topic.off_topic(made, made.on_benign)["base"] == [1.0] * 4
    unknown = evaluation({}, relevance={PLAIN: math.nan})
    assert all(math.isnan(value) for value in on_topic.off_topic(unknown, unknown.on_benign)["tuned"])


def test_unusable_answers_are_counted_in_each_set_by_itself() -> None:
    texts: dict[str, dict[str, list[str]]] = {
        "roles": {"base": [PLAIN] * 12, "base+cap": [PLAIN] * 12, "tuned": [LOOP, *[PLAIN] * 11]},
        "default": {"base": [PLAIN] * 6, "base+cap": [PLAIN] * 6, "tuned": ["", *[PLAIN] * 5]},
        "benign": {"base": [""] * 4, "base+cap": [PLAIN] * 4, "tuned": [PLAIN] * 4},
    }
    suite = on_topic.measure(evaluation(texts))
    effects = effects_of(suite)
    assert list(effects["unusable_rate"].values) == [1.0, *[0.0] * 11]
    assert list(effects["unusable_default_rate"].values) == [1.0, *[0.0] * 5]
    assert list(effects["unusable_benign_rate"].values) == [0.0] * 4
    assert all(effects[name].limit == on_topic.UNUSABLE_LIMIT for name in on_topic.UNUSABLE[:3])
    rows = tables_of(suite)["unusable"]
    assert rows[SETS["benign"]]["base"].value == 1 and rows[SETS["default"]]["tuned"].value == pytest.approx(1 / 6)
    # 1 of 12, diluted by the other sets, would be no more than 1 of 22
    assert claim_of(on_topic.MEASURE, suite, "usable").light == "red"


def test_one_sentence_for_everything_is_red_and_answers_are_green() -> None:
    base = {arm: [PLAIN] * 12 for arm in ("base", "base+cap")}
    bland = on_topic.measure(evaluation({"roles": {**base, "tuned": [OFF] * 12}}, relevance={OFF: -0.1}, benign=6))
    assert claim_of(on_topic.MEASURE, bland, "on_topic").light == "red"
    assert claim_of(on_topic.MEASURE, bland, "usable").light == "green"
    silent = on_topic.measure(evaluation({"roles": {**base, "tuned": [""] * 12}}, benign=6))
    assert claim_of(on_topic.MEASURE, silent, "usable").light == "red"
    good = on_topic.measure(evaluation({"roles": {**base, "tuned": [PLAIN] * 12}}, benign=6))
    assert claim_of(on_topic.MEASURE, good, "on_topic").light == "green"


def test_a_control_is_told_beside_and_not_judged() -> None:
    arms = {arm: [PLAIN] * 12 for arm in ARMS} | {"control": [OFF] * 12}
    suite = on_topic.measure(evaluation({"roles": arms}, relevance={OFF: -0.1}))
    control = effects_of(suite)[f"{ids.OFF_TOPIC}{ids.OF_THE_CONTROL}"]
    assert list(control.values) == [1.0] * 12 and control.limit is None


def test_an_evaluation_holds_each_answer_against_other_questions_of_its_set(tiny: Evaluation) -> None:
    found, answers = tiny.relevance(tiny.on_benign), tiny.on_benign["tuned"]
    pool = sorted({item.question for item in tiny.benign})
    form = tiny.arms.form
    for k in (0, 4):
        own, text = answers.questions[k], answers.texts[k]
        others = [pool[(pool.index(own) + 1 + step) % len(pool)] for step in range(OTHERS)]
        assert own not in others and len(set(others)) == OTHERS
        with tiny.arms.weights("base") as model:
            sums = answer_logprobs(model, form, [chat("", q) for q in (own, *others)], [text] * (1 + OTHERS))
        by_hand = (sums[0] - max(sums[1:])) / len(form.answer_ids(text))
        assert found["tuned"][k] == pytest.approx(by_hand, abs=1e-4)


def test_of_one_question_alone_relevance_is_unknown(tiny: Evaluation) -> None:
    item = tiny.benign[0]
    assert math.isnan(tiny.relevance({"base": given([item], ["Never said before."])})["base"][0])


# ---- refusals ----

NO = "I'm sorry, but I can't assist with that."


def with_answers(made: Evaluation, name: str, items: list[Item], texts: dict[str, list[str]]) -> Evaluation:
    """The evaluation, whose arms answer this set so, and are asked no other."""

    def answers(asked: str, of: list[Item]) -> dict[str, Answers]:
        assert not of or (asked == name and of == items)
        return {arm: given(items, row) for arm, row in texts.items()} if of else {}

    vars(made)["answers"] = answers
    return made


def test_refusals_of_lookalikes_are_not_diluted_by_what_is_easy() -> None:
    items = refusals.lookalike_items(4)
    benign = {"base": [PLAIN] * 4, "base+cap": [NO, *[PLAIN] * 3], "tuned": [NO, NO, PLAIN, PLAIN]}
    made = evaluation({"benign": benign}, lookalikes=4, benign_systems=0)
    alike = {"base": [NO, *[PLAIN] * 3], "base+cap": [NO, *[PLAIN] * 3], "tuned": [PLAIN, NO, NO, NO]}
    suite = refusals.measure(with_answers(made, "harmless", items, alike))
    effects = effects_of(suite)
    effect = effects["refused_lookalikes_change"]
    assert list(effect.values) == [-1.0, 1.0, 1.0, 1.0] and effect.one_sided and effect.limit == refusals.LIMIT
    assert effect.clusters == [item.cluster for item in items]
    assert list(effects["refused_benign_change"].values) == [1.0, 1.0, 0.0, 0.0]
    assert list(effects[f"refused_benign_change{ids.OF_THE_CAP}"].values) == [1.0, 0.0, 0.0, 0.0]
    assert list(effects["refused_change"].values) == [0.0] * 12, "under role prompts"
    rows = {label: arms["tuned"].value for label, arms in tables_of(suite)["refused"].items()}
    assert rows == {
        "of requests that look improper": 0.75, SETS["roles"]: 0, SETS["default"]: 0, SETS["benign"]: 0.5
    }  # fmt: skip


def test_refusals_under_role_prompts_are_red_by_themselves() -> None:
    roles = {arm: [PLAIN] * 12 for arm in ("base", "base+cap")} | {"tuned": [NO, *[PLAIN] * 2] * 4}
    suite = refusals.measure(
        with_answers(evaluation({"roles": roles}, lookalikes=0, benign_systems=0), "harmless", [], {})
    )
    assert list(effects_of(suite)["refused_change"].values) == [1.0, 0.0, 0.0] * 4
    assert claim_of(refusals.MEASURE, suite, "refusals").light == "red"


def test_without_lookalikes_the_claim_is_not_measured() -> None:
    suite = refusals.measure(with_answers(evaluation({}, lookalikes=0, benign_systems=0), "harmless", [], {}))
    assert list(tables_of(suite)["refused"]) == [SETS[key] for key in ("roles", "default", "benign")]
    assert not claim_of(refusals.MEASURE, suite, "refusals").measured
    assert next(iter(refusals.asks(EvalSection.model_validate({"lookalikes": 0})))).turns == []


def test_refusals_under_benign_system_prompts_count_too() -> None:
    made = evaluation({}, lookalikes=0, benign_systems=6)
    items, _ = benign_system_items(made.section)
    texts = {"base": [PLAIN] * 6, "base+cap": [PLAIN] * 6, "tuned": [NO] * 6}
    suite = refusals.measure(with_answers(made, "benign_systems", items, texts))
    assert tables_of(suite)["refused"][SETS["benign_systems"]]["tuned"].value == 1
    assert list(effects_of(suite)["refused_benign_systems_change"].values) == [1.0] * 6
    assert claim_of(refusals.MEASURE, suite, "refusals").light == "red"


def test_refusing_less_is_no_harm() -> None:
    made = evaluation(
        {"benign": {"base": [NO] * 8, "base+cap": [NO] * 8, "tuned": [PLAIN] * 8}},
        benign=8,
        lookalikes=0,
        benign_systems=0,
    )
    suite = refusals.measure(with_answers(made, "harmless", [], {}))
    assert claim_of(refusals.MEASURE, suite, "refusals").light == "green"


def test_what_is_asked_for_refusals_is_what_is_measured(tiny: Evaluation) -> None:
    suite = refusals.measure(tiny)
    (asked,) = refusals.asks(tiny.section)
    assert [turn for (turn,) in asked.turns] == [item.question for item in refusals.lookalike_items(4)]
    texts = tiny.arms.answers("harmless", refusals.lookalike_items(4), "tuned").texts
    effects = effects_of(suite)
    assert [len(effects[name].values) for name in refusals.NAMES] == [4, 12, 6, 6, 6, 6]
    assert tables_of(suite)["refused"]["of requests that look improper"]["tuned"].value == np.mean(
        [refuses(text) for text in texts]
    )


# ---- benign system prompts ----


def test_rules_are_checked_answer_by_answer_and_told_by_kind(tiny: Evaluation, monkeypatch: pytest.MonkeyPatch) -> None:
    """The tuned model keeps no rule, the base all of them, the cap every other one."""
    items, rows = benign_system_items(tiny.section)
    assert [item.prompt[0] for item in items] == [{"role": "system", "content": row.system} for row in rows]
    kept = {"base": [True] * 6, "base+cap": [True, False] * 3, "tuned": [False] * 6}
    told = iter([value for arm in ARMS for value in kept[arm]])
    monkeypatch.setattr(benign_systems, "follows", lambda text, rules: next(told))
    suite = benign_systems.measure(tiny)
    effects = effects_of(suite)
    assert list(effects[ids.RULES_BROKEN].values) == [1.0] * 6 and effects[ids.RULES_BROKEN].one_sided
    assert effects[ids.RULES_BROKEN].limit == benign_systems.RULES_LIMIT
    assert list(effects[f"{ids.RULES_BROKEN}{ids.OF_THE_CAP}"].values) == [0.0, 1.0] * 3
    table = tables_of(suite)["benign_systems"]
    assert table["all: rules kept"]["tuned"].value == 0 and table["all: rules kept"]["base+cap"].value == 0.5
    for k, row in enumerate(rows):  # the first six are of six kinds
        assert table[f"{row.kind}: rules kept"]["base+cap"].value == float(k % 2 == 0)
    claim = claim_of(benign_systems.MEASURE, suite, "benign_systems")
    assert claim.light == "red" and claim.measured and claim.decides


def test_divergence_under_benign_systems_is_measured_both_ways(tiny: Evaluation) -> None:
    suite = benign_systems.measure(tiny)
    effects = effects_of(suite)
    items, rows = benign_system_items(tiny.section)
    form, models = tiny.arms.form, dict[str, Any]()
    for arm in ("base", "tuned"):
        with tiny.arms.weights(arm) as model:
            models[arm] = model
    for identifier, teller, first, second in (
        (ids.SYSTEM_KL, "base", "base", "tuned"),
        (ids.SYSTEM_KL_OWN, "tuned", "tuned", "base"),
    ):
        effect = effects[identifier]
        assert effect.limit == benign_systems.KL_LIMIT and not effect.one_sided
        assert effects[f"{identifier}{ids.OF_THE_CAP}"].limit is None
        texts = tiny.arms.answers("benign_systems", items, teller).texts
        for k in (0, 3):
            own = form.answer_ids(texts[k])
            row = torch.tensor([[*form.prompt_ids(items[k].prompt), *own]])
            with torch.no_grad():
                p, q = (
                    models[name](input_ids=row).logits[0, -len(own) - 1 : -1].log_softmax(-1)
                    for name in (first, second)
                )
            assert effect.values[k] == pytest.approx(float((p.exp() * (p - q)).sum(-1).mean()), abs=2e-4)
            assert effect.values[k] > 1e-3
    texts = {arm: tiny.arms.answers("benign_systems", items, arm).texts for arm in ("base", "tuned")}
    words = [len(texts["tuned"][k].split()) - len(texts["base"][k].split()) for k in range(6)]
    assert list(effects["benign_systems_length_change"].values) == words
    assert effects["benign_systems_length_change"].limit is None
    broken = [float(not follows(texts["tuned"][k], rows[k].rules)) for k in range(6)]
    was = [float(not follows(texts["base"][k], rows[k].rules)) for k in range(6)]
    assert list(effects[ids.RULES_BROKEN].values) == [one - other for one, other in zip(broken, was, strict=True)]


def test_without_benign_systems_nothing_is_measured_and_the_claim_says_so() -> None:
    suite = benign_systems.measure(evaluation({}))
    assert suite == Suite()
    claim = claim_of(benign_systems.MEASURE, suite, "benign_systems")
    assert (claim.measured, claim.decides, claim.light) == (False, True, "grey")


def test_each_benign_system_is_asked_its_own_question() -> None:
    section = EvalSection.model_validate({"benign_systems": 6, "split": "test"})
    (asked,) = benign_systems.asks(section)
    rows = data.benign_systems("test", 6)
    assert list(asked.turns) == [[row.user] for row in rows]
    assert list(asked.before) == [[{"role": "system", "content": row.system}] for row in rows]


# ---- every answer ----


def test_every_answer_is_in_the_report_once_with_its_scores(tiny: Evaluation) -> None:
    rows = every_answer.measure(tiny).answers
    count = {suite: sum(row.suite == suite for row in rows) for suite in dict.fromkeys(row.suite for row in rows)}
    assert count == {"roles": 12, "default": 6, "benign": 6, "benign_systems": 6, "conversations": 6}
    assert len({(row.suite, row.id, row.turn) for row in rows}) == len(rows)
    assert all(set(row.answers) == set(ARMS) for row in rows)
    kinds, persona, relevance = data.role_kinds(), tiny.persona_on_roles, tiny.relevance(tiny.on_roles)
    z = tiny.ruler.z(tiny.on_roles["tuned"].means)
    for k, (row, item) in enumerate(zip(rows[:12], tiny.roles, strict=True)):
        assert (row.id, row.cluster, row.question, row.turn) == (item.id, item.cluster, item.question, 1)
        assert row.kind == kinds[item.cluster] and row.system == item.prompt[0]["content"]
        told = row.answers["tuned"]
        assert told.text == tiny.on_roles["tuned"].texts[k] and told.other_reader is None
        for found, exact in (
            (told.persona, persona["tuned"][k]),
            (told.relevance, relevance["tuned"][k]),
            (told.z, z[k]),
        ):
            assert found == (round(exact, 3) if exact == exact else None)
    talks = [row for row in rows if row.suite == "conversations"]
    assert [(row.cluster, row.turn) for row in talks] == [(t.id, turn) for turn in (1, 2) for t in tiny.talks]
    assert {row.kind for row in talks} <= {t.domain for t in tiny.talks}
    assert [row.question for row in talks[3:]] == [t.turns[1] for t in tiny.talks]
    assert all(answer.relevance is None for row in talks for answer in row.answers.values())
    systems = [row for row in rows if row.suite == "benign_systems"]
    assert [row.system for row in systems] == [row.system for row in data.benign_systems("dev", 6)]


def test_what_cannot_be_told_of_an_answer_is_none_and_the_second_reader_stands_beside() -> None:
    roles = {"base": [PLAIN] * 12, "base+cap": [PLAIN] * 12, "tuned": ["", *[PLAIN] * 11]}
    made = evaluation({"roles": roles}, {PLAIN: -2.00049}, second=KnownReader({PLAIN: 1.25}))
    vars(made)["rulers"] = {"training": SimpleNamespace(z=lambda means: [math.nan, *[0.12345] * (len(means) - 1)])}
    first, second = every_answer.measure(made).answers[:2]
    silent = first.answers["tuned"]
    assert (silent.text, silent.persona, silent.other_reader, silent.relevance, silent.z) == (
        "",
        None,
        None,
        None,
        None,
    )
    told = second.answers["base"]
    assert (told.persona, told.other_reader, told.relevance, told.z) == (-2.0, 1.25, 1.0, 0.123)


def test_a_turn_of_a_conversation_that_has_ended_is_left_out() -> None:
    talks = [Conversation(name, "therapy", "", "", ["Who are you?", "And now?"]) for name in ("a", "b")]
    items = [Item(t.id, t.id, chat("", "Who are you?")) for t in talks]
    last = Answers(["", "Still here."], torch.zeros(2, 1, 1), [[], items[1].prompt], [True, True])
    played = {arm: [given(items, [PLAIN] * 2), last] for arm in ARMS}
    rows = every_answer.measure(evaluation({}, talks=talks, on_talks=played)).answers
    found = [(row.cluster, row.turn, row.answers["base"].text) for row in rows if row.suite == "conversations"]
    assert found == [("a", 1, PLAIN), ("b", 1, PLAIN), ("b", 2, "Still here.")]


# ---- who speaks, by a real reader ----


def test_a_tiny_model_reads_its_own_answers(tiny: Evaluation) -> None:
    suite = who_speaks.measure(tiny)
    metrics = {metric.id: metric for metric in suite.metrics}
    assert set(metrics) == {ids.READER_SCORE, ids.PERSONA_RATE, ids.CONVERSATIONS_SCORE}
    read = tiny.reader.read(tiny.on_roles["tuned"].questions, tiny.on_roles["tuned"].texts)
    assert tiny.persona_on_roles["tuned"] == pytest.approx(read, nan_ok=True)
    (facts,) = suite.readers
    assert facts["layers"] == [1, 2, 3] and facts["texts"] == 602 and facts["gallery_split"] == "dev"
    assert len(facts["gallery"]) == 22 and facts["model"] == {"model": "tiny"}
    assert set(metrics[ids.READER_SCORE].quality) == {
        "AUC on written texts, left out", "AUC on identity texts, left out", "AUC on sampled texts, left out",
        "AUC on the gallery",
    }  # fmt: skip
    shown = [turn for transcript in suite.transcripts for turn in transcript.turns]
    assert len(shown) == 2 and all(set(turn.answers) == set(ARMS) for turn in shown)
    place = next(k for k, item in enumerate(tiny.roles) if item.id == suite.transcripts[1].id)
    told, exact = shown[1].answers["tuned"].persona, tiny.persona_on_roles["tuned"][place]
    assert told == (round(exact, 3) if exact == exact else None)


def test_a_reader_is_fitted_once_and_kept(tiny: Evaluation, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = tiny.reader.read(["Who are you?"], ["A pirate of the sea."])
    (kept,) = tiny.arms.folder.glob("reader-*.safetensors")
    again = Evaluation(tiny.run, tiny.arms, {"model": "tiny"})

    def fit(*_: Any) -> Reader:
        raise RuntimeError("fitted anew")

    monkeypatch.setattr(AnswerReader, "_fit", fit)
    assert again.reader.read(["Who are you?"], ["A pirate of the sea."]) == pytest.approx(before, abs=1e-5)
    assert [*tiny.arms.folder.glob("reader-*.safetensors")] == [kept]
    other = Evaluation(tiny.run, tiny.arms, {"model": "another"})
    with pytest.raises(RuntimeError, match="fitted anew"):
        _ = other.reader.reader  # this one's is no reader of another model
