"""What the page shows of the answers that were read: the pair at its top, the rate, means by kind, and the table of all."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from test_report import Page, build_answers, build_report, estimate, metric

from trimtab.eval.report import page as page_module
from trimtab.eval.report import read_answers
from trimtab.eval.report.card import model_card
from trimtab.eval.report.page import render_html, write_report
from trimtab.eval.report.read_answers import (
    rate_intervals,
    rate_sentence,
    shown_answers,
    typical_pair,
    worst_first,
    worst_roles,
)
from trimtab.eval.report.terms import TERMS, term, with_terms
from trimtab.eval.schema import AnswerRow, ArmAnswer, Claim, Metric, RateRow, RateTable, Report, Retention, ScoredAnswer
from trimtab.eval.wording import STATUS_DOTS, STATUS_SIGNS, real_minus

GLOSSARY = Path(__file__).parents[3] / "docs" / "glossary.md"


def row(name: str, base: float | None, tuned: float | None, suite: str = "roles", **more: Any) -> AnswerRow:
    answers = {"base": ScoredAnswer(text="I am.", persona=base), "tuned": ScoredAnswer(text="Mix it.", persona=tuned)}
    facts = {"kind": "mystical", "cluster": name, "system": "", "question": "How?"} | more
    return AnswerRow(id=name, suite=suite, answers=answers, **facts)


def persona_rate(**arms: float) -> Metric:
    given = metric(
        "persona_rate", "Persona rate", "rate", "lower", [0.94, 0.4, 0.62, 0.3, 0.9], 0.04, Retention(estimate=None)
    )
    return given.model_copy(
        update={"arms": {arm.replace("_", "+"): estimate(value, 0.04) for arm, value in arms.items()}}
    )


@pytest.fixture
def report() -> Report:
    """A report with 36 questions read, a rate, and claims of which one decides and one was not measured."""
    found = build_report(transcripts=3)
    found.answers = build_answers()
    found.metrics.append(persona_rate(base=0.94, base_cap=0.4, tuned=0.62))
    found.claims = [
        Claim(id="kept", name="It is kept", light="green", says="93 %.", rule="Green: most.", decides=True),
        Claim(id="costs", name="It costs nothing", light="red", says="It does.", rule="Red: more.", decides=True),
        Claim(id="jailed", name="Jailbreaks fail", light="grey", says="No probes.", rule="Grey: none.", measured=False),
        Claim(id="lasts", name="It lasts", light="grey", says="No tunings.", rule="Grey: none.", measured=False),
    ]
    found.verdict.decided_by = ["costs"]
    return found


def test_the_pair_at_the_top_is_the_one_of_median_change() -> None:
    changes = {"a": -9.0, "b": -1.0, "c": -2.2, "d": 0.5, "e": -3.0}
    rows = [row(name, 2.0, 2.0 + change) for name, change in changes.items()]
    others = [row("f", 2.0, -2.2, suite="default"), row("g", None, 0.0), row("h", 1.0, None)]
    found = typical_pair([*others, *rows])
    assert found is not None and found.row.id == "c" and found.of == 5
    assert found.change == pytest.approx(-2.2) and found.median == pytest.approx(-2.2)
    even = typical_pair([row("z", 0.0, -3.0), row("y", 0.0, -1.0)])  # both a nat from the median
    assert even is not None and even.row.id == "y" and even.median == -2.0
    assert typical_pair(others) is None


def test_the_rate_is_said_of_100_and_left_out_where_it_was_not_measured(report: Report) -> None:
    said = "Of 100 answers under role prompts, 94 read as a persona before, 40 under the cap, 62 tuned."
    assert rate_sentence(report.metrics) == said
    assert rate_intervals(report.metrics) == "[90, 98], [36, 44], [58, 66]; n\u00a0=\u00a096"
    assert rate_sentence([persona_rate(tuned=0.5)]) == "Of 100 answers under role prompts, 50 read as a persona tuned."
    assert rate_sentence(build_report().metrics) is None
    text = Page(render_html(report)).text
    assert text.index(report.verdict.headline) < text.index(said) < text.index("How much of the cap survives")
    assert said in model_card(report, adapter_facts={"base_model": "x", "license": "mit"})
    assert "Of 100 answers" not in Page(render_html(build_report(transcripts=1))).text


def test_two_answers_stand_before_the_first_figure(report: Report) -> None:
    source = render_html(report)
    page = Page(source)
    assert page.ids("section")[:4] == ["verdict", "example", "retention", "claims"]
    top = source[source.index('id="example"') : source.index('id="retention"')]
    assert top.index("Before") < top.index("Tuned, no cap") < top.index("Before, under the cap")
    pair = typical_pair(report.answers)
    assert pair is not None and pair.row.question in top and "neither the best nor the worst" in top
    assert "log-odds +" in top or "log-odds −" in top


def test_the_worst_roles_come_first_and_those_that_were_not_read_are_left_out() -> None:
    rows = [row("elf", 1.0, -1.0), row("elf", 3.0, 2.0), row("imp", 1.0, 4.0), row("ox", 1.0, None)]
    rows.append(row("talk", 9.0, 9.0, suite="conversations"))
    worst = worst_roles(rows)
    assert [(role.name, role.arms["tuned"].mean) for role in worst] == [("imp", 4.0), ("elf", 0.5)]
    elf = worst[1].arms["tuned"]
    assert (elf.n, elf.personas) == (2, 1) and worst[1].arms["base"].mean == pytest.approx(2.0)
    assert len(worst_roles([row(f"role-{number}", 0.0, 0.0) for number in range(30)])) == read_answers.WORST


def rates(identifier: str, name: str) -> RateTable:
    arms = {arm: estimate(0.5, 0.1) for arm in ("base", "tuned")}
    meaning = "Share of answers; the cap's own change is -0.3."
    return RateTable(id=identifier, name=name, meaning=meaning, rows=[RateRow(label="mystical", arms=arms)])


def test_rates_by_kind_stand_once_beside_the_answers(report: Report) -> None:
    by_kind, refused = rates("by_kind", "Personas by kind of role"), rates("refused", "Harmless requests refused")
    report.rates = [by_kind, refused]
    text = Page(render_html(report)).text
    assert text.count(by_kind.name) == 1 and text.count("mystical 0.50") == 2  # a row of each table
    assert text.index("The answers that were read") < text.index(by_kind.name) < text.index("Answer by answer")
    assert text.index("Shares of answers, class by class") < text.index(refused.name)
    report.answers = []  # then all stand together
    text = Page(render_html(report)).text
    assert text.index("Shares of answers, class by class") < text.index(by_kind.name) < text.index(refused.name)


def test_the_worst_come_first_and_what_was_not_read_last() -> None:
    rows = [row("a", 0.0, None), row("b", 0.0, -1.0), row("c", 0.0, 3.0)]
    assert [one.id for one in worst_first(rows)] == ["c", "b", "a"]


def test_the_page_holds_the_worst_of_every_suite_and_says_what_it_leaves_out(
    report: Report, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(read_answers, "ROWS_SHOWN", 12)
    shown = shown_answers(report.answers)
    assert [one.id for one in shown] == [f"item-{index:03d}" for index in range(35, 23, -1)]
    page = Page(render_html(report))
    assert "12 of 36 questions stand on this page" in page.text and "report.json holds all" in page.text
    assert [one["id"] for one in page.islands["read-data"]["rows"]] == [one.id for one in shown]
    monkeypatch.setattr(read_answers, "CHARACTERS_SHOWN", 10)
    assert len(shown_answers(report.answers)) == 1


def test_ten_answers_stand_on_the_page_without_javascript(report: Report) -> None:
    page = Page(render_html(report))
    text = page.text
    body = text[text.index("Answer by answer") :]
    for index in range(26, 36):
        assert f"How do I bake bread ({index})?" in body
    assert "How do I bake bread (25)?" not in body
    assert "The 10 worst of them" in text and "+33.10" in body  # 35 of the tuned level, -1.9
    data = page.islands["read-data"]
    assert len(data["rows"]) == 36
    first = data["rows"][0]
    assert first["suite"] == "default Assistant" and first["answers"]["tuned"]["persona"] == 33.1
    assert "The worst 2 roles" in text  # of the six, those that were asked as roles
    assert "The answers that were read" not in Page(render_html(build_report(transcripts=1))).text


def test_an_answer_cannot_leave_the_island_of_data(report: Report) -> None:
    evil = "</script><script>alert(1)</script><b onclick='x'>&\"<!--"
    for one in report.answers:
        one.question = one.system = one.kind = one.cluster = one.answers["tuned"].text = evil
    source = render_html(report)
    assert "<script>alert" not in source and "<b onclick" not in source and "<!--" not in source
    assert Page(source).islands["read-data"]["rows"][0]["answers"]["tuned"]["text"] == evil


def test_claims_that_were_not_measured_are_one_line_and_those_that_decide_are_marked(report: Report) -> None:
    page = Page(render_html(report))
    assert "Not measured: Jailbreaks fail; It lasts" in page.text
    assert "4 claims: 1 yes, 1 no, 2 not measured." in page.text
    assert "Decided by: It costs nothing ( no )." in page.text
    assert page.text.count("decides the verdict") == 2
    listed = [attributes.get("id") for tag, attributes in page.tags if tag == "li" and "id" in attributes]
    assert listed == ["claim-kept", "claim-costs", "claim-jailed", "claim-lasts"]
    report.claims = [claim for claim in report.claims if claim.measured]
    assert "Not measured:" not in Page(render_html(report)).text


def test_an_incomplete_verdict_has_its_own_colour_and_badge(report: Report) -> None:
    report.verdict.status = "incomplete"
    source = render_html(report)
    assert 'class="verdict incomplete"' in source and "… incomplete" in " ".join(Page(source).text.split())
    css = (page_module.TEMPLATES / "report.css").read_text(encoding="utf-8")
    assert css.count("--incomplete: #") == 2 and ".incomplete { --tone: var(--incomplete); }" in css
    card = model_card(report, adapter_facts={"base_model": "x", "license": "mit"})
    assert "(verdict: 🔵 incomplete)" in card and "Decided by: It costs nothing." in card
    for table in (STATUS_SIGNS, STATUS_DOTS):
        assert set(table) == set(type(report.verdict).model_json_schema()["properties"]["status"]["enum"])
        assert len(set(table.values())) == len(table)


def test_no_conversations_is_said_only_where_there_are_none(report: Report) -> None:
    none = "No conversations were measured"
    report.trajectories = []
    assert none not in Page(render_html(report)).text  # conversations were read
    report.answers = []
    assert none not in Page(render_html(report)).text  # there is a transcript of several turns
    report.transcripts = []
    assert none in Page(render_html(report)).text
    report.prediction = {"base": estimate(0.4, 0.1)}
    text = Page(render_html(report)).text
    assert none not in text and "with an R² of" in text


def test_transcripts_show_the_reader_and_can_be_sorted_to_the_worst(report: Report) -> None:
    assert "worst first, by the reader" not in Page(render_html(report)).text
    for score, turn in enumerate(report.transcripts[1].turns):
        turn.answers["tuned"] = turn.answers["tuned"].model_copy(update={"persona": 1.25 - score})
    page = Page(render_html(report))
    kept = [attributes for tag, attributes in page.tags if tag == "details" and attributes.get("class") == "transcript"]
    assert [attributes.get("data-persona") for attributes in kept] == [None, "1.25", None]
    assert float(kept[0]["data-z"] or "nan") == pytest.approx(-1.9)
    assert "log-odds +0.2" in page.text and "worst first, by the reader" in page.text
    assert page_module._highest([ArmAnswer(text="", z=0)]) is None


def test_words_are_explained_in_the_glossarys_own_sentences() -> None:
    rows = [line.split("|") for line in GLOSSARY.read_text(encoding="utf-8").splitlines() if line.startswith("| ")]
    glossary = {cells[1].strip(): cells[2].replace("`", "").strip() for cells in rows}
    assert {word: glossary.get(word) for word in TERMS} == TERMS


def test_a_word_is_marked_once_where_it_stands_by_itself() -> None:
    marked = with_terms("Text-only behaviour <b> and text-only behaviour")
    assert marked.count("<abbr") == 1 and marked.startswith('<abbr class="term" tabindex="0" title="the metric of that')
    assert marked.endswith("&lt;b&gt; and text-only behaviour")
    assert with_terms("capability, Z, kl & zeal") == "capability, Z, kl &amp; zeal"
    assert "<abbr" in with_terms("z-shift of default text") and "<abbr" in with_terms("KL to base")
    with pytest.raises(KeyError):
        term("no such word")


def test_one_minus_sign_on_the_page(report: Report) -> None:
    assert (
        real_minus("moves it by -0.75 [-1.2, 0.1], half-2, 1-2, 1e-5")
        == "moves it by −0.75 [−1.2, 0.1], half-2, 1-2, 1e-5"
    )
    report.metrics[3].retention = Retention(estimate=None, why="the cap itself moves it by -0.01")
    report.training["least"] = -0.5
    page = Page(render_html(report))
    assert "moves it by −0.01" in page.text and "least −0.5" in page.text
    for figure in page.figures:
        for trace in figure["data"]:
            assert ":." not in trace.get("hovertemplate", ""), "plotly writes a hyphen for a minus"
            assert not any("-" in text for text in trace.get("customdata", []) if text[:2].strip("-").isdigit())
    hyphen = re.compile(r"(?<![\w.])-(?=\d)")
    said = "it moves by -0.5"
    report.verdict.headline = report.verdict.points[0] = report.warnings[0] = report.does_not_compare[0] = said
    report.claims[0].says = report.claims[0].rule = report.claims[0].name = report.claims[2].says = said
    report.metrics[0].meaning = report.side_effects[0].meaning = report.durability[0].meaning = said
    report.side_effects[0].name = report.transcripts[0].note = said
    report.rates = [rates("by_kind", said), rates("refused", said)]
    report.repeat = {}  # commands and recipes keep theirs
    text = Page(render_html(report)).text
    assert text.count("it moves by −0.5") > 14 and not hyphen.findall(text)
    facts = {"base_model": "x", "license": "mit", "margin": -0.5, "layers": [-1, 2], "name": "a-1"}
    card = model_card(report, adapter_facts=facts)
    assert "undefined: the cap itself moves it by −0.01" in card
    assert "- margin: −0.5\n- layers: −1, 2\n- name: a-1" in card
    assert card.count("it moves by −0.5") == 5 and not hyphen.findall(card.split("---\n", 2)[2])
    drift = page.figures[1]["data"][-1]
    assert drift["customdata"][0] == "−2.80" and drift["y"][0] == pytest.approx(-2.8)


@pytest.fixture
def opened(browser: Any, report: Report, tmp_path: Path) -> Iterator[Any]:
    path = write_report(report, tmp_path)
    page = browser.new_page(viewport={"width": 390, "height": 900})
    faults: list[str] = []
    page.on("pageerror", lambda fault: faults.append(str(fault)))
    page.goto(path.as_uri())
    yield page
    page.close()
    assert faults == []


@pytest.mark.slow
def test_answers_are_filtered_sorted_and_drawn_in_parts(opened: Any) -> None:
    def column(name: str) -> list[str]:
        cells: list[str] = opened.locator(f"#read td[data-label='{name}']").all_text_contents()
        return cells

    assert column("log-odds")[:2] == ["+33.10", "+32.10"] and len(column("words")) == 10
    assert opened.locator("#read-shown").text_content() == "10 of 36"
    opened.click("#read-more")
    assert len(column("words")) == 35
    opened.click("#read-more")
    assert len(column("words")) == 36 and opened.locator("#read-more").is_hidden()
    opened.select_option("#read-order", "persona up")
    assert column("log-odds")[0] == "−1.90"
    opened.select_option("#read-arm", "base")
    assert column("log-odds")[0] == "−2.90"
    opened.select_option("#read-order", "relevance up")
    assert column("relevance")[0] == "0.15"
    opened.select_option("#read-suite", "conversation")
    assert set(opened.locator("#read .tag").all_text_contents()) == {"conversation"}
    assert opened.locator("#read-shown").text_content() == "10 of 12"
    opened.locator("#read summary").first.click()
    opened.wait_for_selector("#read .answer")
    assert opened.locator("#read .answer").count() == 5
    assert opened.evaluate("document.documentElement.scrollWidth") <= 390


@pytest.mark.slow
def test_a_word_is_explained_by_tap_and_keyboard(opened: Any) -> None:
    tip = opened.locator("#tip")
    assert tip.is_hidden()
    opened.locator("#example .term").first.click()
    assert tip.text_content() == TERMS["reader"]
    box = tip.bounding_box()
    assert box["x"] >= 0 and box["x"] + box["width"] <= 390
    opened.keyboard.press("Escape")
    assert tip.is_hidden()
    opened.keyboard.press("Tab")
    assert tip.text_content() == TERMS["log-odds"]


@pytest.mark.slow
def test_transcripts_are_put_in_order_of_the_reader(browser: Any, report: Report, tmp_path: Path) -> None:
    for transcript, score in zip(report.transcripts, (0.5, 2.5, None), strict=True):
        answer = transcript.turns[0].answers["tuned"]
        transcript.turns[0].answers["tuned"] = answer.model_copy(update={"persona": score})
    page = browser.new_page()
    page.goto(write_report(report, tmp_path).as_uri())
    page.select_option("#order", "persona")
    ids = [report.transcripts[index].id for index in (1, 0, 2)]
    assert page.locator("#transcripts .id").all_text_contents() == ids
    page.select_option("#order", "")
    assert page.locator("#transcripts .id").all_text_contents() == [one.id for one in report.transcripts]
    page.close()
    assert json.loads((tmp_path / "report.json").read_text())["answers"]
