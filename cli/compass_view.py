"""How the compass shows a course: a table for the terminal, and a page that needs no network."""

from __future__ import annotations

import html
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.table import Table
from rich.text import Text

from trimtab.axis.compass import Course, TurnReading
from trimtab.axis.files import write_text

SHOWN = 48  # characters of a turn in the table
# Blue toward the Assistant and orange away from it: told apart with any colour vision.
TOWARD, AWAY = (29, 78, 216), (217, 119, 6)

STYLE = """
body { margin: 2rem auto; max-width: 64rem; padding: 0 1rem; font: 16px/1.55 system-ui, sans-serif; color: #1b1f26; }
.turn { margin: .8rem 0; padding: .4rem .8rem; border-left: 4px solid #dde1e7; overflow-wrap: anywhere; }
.turn span { white-space: pre-wrap; }
.turn.assistant { border-color: #1d4ed8; }
.turn b { display: block; font-size: .85rem; color: #59616e; }
"""


def render_table(course: Course) -> Table:
    """A table of the turns, with the drift from the first to the last answer beneath."""
    names = ["#", "role", "tokens", course.unit, *(["below"] if course.floor is not None else [])]
    rows = []
    for turn in course.turns:
        row = [str(turn.message + 1), turn.role, str(turn.end - turn.start), _number(turn.value)]
        if course.floor is not None:
            row.append("-" if turn.below is None else f"{turn.below:.0%}")
        rows.append(row)
    table = Table(title=Text(course.title + (" (cap on)" if course.capped else "")), caption=Text(summary(course)))
    for name, *cells in zip(names, *rows, strict=True):
        # as wide as it needs: on a narrow terminal the text wraps, not the numbers
        table.add_column(
            name, justify="left" if name == "role" else "right", min_width=max(map(len, (name, *cells))), no_wrap=True
        )
    table.add_column("text")
    for turn, row in zip(course.turns, rows, strict=True):
        excerpt = " ".join("".join(text for text, _ in turn.pieces)[: 4 * SHOWN].split())[:SHOWN]
        # the assistant's turns are what the compass is about; the others give the context
        table.add_row(*map(Text, row), Text(excerpt), style="" if turn.role == "assistant" else "dim")
    return table


def summary(course: Course) -> str:
    """One sentence on how the answers moved."""
    answers = [turn.value for turn in course.assistant if turn.value is not None]
    if not answers:
        return "no answer has any tokens"
    moved = f"from the first to the last answer: {_number(answers[0])} to {_number(answers[-1])}"
    height = "" if course.floor is None else f"; the floor is at {_number(course.floor)}"
    return f"{course.unit}, + is Assistant, mean of layers {course.layers[0]}-{course.layers[-1]}; {moved}{height}"


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:+.2f}"


def write_plot(path: str | Path, courses: Course | Sequence[Course]) -> None:
    """Write a self-contained HTML page: for each course its plot, its layers, and its text coloured token by token.

    The page holds plotly's own source, about 5 MB, and loads nothing. It is written whole or not at all.
    """
    from plotly.offline import get_plotlyjs

    courses = [courses] if isinstance(courses, Course) else list(courses)
    body = "\n".join(_section(course) for course in courses)
    write_text(
        path,
        '<!doctype html>\n<html lang="en">\n<head><meta charset="utf-8"><title>trimtab compass</title>'
        f"<style>{STYLE}</style>\n<script>{get_plotlyjs()}</script></head>\n<body>\n{body}\n</body>\n</html>\n",
    )


def _section(course: Course) -> str:
    title = html.escape(course.title + (" (cap on)" if course.capped else ""))
    parts = [f"<section>\n<h1>{title}</h1>\n<p>{html.escape(summary(course))}</p>"]
    if course.assistant:
        parts += [_html(_curve(course)), _html(_layers(course))]
    colours = _Colours(course)
    parts += [_coloured(turn, colours) for turn in course.turns]
    return "\n".join([*parts, "</section>"])


def _html(figure: Any) -> str:
    text: str = figure.to_html(full_html=False, include_plotlyjs=False, config={"displaylogo": False})
    return text


def _curve(course: Course) -> Any:
    import plotly.graph_objects as go

    figure = go.Figure()
    for role, colour, dash in (("user", "#8a93a3", "dot"), ("assistant", "#1d4ed8", "solid")):
        turns = [turn for turn in course.turns if turn.role == role and turn.value is not None]
        figure.add_scatter(
            x=[turn.message + 1 for turn in turns],
            y=[turn.value for turn in turns],
            name=role,
            mode="lines+markers",
            line={"color": colour, "dash": dash},
        )
    if course.floor is not None:
        figure.add_hline(y=course.floor, line={"color": "#b45309", "dash": "dash"}, annotation_text="floor")
    figure.update_layout(
        template="plotly_white", height=360, xaxis_title="message", yaxis_title=course.unit, hovermode="x unified"
    )
    return figure


def _layers(course: Course) -> Any:
    import plotly.graph_objects as go

    turns = course.assistant
    figure = go.Figure(
        go.Heatmap(
            x=[str(turn.message + 1) for turn in turns],
            y=[str(layer) for layer in course.layers],
            z=[list(row) for row in zip(*(turn.layers for turn in turns), strict=True)],
            colorscale=[[0, f"rgb{AWAY}"], [0.5, "#ffffff"], [1, f"rgb{TOWARD}"]],
            zmid=_Colours(course).centre,
            colorbar={"title": {"text": course.unit}},
        )
    )
    figure.update_layout(
        template="plotly_white", height=320, xaxis_title="assistant message", yaxis_title="decoder layer"
    )
    figure.update_xaxes(type="category")
    figure.update_yaxes(type="category")
    return figure


class _Colours:
    """Shade of a token: none at the floor (without one, at the mean answer), full at the distance that 95 % lie within."""

    def __init__(self, course: Course) -> None:
        answers = [turn.value for turn in course.assistant if turn.value is not None]
        self.centre = course.floor if course.floor is not None else statistics.fmean(answers) if answers else 0.0
        distances = sorted(abs(value - self.centre) for turn in course.turns for _, value in turn.pieces)
        self.reach = (distances[int(0.95 * (len(distances) - 1))] if distances else 0.0) or 1.0

    def shade(self, value: float) -> str:
        strength = min(abs(value - self.centre) / self.reach, 1.0)
        red, green, blue = TOWARD if value >= self.centre else AWAY
        return f"rgba({red},{green},{blue},{0.55 * strength:.2f})"


def _coloured(turn: TurnReading, colours: _Colours) -> str:
    pieces = "".join(
        f'<span style="background:{colours.shade(value)}" title="{value:+.2f}">{html.escape(text)}</span>'
        for text, value in turn.pieces
    )
    role = html.escape(turn.role)
    kind = "assistant" if turn.role == "assistant" else "other"
    return f'<div class="turn {kind}"><b>{turn.message + 1} {role} {_number(turn.value)}</b>{pieces}</div>'
