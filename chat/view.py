"""What the page of ``trimtab chat`` shows of a conversation: columns, meters and the plot of heights over turns.

Plain HTML with every word of user and model escaped: a model's answer can neither load nor run anything.
"""

from __future__ import annotations

import html
import math
from typing import Any

from trimtab.chat.arms import ARMS, ChatAnswer, Dialogue
from trimtab.eval.report.plots import DASHES, SYMBOLS
from trimtab.eval.wording import number

TITLES = {"base": "Base", "base+cap": "Base + cap", "tuned": "Tuned"}
NOTES = {
    "base": "plain weights",
    "base+cap": "capped by hooks",
    "tuned": "tuned weights, no hook",
}
# In the middle between dark and light, so that they can be told from either background.
# Neither blue nor orange, which say above and below.
COLOURS = {"base": "#7d8594", "base+cap": "#9d6bd6", "tuned": "#1f9b8c"}
LEAST_SCALE = 2  # sigma to each side of the floor


def heading_html(arm: str) -> str:
    """An arm's heading, with the colour of its line."""
    return f'<h2><span style="background:{COLOURS[arm]}"></span>{TITLES[arm]} <small>{NOTES[arm]}</small></h2>'


def words(height: float) -> str:
    """A height in words: ``−1.10 sigma, below the floor``."""
    shown = number(height, 2)
    if shown == "0.00":
        return "0.00 sigma, at the floor"
    return f"{shown} sigma, below the floor" if height < 0 else f"+{shown} sigma, above the floor"


def scale_of(talk: Dialogue) -> int:
    """Sigma from the floor to either end of the meters: the same for all arms, so that they compare."""
    heights = [abs(height) for arm in ARMS for height in heights_of(talk, arm) if height is not None]
    return max([LEAST_SCALE, *(math.ceil(height) for height in heights)])


def heights_of(talk: Dialogue, arm: str) -> list[float | None]:
    """An arm's height at each turn; None where it has not answered or its answer has no tokens."""
    answers = [turn.answers.get(arm) for turn in talk.turns]
    return [None if answer is None else answer.height for answer in answers]


def column_html(talk: Dialogue, arm: str) -> str:
    """The conversation with one arm. Below each answer its height, and whether it was cut."""
    parts = []
    for turn in talk.turns:
        parts.append(f'<p class="said"><b>You</b>{html.escape(turn.user)}</p>')
        answer = turn.answers.get(arm)
        if answer is None:
            first = next(name for name in ARMS if name not in turn.answers)
            busy = arm == first and all(other.whole for other in turn.answers.values())
            parts.append(f'<p class="waiting">{"is answering …" if busy else "waits …"}</p>')
            continue
        text = html.escape(answer.text) if answer.text.strip() else "<i>an empty answer</i>"
        below = _footnote(answer) if answer.whole else '<p class="waiting">is answering …</p>'
        parts.append(f'<p class="answer"><b>{TITLES[arm]}</b>{text}</p>{below}')
    body = "".join(parts) or '<p class="waiting">No message yet.</p>'
    label = f"Conversation with {TITLES[arm]}"
    return f'<div class="talk" role="log" tabindex="0" aria-label="{label}"><div>{body}</div></div>'


def _footnote(answer: ChatAnswer) -> str:
    cut = "" if answer.ended else " · cut short"
    return f'<p class="footnote {_side(answer.height)}"><span></span>{_reading(answer.height)}{cut}</p>'


def _reading(height: float | None) -> str:
    return "no tokens to measure" if height is None else words(height)


def _side(height: float | None) -> str:
    return "" if height is None else "below" if "below" in words(height) else "above"


def meter_html(talk: Dialogue, arm: str, layers: tuple[int, ...]) -> str:
    """The height of an arm's last answer on a scale with the floor in its middle.

    Args:
        talk: the conversation.
        arm: which arm.
        layers: the floor's layers.
    """
    answers = [turn.answers[arm] for turn in talk.turns if arm in turn.answers]
    answer = next((answer for answer in reversed(answers) if answer.whole), None)
    scale = scale_of(talk)
    height = None if answer is None else answer.height
    if answer is None or height is None:
        reading = "no answer yet" if answer is None else _reading(None)
        value, bar, by_layer = f'aria-valuetext="{reading}"', "", "&nbsp;"
    else:
        reading = words(height)
        place = 50 + 50 * height / scale
        value = f'aria-valuenow="{height:.3f}" aria-valuetext="{reading}"'
        bar = f'<div class="bar" style="left:{min(50, place):.2f}%;width:{abs(place - 50):.2f}%"></div>'
        bar += f'<div class="needle" style="left:{place:.2f}%"></div>'
        low, high = (choose(zip(answer.by_layer, layers, strict=True)) for choose in (min, max))
        by_layer = f"by layer: {_signed(low[0])} (layer {low[1]}) to {_signed(high[0])} (layer {high[1]})"
    return (
        f'<div class="meter {_side(height)}"><p class="reading">{_emphasised(reading)}</p>'
        f'<div class="track" role="meter" aria-label="{TITLES[arm]}: height of the last answer above the floor" '
        f'aria-valuemin="-{scale}" aria-valuemax="{scale}" {value}>{bar}<div class="floor"></div></div>'
        f'<p class="ends"><span>−{scale} sigma</span><span class="at">floor</span><span>+{scale} sigma</span></p>'
        f'<p class="layers">{by_layer}</p></div>'
    )


def _emphasised(reading: str) -> str:
    value, comma, rest = reading.partition(", ")
    return f"<b>{value}</b> {rest}" if comma else value


def _signed(height: float) -> str:
    shown = number(height, 2)
    return shown if height < 0 or shown == "0.00" else f"+{shown}"


def heights_plot(talk: Dialogue) -> Any:
    """Height over turns, a line an arm, with the floor at 0: a plotly figure.

    The colours of text and background are the page's own, by its style sheet, so that light and dark need no second figure.
    """
    import plotly.graph_objects as go

    turns = list(range(1, len(talk.turns) + 1))
    data = [
        {
            "type": "scatter", "mode": "lines+markers", "name": TITLES[arm], "x": turns, "y": heights_of(talk, arm),
            "line": {"color": COLOURS[arm], "width": 2.5, "dash": DASHES[arm]},
            "marker": {"color": COLOURS[arm], "size": 9, "symbol": SYMBOLS[arm]},
            "hovertemplate": TITLES[arm] + ", turn %{x}: %{y:+.2f} sigma<extra></extra>",
        }
        for arm in ARMS
    ]  # fmt: skip
    grid = {"gridcolor": "rgba(128, 128, 128, .25)", "zeroline": False}
    scale = scale_of(talk)
    layout = {
        "height": 320, "margin": {"l": 56, "r": 16, "t": 32, "b": 44}, "showlegend": True,
        "paper_bgcolor": "rgba(0, 0, 0, 0)", "plot_bgcolor": "rgba(0, 0, 0, 0)",
        "legend": {"orientation": "h", "x": 0, "y": 1.02, "yanchor": "bottom"},
        "xaxis": {**grid, "title": {"text": "turn"}, "range": [0.5, max(4, len(turns)) + 0.5], "dtick": 1 + len(turns) // 20},
        "yaxis": {**grid, "title": {"text": "sigma above the floor"}, "range": [-1.05 * scale, 1.05 * scale]},
        "shapes": [
            {"type": "line", "xref": "paper", "x0": 0, "x1": 1, "y0": 0, "y1": 0,
             "line": {"color": "#7d8594", "width": 1.5}}
        ],
        "annotations": [
            {"xref": "paper", "x": 1, "xanchor": "right", "y": 0, "yanchor": "bottom", "text": "the floor", "showarrow": False}
        ],
    }  # fmt: skip
    return go.Figure(data=data, layout=layout)
