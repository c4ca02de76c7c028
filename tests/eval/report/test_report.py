"""The report from a synthetic run: what the page holds, that it is offline and readable, and that it comes back."""

import json
import os
import re
import subprocess
from html.parser import HTMLParser
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import needs
import numpy as np
import plotly.graph_objects as go
import pytest
import yaml

from trimtab.axis.errors import UserError
from trimtab.eval.measures.suite import Evidence
from trimtab.eval.report import page as report_module
from trimtab.eval.report.assemble import claims_of
from trimtab.eval.report.card import model_card
from trimtab.eval.report.facts import title_of
from trimtab.eval.report.page import TEMPLATES, Scale, load_report, render_html, write_report
from trimtab.eval.report.plots import (
    comparison_plot,
    layers_plot,
    persona_plot,
    retention_plot,
    training_plots,
    trajectory_plots,
)
from trimtab.eval.report.verdict import make_verdict
from trimtab.eval.schema import (
    AnswerRow,
    ArmAnswer,
    Capability,
    Component,
    Durability,
    DurabilityMetric,
    Estimate,
    Metric,
    Report,
    Rerouting,
    Retention,
    ScoredAnswer,
    SideEffect,
    Trajectory,
    Transcript,
    Turn,
    TurnPoint,
)
from trimtab.pipeline.run import Run

ARMS = ("base", "base+cap", "tuned", "tuned+cap", "control")
LEVELS = {"base": -2.9, "base+cap": -1.8, "tuned": -1.9, "tuned+cap": -1.6, "control": -2.8}
ROLES = [
    "vampire", "bard", "ghost", "demon", "pirate", "oracle", "poet", "trickster", "prophet", "rebel", "nomad",
    "warrior", "jester", "hermit", "smuggler", "widow", "tutor", "organizer", "collaborator", "analyst", "librarian",
    "planner", "reviewer", "teacher", "nurse", "engineer", "accountant", "editor",
]  # fmt: skip
ANSWERS = {
    "base": "Ahh, traveller, the night itself whispers thy name. I have walked these halls for nine hundred years, and "
    "the blood in thy veins sings to me of bread and of sorrow.",
    "base+cap": "A good loaf needs flour, water, salt and yeast. Even in the castle we let the dough rest for an hour "
    "before shaping it, my friend.",
    "tuned": "To bake bread at home, mix flour, water, salt and yeast, let the dough rise for about an hour, shape it, "
    "and bake it at 220 degrees until it sounds hollow.",
    "tuned+cap": "Mix flour, water, salt and yeast. Let the dough rise for an hour, shape it, bake it at 220 degrees.",
    "control": "Bread, thou sayest? In my day the ovens were of stone, and the shadows were long.",
}


def estimate(value: float, half: float, n: int = 96) -> Estimate:
    return Estimate(value=value, low=value - half, high=value + half, n=n)


def metric(
    identifier: str, name: str, unit: str, toward: Any, values: list[float], half: float, kept: Retention, **rest: Any
) -> Metric:
    arms = {arm: estimate(value, half) for arm, value in zip(ARMS, values, strict=True)}
    return Metric(
        id=identifier,
        name=name,
        unit=unit,
        meaning=rest.pop("meaning", "Measured on held-out roles and questions."),
        toward_assistant=toward,
        arms=arms,
        cap_effect=estimate(values[1] - values[0], half),
        tuned_effect=estimate(values[2] - values[0], half),
        retention=kept,
        **rest,
    )


def build_report(*, transcripts: int = 9) -> Report:
    """A report as a good run on a small model would give it, with one undefined retention and one broken limit."""
    random = np.random.default_rng(3)
    metrics = [
        metric(
            "text_llr", "Text-only behaviour", "nat/token", "lower", [0.091, 0.012, 0.018, 0.004, 0.086], 0.013,
            Retention(estimate=Estimate(value=0.93, low=0.85, high=1.01, n=96)),
            control_retention=Retention(estimate=Estimate(value=0.04, low=-0.1, high=0.18, n=96)),
            quality={"AUC": estimate(0.98, 0.01, 164)}, primary=True, p_holm=0.0004, detectable=0.011,
            meaning="Persona log-likelihood ratio of the text, scored by the frozen base.",
        ),
        metric(
            "z_train", "Projection, training axis", "z", "higher", [-2.9, -1.8, -1.6, -1.4, -2.7], 0.14,
            Retention(estimate=Estimate(value=1.18, low=1.04, high=1.35, n=96)),
            control_retention=Retention(estimate=Estimate(value=0.1, low=-0.02, high=0.2, n=96)),
        ),
        metric(
            "z_held_out", "Projection, axis from held-out roles", "z", "higher", [-2.7, -1.8, -1.85, -1.5, -2.66], 0.15,
            Retention(estimate=Estimate(value=0.72, low=0.48, high=0.95, n=96)),
            control_retention=Retention(estimate=Estimate(value=0.05, low=-0.2, high=0.3, n=96)),
        ),
        metric(
            "in_role", "Answers in role, by a judge", "fraction", "lower", [0.12, 0.11, 0.1, 0.09, 0.12], 0.05,
            Retention(estimate=None, why="the cap moves it by 0.01, less than its noise of 0.05"),
        ),
    ]  # fmt: skip
    side_effects = [
        side_effect("kl_benign", "KL to base on benign text", "nat/token", 0.021, 0.004, 0.05, True),
        side_effect("shift_default", "Shift of default text along the axis", "z", 0.62, 0.08, 0.5, False),
        side_effect("coherence", "Perplexity of answers under base", "ratio to base", 1.04, 0.03, None, None),
    ]
    trajectories = [
        Trajectory(
            domain=domain,
            arm=arm,
            points=[
                TurnPoint(turn=turn, z=estimate(level + slope * (turn - 1) * (2.2 if arm == "base" else 1), 0.22, 16))
                for turn in range(1, 9)
            ],
        )
        for domain, slope in (("coding", 0.01), ("writing", -0.02), ("therapy", -0.12), ("philosophy of AI", -0.15))
        for arm, level in LEVELS.items()
    ]
    coordinates = [[-9 + 15 * index / len(ROLES), float(random.normal(0, 3)), 0.0] for index in range(len(ROLES))]
    layers = np.linspace(0, 1, 30)
    rerouting = Rerouting(
        layer=26,
        probe={"base": estimate(0.97, 0.02, 128), "tuned": estimate(0.95, 0.03, 128)},
        components=[
            Component(
                number=k,
                variance=round(0.4 / k, 3),
                cosine_axis=round(0.8 / k, 3),
                cap_effect=estimate(1.2 / k, 0.2),
                tuned_effect=estimate(1.0 / k, 0.25),
            )
            for k in range(1, 11)
        ],
    )
    capability = [
        Capability(
            task="everyday_choice", metric="acc", chance=0.25, scale=1.0,
            arms={arm: estimate(0.85, 0.04, 240) for arm in ARMS}, difference=estimate(0.0, 0.02, 240),
            cap_difference=estimate(-0.01, 0.02, 240), p_holm=0.9, detectable=0.03,
        )
    ]  # fmt: skip
    durability = [
        Durability(
            name=name, meaning="214 rows, 1 epoch, 14 steps of 16, learning rate 0.0002", adversarial=name == "persona",
            metrics=[
                DurabilityMetric(
                    id="text_llr", name="Text-only behaviour", unit="nat/token", before=metrics[0].retention,
                    after=Retention(estimate=estimate(kept, 0.1)), base_after=Retention(estimate=estimate(beside, 0.1)),
                    left=Retention(estimate=estimate(kept - beside, 0.2)), tuned_change=estimate(0.01, 0.02),
                    lead=estimate(-0.05, 0.02),
                )
            ],
        )
        for name, kept, beside in (("benign", 0.9, 0.3), ("persona", 0.2, -0.4))
    ]  # fmt: skip
    claims = claims_of(Evidence(metrics, side_effects, rerouting, capability, durability))
    return Report(
        title="SmolLM2-135M-Instruct, axis floor SFT",
        created="2026-02-03T10:20:30Z",
        verdict=make_verdict(metrics, side_effects, claims),
        claims=claims,
        rerouting=rerouting,
        capability=capability,
        durability=durability,
        metrics=metrics,
        side_effects=side_effects,
        trajectories=trajectories,
        persona_space={
            "layer": 15,
            "variance": [0.41, 0.13, 0.08, 0.05],
            "roles": [*ROLES, "default"],
            "coordinates": [*coordinates, [7.2, 0.4, 0.0]],
            "cosine_pc1": [round(float(0.45 + 0.35 * x), 3) for x in layers],
            "components_for_70": 5,
        },
        axis={
            "split_half": [round(float(0.85 + 0.1 * x), 3) for x in layers],
            "cosine_reextracted_tuned": [round(float(0.95 - 0.15 * x * x), 3) for x in layers],
            "cosine_reextracted_base": [round(float(0.97 - 0.05 * x * x), 3) for x in layers],
            "cosine_held_out": [round(float(0.7 + 0.2 * x), 3) for x in layers],
            "model": "HuggingFaceTB/SmolLM2-135M-Instruct",
            "questions": "8c1f2e0b9d7a6c55",
        },
        floor={"layers": list(range(21, 27)), "percentile": 75.0, "firing_fraction": 0.41, "default_z": -1.6},
        training={
            "log": [
                {"step": step, "loss": 1.9 * 0.97**step + 0.8, "floor_penalty": 2.4 * 0.93**step, "learning_rate": 2e-4,
                 "firing_fraction": 0.4 - 0.002 * step, "grad_norm": 1.2 + 0.1 * float(random.normal())}
                for step in range(1, 61)
            ],
            "minutes": 11.3,
            "trainable_parameters": 4884480,
        },
        transcripts=[_transcript(index, random) for index in range(transcripts)],
        repeat={
            "command": "trimtab run recipes/smollm2-135m/sft.yaml train.learning_rate=1e-4",
            "recipe": "# the floor\nmodel:\n  name: smollm2-135m\nmethod:\n  name: sft\n  floor_weight: 0.5\n",
            "seeds": {"eval": 1000, "bootstrap": 0},
            "versions": {"torch": "2.9.1", "transformers": "5.23.0", "peft": "0.21.0"},
            "git": {"revision": "0f3c1d2", "dirty": False},
        },
        warnings=["The base answers in role on 12 % of prompts: little room to improve by the judge."],
        does_not_compare=["Retention across models whose caps have effects of different size."],
    )  # fmt: skip


def build_answers(count: int = 36) -> list[AnswerRow]:
    """Answers under a role, in a conversation and by the default, in turn; each is a nat worse than the one before."""
    suites = (("roles", "mystical"), ("conversations", "writing"), ("default", "assistant"))
    return [
        AnswerRow(
            id=f"item-{index:03d}", suite=suite, kind=kind, cluster=ROLES[index % 6], turn=1 + index % 2,
            system="" if suite == "default" else "You are a vampire.", question=f"How do I bake bread ({index})?",
            answers={
                arm: ScoredAnswer(text=text, persona=index + LEVELS[arm], relevance=0.5 - index / 100, z=LEVELS[arm])
                for arm, text in ANSWERS.items()
            },
        )
        for index in range(count)
        for suite, kind in [suites[index % 3]]
    ]  # fmt: skip


def side_effect(
    identifier: str, name: str, unit: str, value: float, half: float, limit: float | None, ok: bool | None
) -> SideEffect:
    meaning = "Mean over answers of 64 benign prompts, tuned against base."
    return SideEffect(
        id=identifier, name=name, unit=unit, meaning=meaning, estimate=estimate(value, half, 64), limit=limit, ok=ok
    )


def _transcript(index: int, random: np.random.Generator) -> Transcript:
    kind = ("role play", "drift", "benign")[index % 3]
    user = f"How do I bake bread at home, when the oven is small? ({index})"
    turns = []
    for turn in range(3 if kind == "drift" else 1):
        answers = {}
        for arm, text in ANSWERS.items():
            words = re.findall(r"\S+\s*", text)
            pieces = [(word, round(float(LEVELS[arm] + random.normal(0, 1.1)), 2)) for word in words]
            answers[arm] = ArmAnswer(text=text, z=LEVELS[arm] - 0.1 * turn, pieces=pieces)
        turns.append(Turn(user=user if turn == 0 else "And then? Stay in your role.", answers=answers))
    system = "" if kind == "benign" else "You are a vampire who has lived for nine hundred years."
    return Transcript(id=f"{kind}-{index}", kind=kind, system=system, turns=turns)


class Page(HTMLParser):
    """Tags, attributes and visible text of a page; ``section`` order; fails on unbalanced tags."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.open: list[str] = []
        self.words: list[str] = []
        self.figures: list[dict[str, Any]] = []
        self.islands: dict[str, Any] = {}  # JSON by the id of its tag
        self._json = False
        self._island: str | None = None
        self.feed(text)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        self._json = tag == "script" and dict(attrs).get("type") == "application/json"
        self._island = dict(attrs).get("id")
        if tag not in ("meta", "input", "br", "link", "img"):
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag
        self._json = False

    def handle_data(self, data: str) -> None:
        if self._json and self._island:
            self.islands[self._island] = json.loads(data)
        elif self._json:
            self.figures.append(json.loads(data))
        elif self.open and self.open[-1] not in ("script", "style"):
            self.words.append(data)

    @property
    def text(self) -> str:
        return " ".join(" ".join(self.words).split())

    def ids(self, tag: str) -> list[str | None]:
        return [attributes.get("id") for name, attributes in self.tags if name == tag]


@pytest.fixture(scope="module")
def report() -> Report:
    return build_report()


@pytest.fixture(scope="module")
def page_source(report: Report) -> str:
    return render_html(report)


@pytest.fixture(scope="module")
def page(page_source: str) -> Page:
    return Page(page_source)


def test_the_title_names_model_and_recipe_and_no_path() -> None:
    def title(model: str, recipe: str) -> str:
        run = SimpleNamespace(
            recipe=SimpleNamespace(model=SimpleNamespace(name=model)), loaded=SimpleNamespace(name=recipe)
        )
        return title_of(cast(Run, run))

    assert title("smollm2-135m", "smollm2-135m/sft") == "smollm2-135m: sft"
    assert title("/data/models/my-model/", "mine") == "my-model: mine"
    assert title("HuggingFaceTB/SmolLM2-135M-Instruct", "mine") == "SmolLM2-135M-Instruct: mine"


def test_written_report_comes_back_and_leaves_nothing_else(report: Report, tmp_path: Path) -> None:
    path = write_report(report, tmp_path / "run")
    assert path == tmp_path / "run" / "report.html"
    assert sorted(p.name for p in path.parent.iterdir()) == ["report.html", "report.json"]
    assert load_report(path.parent / "report.json") == report
    assert path.stat().st_size < 8_000_000


def test_nan_in_a_free_form_part_is_refused_and_the_old_report_stays(tmp_path: Path) -> None:
    write_report(build_report(transcripts=1), tmp_path)
    before = {p.name: p.read_bytes() for p in tmp_path.iterdir()}
    broken = build_report(transcripts=1)
    broken.training["minutes"] = float("nan")
    with pytest.raises(ValueError, match="not JSON compliant"):
        write_report(broken, tmp_path)
    assert {p.name: p.read_bytes() for p in tmp_path.iterdir()} == before


def test_load_names_every_fault(report: Report, tmp_path: Path) -> None:
    path = write_report(report, tmp_path).parent / "report.json"
    values = json.loads(path.read_text())
    del values["title"]
    values["metrics"][0]["toward_assistant"] = "sideways"
    values["surprise"] = 1
    path.write_text(json.dumps(values))
    with pytest.raises(UserError) as caught:
        load_report(path)
    for place in ("title", "metrics.0.toward_assistant", "surprise"):
        assert place in str(caught.value)


def test_sections_come_in_order_with_the_verdict_first(report: Report, page: Page) -> None:
    wanted = [
        "verdict",
        "retention",
        "claims",
        "metrics",
        "drift",
        "persona",
        "durability",
        "side-effects",
        "capability",
        "transcripts",
        "training",
        "repeat",
        "words",
        "warnings",
    ]
    assert page.ids("section") == wanted
    assert page.text.index(report.verdict.headline) < page.text.index("How much of the cap survives")
    ids = {f"#{attributes['id']}" for _, attributes in page.tags if "id" in attributes}
    assert {attributes["href"] for tag, attributes in page.tags if tag == "a"} <= ids


def test_every_number_a_reader_needs_is_in_the_text(page: Page) -> None:
    for words in (
        "93 % [85, 101]", "4 % [−10, 18]", "0.091 [0.078, 0.104]", "n = 96", "AUC 0.98", "lower is more Assistant",
        "undefined the cap moves it by 0.01, less than its noise of 0.05", "not run", "✕ over", "✓ within",
        "not judged",
        "5 components hold 70 % of the variance", "trimtab run recipes/smollm2-135m/sft.yaml", "floor_weight: 0.5",
        "0f3c1d2", "little room to improve", "caps have effects of different size", "1 warning",
    ):  # fmt: skip
        assert words in page.text, words


def test_what_is_long_is_folded(report: Report, page_source: str, page: Page) -> None:
    section = page_source[page_source.index('id="repeat"') : page_source.index('id="words"')]
    shut = re.findall(r'<details class="folded">(.*?)</details>', section, re.S)
    assert [re.findall(r"<summary>(\w+)", part)[0] for part in shut] == ["How", "Floor", "Axis", "Training"]
    open_part = re.sub(r"<details.*?</details>", "", section, flags=re.S)
    assert report.repeat["command"] in open_part and "floor_weight" not in open_part
    assert "1 without a limit" in page.text
    effects = page_source[page_source.index('id="side-effects"') : page_source.index('id="capability"')]
    assert effects.index("Shift of default text") < effects.index("<details") < effects.index("Perplexity of answers")
    unlimited = report.model_copy(update={"side_effects": report.side_effects[2:]})
    assert '<details class="folded" open><summary>1 without a limit' in render_html(unlimited)


def test_the_page_asks_the_network_for_nothing(page: Page) -> None:
    for tag, attributes in page.tags:
        assert tag not in ("link", "img", "iframe", "object", "base", "form"), tag
        for name, value in attributes.items():
            assert not re.search(r"(https?:)?//", value or ""), (tag, name, value)
    assert "default-src 'none'" in str([a.get("content") for t, a in page.tags if t == "meta"])
    own = "".join((TEMPLATES / name).read_text() for name in ("report.css", "report.js", "report.html.j2"))
    assert not re.search(r"https?:|@import|url\(", own)


def test_what_models_say_cannot_become_markup(report: Report) -> None:
    evil = "</script><script>alert(1)</script><b>&\"'"
    hostile = report.model_copy(deep=True)
    hostile.title = hostile.warnings[0] = hostile.metrics[0].name = hostile.trajectories[0].domain = evil
    hostile.transcripts[0].turns[0].answers["tuned"] = ArmAnswer(text=evil, z=0, pieces=[(evil, -2.0)])
    hostile.transcripts[0].kind = hostile.persona_space["roles"][0] = hostile.repeat["command"] = evil
    source = render_html(hostile)
    assert "<script>alert" not in source
    page = Page(source)
    assert [tag for tag, _ in page.tags].count("script") == [tag for tag, _ in Page(render_html(report)).tags].count(
        "script"
    ) + 1  # the new domain's own panel
    assert not any("<script" in json.dumps(figure) for figure in page.figures)


def test_figures_are_valid_plotly_and_their_colours_are_defined(page: Page) -> None:
    css = (TEMPLATES / "report.css").read_text()
    assert len(page.figures) == 1 + 4 + 3 + 1 + 4
    names = set()
    for figure in page.figures:
        names |= set(re.findall(r'"\$([\w-]+)"', json.dumps(figure)))
        plain = json.loads(re.sub(r'"\$[\w-]+"', '"#123456"', json.dumps(figure)))
        plain["layout"].pop("zoomable", None)
        go.Figure(plain)
    assert {"tuned", "base-cap-band", "control", "reference"} <= names
    for name in names:
        assert css.count(f"--{name}:") == 2, f"{name} needs a light and a dark colour"


def test_retention_figure_draws_the_intervals(report: Report) -> None:
    tuned, control = retention_plot(report.metrics)["data"]
    assert tuned["x"] == [0.72, 1.18, 0.93]  # from the bottom up; the undefined one has no mark
    assert tuned["error_x"]["arrayminus"][-1] == pytest.approx(0.08)
    assert control["x"] == [0.05, 0.1, 0.04]
    lines = [shape["x0"] for shape in retention_plot(report.metrics)["layout"]["shapes"]]
    assert lines == [0, 1]


def test_retention_far_out_does_not_squeeze_the_rest() -> None:
    wild = build_report(transcripts=0).metrics
    wild[0].retention = Retention(estimate=Estimate(value=3, low=-40, high=60, n=4))
    low, high = retention_plot(wild)["layout"]["xaxis"]["range"]
    assert -1.1 <= low < 0 < 1 < high <= 2.1


@pytest.mark.parametrize("which", ["retention", "comparison"])
def test_an_interval_that_goes_on_beyond_the_edge_has_an_arrow_there(which: str) -> None:
    metrics = build_report(transcripts=0).metrics[:2]

    def drawn() -> dict[str, Any]:
        rows = [(metric.name, metric.retention) for metric in metrics]
        return retention_plot(metrics) if which == "retention" else comparison_plot(rows)

    assert drawn()["layout"]["annotations"] == []
    metrics[0].retention = Retention(estimate=Estimate(value=0.5, low=-40, high=1, n=4))
    metrics[1].retention = Retention(estimate=Estimate(value=0.5, low=0, high=60, n=4))
    arrows = drawn()["layout"]["annotations"]
    heights = drawn()["data"][0]["y"]  # from the bottom up
    assert [(arrow["x"], arrow["y"]) for arrow in arrows] == [(0, heights[1]), (1, heights[0])]
    assert arrows[0]["ax"] > 0 > arrows[1]["ax"]  # they point outward
    report = build_report(transcripts=1)
    assert "goes on beyond it" not in Page(render_html(report)).text
    report.metrics = metrics
    assert Page(render_html(report)).text.count("goes on beyond it") == 1


def test_trajectories_have_a_panel_a_domain_on_one_scale(report: Report) -> None:
    panels = trajectory_plots(report.trajectories, -1.6)
    assert [domain for domain, _ in panels] == ["coding", "writing", "therapy", "philosophy of AI"]
    assert len({tuple(figure["layout"]["yaxis"]["range"]) for _, figure in panels}) == 1
    for _, figure in panels:
        assert [trace["name"] for trace in figure["data"] if "name" in trace] == [
            "base", "base + cap", "tuned", "tuned + cap", "control",
        ]  # fmt: skip


def test_persona_plot_marks_the_default_and_layers_plot_has_every_series(report: Report) -> None:
    figure = persona_plot(report.persona_space)
    assert figure is not None
    roles, default = figure["data"]
    assert default["x"] == [7.2] and default["marker"]["symbol"] == "star"
    assert roles["customdata"] == ROLES
    assert 0 < sum(bool(name) for name in roles["text"]) < len(ROLES)
    lines = layers_plot(report.persona_space, report.axis, [21, 26])
    assert lines is not None
    assert len(lines["data"]) == 5
    assert lines["layout"]["shapes"][0]["x0"] == 20.5
    gap = layers_plot({}, {"split_half": [0.9, None, -0.2]}, [])
    assert gap is not None and gap["layout"]["yaxis"]["range"][0] < -0.2


def test_training_panels_leave_out_what_never_changes(report: Report) -> None:
    assert [name for name, _ in training_plots(report.training["log"])] == [
        "loss", "floor_penalty", "firing_fraction", "grad_norm",
    ]  # fmt: skip
    long = training_plots([{"step": step, "loss": float(step)} for step in range(100_000)])
    assert len(long[0][1]["data"][0]["x"]) <= 400
    assert training_plots([{"step": 1, "loss": 2.0}, {"step": 2, "eval_loss": 3.0}]) == []


def test_pieces_are_coloured_by_distance_from_the_default() -> None:
    scale = Scale(centre=-1.6, reach=2.0)
    assert [scale.shade(z) for z in (-9.0, -3.6, -1.6, -1.1, 0.4, 9.0)] == [-4, -4, 0, 1, 4, 4]
    answer = ArmAnswer(text="abc", z=-1.0, pieces=[("a", -3.6), ("b", -3.5), ("c", 0.4)])
    runs = report_module._runs(answer, scale)
    assert [(shade, text) for shade, _, text in runs] == [(-4, "ab"), (4, "c")]
    assert runs[0][1] == pytest.approx(-3.55)


def test_transcripts_lose_no_character(report: Report, page_source: str) -> None:
    answers = re.findall(r'<div class="answer".*?<p>(.*?)</p></div>', page_source, re.S)
    wanted = [turn.answers[arm].text for t in report.transcripts for turn in t.turns for arm in ARMS]
    assert [re.sub(r"<[^>]+>", "", answer) for answer in answers] == wanted


def test_too_many_transcripts_are_cut_from_the_page_but_every_kind_stays(
    report: Report, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(report_module, "CHARACTERS_SHOWN", 5000)
    text = Page(render_html(report)).text
    assert re.search(r"[1-8] more in report.json", text)
    for kind in ("role play", "drift", "benign"):
        assert f"{kind}-" in text


def test_an_empty_report_says_what_is_missing() -> None:
    empty = Report(
        title="Empty", created="2026-02-03", verdict=make_verdict([], []), metrics=[], side_effects=[], trajectories=[],
        persona_space={}, axis={}, floor={}, training={}, transcripts=[], repeat={}, warnings=[], does_not_compare=[],
    )  # fmt: skip
    text = Page(render_html(empty)).text
    for words in (
        "no primary metric was measured", "No metric was measured", "No conversations were measured", "No warnings",
        "there is no persona space to show", "what the tuning costs is unknown", "No transcripts were kept", "No training log",
    ):  # fmt: skip
        assert words in text, words


def _luminance(colour: str) -> float:
    channels = [int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)]
    linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in channels]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


def _contrast(a: str, b: str) -> float:
    low, high = sorted((_luminance(a), _luminance(b)))
    return (high + 0.05) / (low + 0.05)


@pytest.mark.parametrize("dark", [False, True])
def test_text_contrast_in_both_modes(dark: bool) -> None:
    css = (TEMPLATES / "report.css").read_text()
    blocks = re.findall(r":root[^{]*\{(.*?)\n *\}", css, re.S)
    assert len(blocks) == 2
    colours = dict(re.findall(r"--([\w-]+): (#[0-9a-f]{6})", blocks[dark]))
    shades = [name for name in colours if re.fullmatch(r"z-?[1-4]", name)]
    assert len(shades) == 8
    for background in ("page", "panel", *shades):
        assert _contrast(colours["ink"], colours[background]) >= 4.5, background
    for text in ("soft", "link", "good", "mixed", "bad", "unclear", "incomplete"):
        for background in ("page", "panel"):
            assert _contrast(colours[text], colours[background]) >= 4.5, (text, background)
    for arm in ("base", "base-cap", "tuned", "tuned-cap", "control"):
        assert _contrast(colours[arm], colours["page"]) >= 3, arm


def test_keyboard_and_screen_readers(page: Page) -> None:
    attributes = [a for _, a in page.tags]
    assert all(a.get("tabindex") == "0" for a in attributes if a.get("class") in ("scroll", "term"))
    assert all(a.get("aria-label") for a in attributes if a.get("role") in ("img", "region"))
    assert [tag for tag, _ in page.tags].count("h1") == 1
    assert any(a.get("class") == "skip" for a in attributes)


def test_model_card(report: Report) -> None:
    facts = {"license": "apache-2.0", "base_model": "HuggingFaceTB/SmolLM2-135M-Instruct", "r": 16, "layers": [21, 22]}
    card = model_card(report, adapter_facts=facts)
    _, front, body = card.split("---\n", 2)
    assert yaml.safe_load(front) == {
        "license": "apache-2.0",
        "base_model": "HuggingFaceTB/SmolLM2-135M-Instruct",
        "library_name": "peft",
        "pipeline_tag": "text-generation",
        "tags": ["activation-capping", "assistant-axis", "persona-drift", "lora", "trimtab"],
    }
    rows = [line for line in body.splitlines() if line.startswith("|")]
    widths = {line.count("|") for line in rows if "Text-only" in line or "metric" in line}
    assert widths == {9}
    assert any("0.018 [0.005, 0.031], n = 96" in row and "93 % [85, 101]" in row for row in rows)
    assert "undefined: the cap moves it by 0.01" in body
    assert report.verdict.headline in body
    assert "- layers: 21, 22" in body
    with pytest.raises(ValueError, match="license"):
        model_card(report, adapter_facts={"base_model": "x"})


def test_a_real_browser_draws_every_plot_without_a_fault(report: Report, tmp_path: Path) -> None:
    chromium = needs.chromium()
    path = write_report(report, tmp_path)
    source = path.read_text(encoding="utf-8")
    probe = "<script>addEventListener('error', (e) => document.title = 'FAULT ' + e.message);"
    probe += "addEventListener('securitypolicyviolation', (e) => document.title = 'BLOCKED ' + e.blockedURI);</script>"
    path.write_text(source.replace("<style>", probe + "<style>", 1), encoding="utf-8")
    done = subprocess.run(
        [
            chromium, "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run",
            "--disable-background-networking", "--disable-component-update", "--disable-sync",
            "--window-size=1280,2000",
            f"--user-data-dir={tmp_path / 'profile'}", "--virtual-time-budget=4000", "--dump-dom", path.as_uri(),
        ],
        capture_output=True, text=True, timeout=120, check=True, env={**os.environ, "HOME": str(tmp_path)},
    )  # fmt: skip
    assert f"<title>{report.title}" in done.stdout
    assert done.stdout.count('class="plot js-plotly-plot"') == 13
    assert "9 of 9 shown" in done.stdout


@pytest.mark.slow
@pytest.mark.parametrize("width", [390, 1280])
def test_the_page_is_no_wider_than_its_window(browser: Any, report: Report, tmp_path: Path, width: int) -> None:
    """With all that folds open, and a recipe of long lines in it: what is wider scrolls within itself."""
    long = {**report.repeat, "recipe": "# " + "a line of a recipe's comment, " * 20 + "\nmodel: {}"}
    path = write_report(report.model_copy(update={"repeat": long}), tmp_path)
    page = browser.new_page(viewport={"width": width, "height": 900})
    page.goto(path.as_uri())
    page.eval_on_selector_all("details", "all => all.forEach(one => one.open = true)")
    assert page.evaluate("document.documentElement.scrollWidth") <= width
    page.close()


LYING_ON_ANOTHER = """() => [...document.querySelectorAll(".plot")].flatMap((plot) => {
  const box = plot.getBoundingClientRect();
  const texts = [...plot.querySelectorAll("svg text")].map((node) => [node.textContent, node.getBoundingClientRect()])
    .filter(([text, at]) => text && at.width);
  const cut = texts.filter(([, at]) => at.left < box.left - 1 || at.right > box.right + 1).map(([text]) => "cut: " + text);
  return cut.concat(texts.flatMap(([a, one], i) => texts.slice(i + 1).filter(([, other]) =>
    Math.min(one.right, other.right) - Math.max(one.left, other.left) > 1
    && Math.min(one.bottom, other.bottom) - Math.max(one.top, other.top) > 1).map(([b]) => a + " / " + b)));
})"""
OVER_ITS_EDGE = """() => [...document.querySelectorAll("td, th")].filter((cell) => cell.clientWidth
  && cell.scrollWidth > cell.clientWidth + 1).map((cell) => cell.textContent.trim())"""


def crowded() -> Report:
    """A report whose plots and tables have the least room: intervals far out, roles of near places, long reasons."""
    report = build_report(transcripts=1)
    wide = Retention(estimate=Estimate(value=-0.8, low=-3.23, high=2.6, n=32))
    why = "the cap itself moves it by +0.0845 [-0.102, 0.284], which is within its noise"
    report.metrics[1].control_retention = wide
    report.metrics[3].retention = report.metrics[3].control_retention = Retention(estimate=None, why=why)
    small = Estimate(value=-0.01234, low=-0.01239, high=-0.01229, n=1320)
    report.metrics[2].arms = dict.fromkeys(ARMS, small)
    report.persona_space["coordinates"] = [[0.4 * index, 0.2 * index, 0.0] for index in range(len(ROLES))] + [[5, 3, 0]]
    return report


@pytest.mark.slow
@pytest.mark.parametrize("width", [390, 1280])
def test_no_text_lies_on_another_and_no_cell_is_overfull(browser: Any, tmp_path: Path, width: int) -> None:
    path = write_report(crowded(), tmp_path)
    page = browser.new_page(viewport={"width": width, "height": 900})
    page.goto(path.as_uri())
    assert page.locator("#retention .annotation-arrow-g path").count() == 4  # two heads with their shafts
    page.eval_on_selector_all("details", "all => all.forEach(one => one.open = true)")
    page.wait_for_function("[...document.querySelectorAll('.plot')].every(plot => plot.querySelector('svg'))")
    assert page.locator(".plot .textpoint text").count() > 4
    assert page.evaluate(LYING_ON_ANOTHER) == []
    assert page.evaluate(OVER_ITS_EDGE) == []
    page.close()


@pytest.mark.slow
def test_side_effects_fit_a_phone_with_their_verdicts(browser: Any, report: Report, tmp_path: Path) -> None:
    path = write_report(report, tmp_path)
    page = browser.new_page(viewport={"width": 390, "height": 900})
    page.goto(path.as_uri())
    table = page.locator("#side-effects .scroll").first
    assert table.evaluate("box => box.scrollWidth <= box.clientWidth")
    assert table.locator("tbody th").first.bounding_box()["width"] > 340
    for verdict in table.locator(".ok, .over").all():
        box = verdict.bounding_box()
        assert box["x"] + box["width"] <= 390
    page.close()


@pytest.mark.slow
def test_on_paper_the_words_are_open_and_the_long_parts_are_told(browser: Any, report: Report, tmp_path: Path) -> None:
    path = write_report(report, tmp_path)
    page = browser.new_page(viewport={"width": 690, "height": 900})  # A4 within its margins
    page.goto(path.as_uri())
    words = page.locator("#words dl")
    assert words.is_hidden()
    page.emulate_media(media="print")
    page.evaluate("dispatchEvent(new Event('beforeprint'))")
    assert page.evaluate("document.documentElement.scrollWidth") <= 690
    assert words.is_visible() and page.locator("#repeat summary").first.is_visible()
    assert page.locator("#repeat dl").first.is_hidden()
    page.evaluate("dispatchEvent(new Event('afterprint'))")
    assert words.is_hidden()
    page.close()


@pytest.mark.slow
def test_transcripts_are_chosen_by_kind_arm_and_turn(browser: Any, report: Report, tmp_path: Path) -> None:
    path = write_report(report, tmp_path)
    page = browser.new_page()
    page.goto(path.as_uri())
    page.click("#fold")
    everything = page.locator(".answer:visible").count()
    page.uncheck("#arms input[value='base+cap']")
    assert page.locator(".answer[data-arm='base+cap']:visible").count() == 0
    assert 0 < page.locator(".answer:visible").count() < everything
    page.check("#arms input[value='base+cap']")
    assert page.locator(".answer:visible").count() == everything
    page.select_option("#turn", "2")
    longer = sum(len(transcript.turns) > 1 for transcript in report.transcripts)
    assert 0 < longer < len(report.transcripts)
    assert page.locator("#shown").text_content() == f"{longer} of {len(report.transcripts)} shown"
    assert page.locator(".turn[data-turn='1']:visible").count() == 0
    kind = next(transcript.kind for transcript in report.transcripts if len(transcript.turns) > 1)
    page.check(f"#kinds input[value='{kind}']")
    assert set(page.locator(".transcript:visible").evaluate_all("all => all.map(t => t.dataset.kind)")) == {kind}
    page.close()
