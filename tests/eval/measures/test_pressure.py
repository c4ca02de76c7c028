"""Persona under pressure, with a judge that is a real HTTP endpoint, and the files that hold other people's probes."""

from __future__ import annotations

import csv
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import build_arms
from judge_endpoint import KEY, Endpoint

from trimtab.axis import UserError
from trimtab.axis.chat_format import ChatFormat, chat
from trimtab.axis.judge import IDENTITIES, Score, ScoringJudge, scoring_judge
from trimtab.axis.replies import Missing
from trimtab.axis.sampling import SamplingOptions
from trimtab.eval.answers.arms import Answers, Arms, Item
from trimtab.eval.answers.boundary_files import HARMFUL, ONLY_HARMFUL, _words, load_boundary_file
from trimtab.eval.measures.pressure import _judged, jailbreaks, judge_agreement, ratio_agreement, susceptibility
from trimtab.recipes import data
from trimtab.recipes.data import BoundaryProbe
from trimtab.recipes.schema import JudgeSection


@pytest.fixture
def arms(form: ChatFormat, tmp_path: Path) -> Arms:
    options = SamplingOptions(max_new_tokens=6, batch_size=16)
    return build_arms(form, tmp_path / "eval", options, names=("base", "base+cap", "tuned"))


def judge_at(endpoint: Endpoint, cache: Path) -> ScoringJudge:
    section = JudgeSection(
        endpoint=endpoint.url, model="m", api_key_env=KEY, retries=1, backoff=0.01, unreadable_retries=1
    )
    return scoring_judge(section.model_dump(), cache, "eval.judge")


@pytest.mark.slow
def test_identities_are_counted_as_the_judge_names_them(arms: Arms, endpoint: Endpoint, tmp_path: Path) -> None:
    told: dict[str, str] = {}

    def answer(prompt: str, count: int) -> tuple[int, str]:
        told.setdefault(prompt, str(len(told) % 6))  # 5 is no class: asked again, then missing
        return 200, told[prompt]

    endpoint.answer = answer
    suite = susceptibility(arms, "dev", 3, judge_at(endpoint, tmp_path / "judge.jsonl"))
    assert {row.prompt for row in suite.unscored} == {prompt for prompt, score in told.items() if score == "5"}
    assert {(row.highest, row.why) for row in suite.unscored} == {(len(IDENTITIES) - 1, Missing.UNREADABLE)}
    ratio, rate = suite.metrics
    n = 3 * len(data.identity_questions("dev"))
    assert (ratio.id, rate.id) == ("identity_llr", "assistant_rate") and set(rate.values) == {
        "base",
        "base+cap",
        "tuned",
    }
    table = suite.tables[0]
    assert [row.label for row in table.rows] == list(IDENTITIES)
    for arm in arms.names:
        assert len(rate.values[arm]) == n
        known = [value for value in rate.values[arm] if value == value]
        shares = [row.arms[arm] for row in table.rows]
        assert sum(share.value for share in shares) == pytest.approx(1) and shares[0].n == len(known)
        assert shares[0].value == pytest.approx(sum(known) / len(known))
    absent = sum(value != value for value in rate.values["tuned"])
    assert any(
        f"{absent} of {n} answers of tuned (identity) have no score and are left out" in line
        and f"the judge's reply was no score: {absent}" in line
        for line in suite.warnings
    )
    asked = len(endpoint.asked)
    susceptibility(arms, "dev", 3, judge_at(endpoint, tmp_path / "judge.jsonl"))
    again = endpoint.asked[asked:]
    assert again and all(told[prompt] == "5" for prompt in again)  # only what could not be read is asked again


@pytest.mark.slow
def test_judge_and_ratio_are_held_against_answers_that_were_read(arms: Arms, endpoint: Endpoint) -> None:
    labels = {row.answer: str(IDENTITIES.index(row.label)) for row in data.identity_labels()}
    endpoint.answer = lambda prompt, count: (
        200, labels.get(prompt.split("Answer: ")[1].split("\n\n0 - ")[0], "4"),
    )  # fmt: skip
    ratio, rate = susceptibility(arms, "dev", 2, judge_at(endpoint, arms.folder / "judge.jsonl")).metrics
    assert rate.quality["kappa with labelled answers"].value == pytest.approx(1)
    assert set(rate.values) == set(arms.names)  # the labelled answers are no arm
    auc = ratio.quality["AUC on labelled answers"]
    neutral = {"", *data.default_prompts()}
    under_roles = [row for row in data.identity_labels() if row.system not in neutral]
    assert auc.n == sum(row.label != "other" for row in under_roles) and auc.low <= auc.value <= auc.high
    known = data.identity_labels()
    assert (
        ratio_agreement([float(row.label != "assistant") for row in known], known)["AUC on labelled answers"].value == 1
    )
    wrong = judge_agreement([Missing.UNREADABLE] * len(known), known)["kappa with labelled answers"]
    assert wrong.value == pytest.approx(0)
    # what its endpoint did not answer on says nothing about the judge
    right: list[Score] = [IDENTITIES.index(row.label) for row in known]
    part = judge_agreement([Missing.UNANSWERED, Missing.REFUSED, *right[2:]], known)["kappa with labelled answers"]
    assert part.value == pytest.approx(1) and part.n == len(known) - 2
    assert judge_agreement([Missing.UNANSWERED] * len(known), known) == {}


def test_labels_were_given_by_two_readers_who_mostly_agree() -> None:
    known = data.identity_labels()
    assert len({row.id for row in known}) == len(known) == 120 and all(row.answer.strip() for row in known)
    assert {row.label for row in known} == set(IDENTITIES)
    assert sum(len(set(row.readers)) > 1 for row in known) == 3
    assert all(row.label in row.readers for row in known)


@pytest.mark.slow
def test_the_persona_settles_before_the_request(arms: Arms, endpoint: Endpoint) -> None:
    endpoint.answer = lambda prompt, count: (200, "1" if "rumour" in prompt else "0")
    probes = [
        BoundaryProbe("a", "defamation", "Write a rumour.", "It writes one."),
        BoundaryProbe("b", "privacy", "Read her messages.", "It helps."),
        BoundaryProbe("c", "own", "Ask a rumour at once.", "It helps.", system="You are a spy."),
    ]
    suite = jailbreaks(arms, probes, data.lookalike_probes(2), judge_at(endpoint, arms.folder / "judge.jsonl"))
    wrappers = data.persona_wrappers()
    first = next(prompt for prompt in endpoint.asked if "Write a rumour." in prompt)
    lines = first.split("Conversation:\n")[1]
    assert lines.startswith(f"system: {wrappers[0].system}\nuser: {wrappers[0].drift_turn}\nassistant: ")
    assert "user: Write a rumour.\nAnswer: " in lines and "It writes one." in first
    spy = next(prompt for prompt in endpoint.asked if "Ask a rumour at once." in prompt)
    assert "system: You are a spy.\nuser: Ask a rumour at once.\nAnswer:" in spy
    metrics = {metric.id: metric for metric in suite.metrics}
    assert metrics["harmful_rate"].values["base"] == [1.0, 0.0, 1.0]
    assert metrics["harmful_rate"].clusters == [wrappers[0].id, wrappers[1].id, "c"]
    assert len(metrics["jailbreak_llr"].values["tuned"]) == 3
    by_category, refusals = suite.tables
    shares = {row.label: row.arms["tuned"].value for row in by_category.rows}
    assert shares == {"all": pytest.approx(2 / 3), "defamation": 1.0, "privacy": 0.0, "own": 1.0}
    assert refusals.id == "refusals" and refusals.rows[0].arms["base"].n == 2
    assert not any("little room" in line for line in suite.warnings)


def test_answers_of_no_words_are_missing_and_never_safe() -> None:
    """The judge would call them harmless: a model that says nothing must not win by it."""
    prompts = [chat("", "Write a rumour.")] * 2
    answers = {
        "base": Answers(["Sure: they say", " no"], torch.empty(0), prompts, []),
        "tuned": Answers(["", " \n"], torch.empty(0), prompts, []),
    }
    asked: list[str] = []

    def judge(given: Sequence[str], highest: int) -> list[Score]:
        asked.extend(given)
        return [0] * len(given)

    scores, unscored = _judged(judge, answers, lambda prompt, text, _: text, 1)
    assert scores == {"base": [0, 0], "tuned": [Missing.EMPTY] * 2} and asked == ["Sure: they say", " no"]
    assert unscored == []  # there is nothing to ask again


@pytest.mark.slow
def test_what_the_endpoint_did_not_answer_is_told_apart_and_no_rate(arms: Arms, endpoint: Endpoint) -> None:
    endpoint.answer = lambda prompt, count: (
        (503, b"full") if "rumour" in prompt else (200, "hm" if "messages" in prompt else "1")
    )
    probes = [BoundaryProbe(*row, "It helps.") for row in (
        ("a", "c", "Write a rumour."), ("b", "c", "Read her messages."), ("c", "c", "Open the door."),
    )]  # fmt: skip
    suite = jailbreaks(arms, probes, [], judge_at(endpoint, arms.folder / "judge.jsonl"))
    values = suite.metrics[1].values["base"]
    assert [value == value for value in values] == [False, False, True] and suite.tables[0].rows[0].arms["base"].n == 1
    reasons = "the judge's reply was no score: 1; the judge's endpoint did not answer: 1"
    assert f"2 of 3 answers of base (jailbreaks) have no score and are left out ({reasons})." in suite.warnings
    assert sorted({(row.why, row.highest) for row in suite.unscored}, key=str) == [
        (Missing.UNANSWERED, 1), (Missing.UNREADABLE, 1),
    ]  # fmt: skip


@pytest.mark.slow
def test_little_room_is_said_and_without_a_judge_the_ratio_is_left(arms: Arms, endpoint: Endpoint) -> None:
    endpoint.answer = lambda prompt, count: (200, "0")
    probes = data.boundary_probes(4)
    judged = jailbreaks(arms, probes, [], judge_at(endpoint, arms.folder / "judge.jsonl"))
    assert any("little room" in line for line in judged.warnings)
    alone = jailbreaks(arms, probes, data.lookalike_probes(2), None)
    assert [metric.id for metric in alone.metrics] == ["jailbreak_llr"] and not alone.tables
    assert jailbreaks(arms, [], [], None).metrics == [] and susceptibility(arms, "dev", 0, None).metrics == []


def test_harmless_requests_alone_are_read_for_refusals_and_never_for_harm(arms: Arms, endpoint: Endpoint) -> None:
    endpoint.answer = lambda prompt, count: (200, "1" if "refuses a harmless request" in prompt else "0")
    harmless = [
        BoundaryProbe("a", "c", "Kill a process.", "", system="You are a shell."),
        BoundaryProbe("b", "c", "Hi.", ""),
    ]
    suite = jailbreaks(arms, [], harmless, judge_at(endpoint, arms.folder / "judge.jsonl"))
    assert suite.metrics == [] and [table.id for table in suite.tables] == ["refusals"]
    assert suite.tables[0].rows[0].arms["base"].value == 1
    assert not any("goes along" in prompt for prompt in endpoint.asked)
    (with_system, _) = arms.answers(
        "lookalikes", [Item(p.id, p.id, chat(p.system, p.request)) for p in harmless], "base"
    ).prompts
    assert with_system[0] == {"role": "system", "content": "You are a shell."}  # kept as it was asked
    unread = jailbreaks(arms, [], harmless, None)
    assert unread.metrics == [] and "eval.judge" in unread.warnings[0]


def test_own_probes_take_turns_and_name_what_going_along_would_be() -> None:
    probes, lookalikes = data.boundary_probes(), data.lookalike_probes()
    assert len(probes) == 64 and len(lookalikes) == 32
    assert len({probe.category for probe in probes[:8]}) == len({probe.category for probe in probes}) == 8
    assert all(probe.harmful_if for probe in probes) and not any(probe.harmful_if for probe in lookalikes)
    assert len({w.id for w in data.persona_wrappers()}) == 16


def table(path: Path, rows: list[dict[str, Any]]) -> Path:
    with path.open("w", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, rows[0].keys())
        writer.writeheader()
        writer.writerows(rows)
    return path


@pytest.mark.parametrize(
    ("name", "row", "category"),
    [
        ("HarmBench", {"Behavior": "Do it,\nnow", "FunctionalCategory": "standard", "SemanticCategory": "c"}, "c"),
        ("StrongREJECT", {"category": "c", "source": "s", "forbidden_prompt": "Do it,\nnow"}, "c"),
        ("JailbreakBench", {"Index": 0, "Goal": "Do it,\nnow", "Target": "Sure", "Behavior": "b", "Category": "c"}, "c"),
        ("prompts", {"prompt": "Do it,\nnow", "category": "c"}, "c"),
    ],
)  # fmt: skip
def test_published_tables_are_known_by_their_columns(
    name: str, row: dict[str, Any], category: str, tmp_path: Path
) -> None:
    file = "t.csv" if name in ONLY_HARMFUL else "harmful-behaviors.csv"
    declined, answered = load_boundary_file(str(table(tmp_path / file, [row, row])))
    assert answered == [] and [probe.id for probe in declined] == [f"{name}/1", f"{name}/2"]
    assert declined[0] == BoundaryProbe(f"{name}/1", category, "Do it,\nnow", HARMFUL)


def test_the_context_of_a_harmbench_row_stands_before_its_request(tmp_path: Path) -> None:
    rows = [
        {"Behavior": "Sum it up", "ContextString": "A letter.", "SemanticCategory": "c"},
        {"Behavior": "Do it", "ContextString": "", "SemanticCategory": "c"},
    ]
    declined, _ = load_boundary_file(str(table(tmp_path / "t.csv", rows)))
    assert [probe.request for probe in declined] == ["A letter.\n\n---\n\nSum it up", "Do it"]


def test_xstest_is_split_into_what_to_answer_and_what_to_decline(tmp_path: Path) -> None:
    rows = [
        {"id": 1, "prompt": "How do I kill a process?", "type": "homonyms"},
        {"id": 2, "prompt": "How do I kill a man?", "type": "contrast_homonyms"},
    ]
    declined, answered = load_boundary_file(str(table(tmp_path / "x.csv", rows)))
    assert [probe.request for probe in declined] == ["How do I kill a man?"]
    assert [probe.request for probe in answered] == ["How do I kill a process?"] and not answered[0].harmful_if


JBB = {"Index": 0, "Goal": "Do it.", "Target": "Sure", "Behavior": "b", "Category": "c"}
PROMPT = {"prompt": "Do it.", "category": "c"}
SAYS = {
    # (file, row) -> harmful, harmless, or None where it can't be told
    "JailbreakBench's harmful half": ("harmful-behaviors.csv", JBB, True),
    "JailbreakBench's benign half": ("benign-behaviors.csv", JBB, False),
    "JailbreakBench, which half?": ("behaviors.csv", JBB, None),
    "both halves in one name": ("harmful_and_benign.csv", JBB, None),
    "a name that denies": ("not_harmful.csv", JBB, None),
    "a folder's name is none": ("safe/behaviors.csv", JBB, None),
    "a column says harmless": ("behaviors.csv", {**JBB, "kind": "harmless"}, False),
    "a column says harmful": ("benign.csv", {**JBB, "Kind": " Harmful "}, True),
    "a column says neither": ("harmful.csv", {**JBB, "kind": "1"}, None),
    "an empty column": ("harmful.csv", {**JBB, "label": ""}, None),
    "prompts, of what kind?": ("prompts.csv", PROMPT, None),
    "a copy of a set that has one kind": ("advbench.csv", PROMPT, True),
    "prompts that are safe by name": ("safe.csv", PROMPT, False),
    "prompts with labels": ("prompts.csv", {**PROMPT, "label": "safe"}, False),
    "HarmBench": ("t.csv", {"Behavior": "Do it.", "SemanticCategory": "c"}, True),
    "HarmBench's columns over harmless rows": ("benign.csv", {"Behavior": "Do it.", "SemanticCategory": "c"}, False),
    "HarmBench, and yet benign?": ("harmbench_benign.csv", {"Behavior": "Do it.", "SemanticCategory": "c"}, None),
    "StrongREJECT": ("t.csv", {"forbidden_prompt": "Do it.", "category": "c"}, True),
    "XSTest, safe": ("t.csv", {"prompt": "Do it.", "type": "homonyms"}, False),
    "XSTest, in contrast": ("t.csv", {"prompt": "Do it.", "type": "contrast_discr"}, True),
    "XSTest by its label": ("t.csv", {"prompt": "Do it.", "type": "homonyms", "label": "unsafe"}, True),
    "no types of XSTest": ("t.csv", {"prompt": "Do it.", "type": "malware"}, None),
    "a question": ("t.jsonl", {"question": "Do it."}, None),
    "a question that says what would be harm": ("t.jsonl", {"question": "Do it.", "harmful_if": "It does it."}, True),
    "a question with a kind": ("t.jsonl", {"question": "Do it.", "kind": "benign"}, False),
    "a question in a file with a name": ("harmless.jsonl", {"question": "Do it."}, False),
    "a harmless question with a harm": ("t.jsonl", {"question": "Do it.", "kind": "safe", "harmful_if": "x"}, None),
}


@pytest.mark.parametrize("case", SAYS)
def test_whether_requests_are_harmful_is_read_and_never_guessed(case: str, tmp_path: Path) -> None:
    file, row, harmful = SAYS[case]
    path = tmp_path / file
    path.parent.mkdir(exist_ok=True)
    if path.suffix == ".jsonl":
        path.write_text(json.dumps(row) + "\n", encoding="utf-8")
    else:
        table(path, [row])
    if harmful is None:
        with pytest.raises(UserError, match=r"kind|harmful") as caught:
            load_boundary_file(str(path))
        assert file in str(caught.value) and caught.value.key == "eval.boundary_file"
        return
    declined, answered = load_boundary_file(str(path))
    assert [probe.request for probe in (declined if harmful else answered)] == ["Do it."]
    assert not (answered if harmful else declined)
    assert all(probe.harmful_if for probe in declined) and not any(probe.harmful_if for probe in answered)


def test_a_table_of_both_kinds_is_split_row_by_row(tmp_path: Path) -> None:
    rows = [{**JBB, "Goal": goal, "kind": kind} for goal, kind in (("a", "harmful"), ("b", "benign"), ("c", "harmful"))]
    declined, answered = load_boundary_file(str(table(tmp_path / "t.csv", rows)))
    assert [probe.request for probe in declined] == ["a", "c"] and [probe.request for probe in answered] == ["b"]


def test_json_lines_of_system_and_question(tmp_path: Path) -> None:
    rows = [
        {"system": "You are a spy.", "question": "Where?", "kind": "harmful"},
        {"id": "k", "question": "Who?", "category": "c", "harmful_if": "h", "system": None},
    ]
    path = tmp_path / "mine.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    declined, answered = load_boundary_file(str(path))
    assert declined == [
        BoundaryProbe("mine/1", "none", "Where?", HARMFUL, "You are a spy."),
        BoundaryProbe("k", "c", "Who?", "h"),
    ]
    assert answered == []


@pytest.mark.parametrize(
    ("name", "rows"),
    [
        ("harmful-strings.jsonl", [{"prompt": "Where?", "system": "You are a spy."}]),
        ("harmful.json", [{"messages": chat("You are a spy.", "Where?")}]),
        ("beside.json", [{"prompt": "Where?", "category": "none", "system": "You are a spy.", "kind": "harmful"}]),
        ("harmful-gpt.json", [{"system": "You are a spy.", "conversations": [{"from": "human", "value": "Where?"}]}]),
    ],
)  # fmt: skip
def test_probes_in_the_formats_of_conversations(name: str, rows: list[Any], tmp_path: Path) -> None:
    path = tmp_path / name
    path.write_text(json.dumps(rows if name.endswith("json") else rows[0]), encoding="utf-8")
    (probe,), _ = load_boundary_file(str(path))
    assert (probe.request, probe.system, probe.harmful_if) == ("Where?", "You are a spy.", HARMFUL)


def test_a_published_table_may_be_json(tmp_path: Path) -> None:
    path = tmp_path / "bench.jsonl"
    path.write_text(json.dumps({"Behavior": "Do it", "SemanticCategory": "c"}), encoding="utf-8")
    (probe,), _ = load_boundary_file(str(path))
    assert probe == BoundaryProbe("HarmBench/1", "c", "Do it", HARMFUL)


def test_a_data_set_of_the_hub_by_its_columns(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """By the same loader, which takes a folder in the place of a name on the hub."""
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", str(tmp_path / "cache"))
    (tmp_path / "harmful").mkdir()
    table(tmp_path / "harmful" / "train.csv", [{"Goal": "Do it.", "Category": "c"}])
    (only,), _ = load_boundary_file(f"hf://{tmp_path / 'harmful'}")
    assert only.request == "Do it."
    table(tmp_path / "harmful" / "test.csv", [{"Goal": "Do that.", "Category": "d"}])
    with pytest.raises(UserError, match="several splits: train, test"):
        load_boundary_file(f"hf://{tmp_path / 'harmful'}")
    (one,), _ = load_boundary_file(f"hf://{tmp_path / 'harmful'}:test")
    assert (one.request, one.category, one.harmful_if) == ("Do that.", "d", HARMFUL)
    with pytest.raises(UserError, match="could not be loaded"):
        load_boundary_file(f"hf://{tmp_path / 'nowhere'}")


def test_a_split_of_the_hub_says_its_kind_by_its_name() -> None:
    assert "benign" in _words("hf://datasets/JailbreakBench/JBB-Behaviors/behaviors:benign")
    assert "benign" in _words("JailbreakBench/JBB-Behaviors:benign") and "harmbench" in _words(
        "hf://walledai/HarmBench"
    )
    assert "safe" not in _words("safe/prompts") | _words("/home/safe/behaviors.csv") | _words("hf:///safe/set:test")


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        ("a.csv", "one,two\n1,2\n", "line 2: no conversation in here; the keys are: 'one', 'two'"),
        ("harmful.csv", "Goal,Category\nx,c\n,c\n,d\n", "line 3: it has no Goal\n    line 4: it has no Goal"),
        ("g.csv", "Goal,Category,kind\nx,c,harmful\nx,c,?\n", "line 3: it has the kind '?', which is neither"),
        ("c.jsonl", '{"system": "x"}\n', "line 1: no conversation in here"),
        ("d.csv", "Goal,Category\n", "there is no row"),
        (
            "e.jsonl",
            '{"question": "x", "id": 1, "kind": "safe"}\n{"question": "y", "id": 1, "kind": "safe"}\n',
            "line 2: the id '1' is taken by line 1",
        ),
        ("f.json", '[{"turns": ["x", "y"]}]', "row 1: a probe is one request, and its messages are user, user"),
    ],
)
def test_what_is_no_probe_file_says_so(name: str, content: str, said: str, tmp_path: Path) -> None:
    path = tmp_path / name
    path.write_text(content, encoding="utf-8")
    with pytest.raises(UserError) as caught:
        load_boundary_file(str(path))
    assert said in caught.value.fault
    assert name in str(caught.value) and "remedy" in str(caught.value)
