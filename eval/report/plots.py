"""Plots of the report, as plain dicts for plotly.

Colours are names such as ``$tuned``: the page replaces them by its CSS variable ``--tuned`` and draws anew when the
reader's colour scheme changes, so that one plot serves light, dark and print.
"""

from __future__ import annotations

import html
import math
import textwrap
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from trimtab.eval.schema import ARMS, Estimate, Metric, Rerouting, Retention, Trajectory
from trimtab.eval.wording import ARM_NAMES, number, percent_text

Plot = dict[str, Any]
Mark = tuple[float, str, Estimate]  # height in the plot, what it is of, its interval

ALL_ARMS = (*ARMS, "control")
DASHES = {"base": "dot", "base+cap": "dash", "tuned": "solid", "tuned+cap": "dashdot", "control": "dot"}
SYMBOLS = {"base": "circle", "base+cap": "diamond", "tuned": "square", "tuned+cap": "triangle-up", "control": "x"}
MOST_POINTS = 400  # of a training curve: more cannot be seen
MOST_PANELS = 8
BEYOND = "beyond"  # the name of arrows where intervals go on beyond the edge
ARROW = 16  # their length, in pixels
PHONE = (250.0, 370.0)  # width and height of the persona plot on a phone, in pixels
LETTER = (7.0, 14.0)  # of a role's name in it: width and height


def colour(arm: str) -> str:
    """The colour name of an arm: ``base+cap`` -> ``$base-cap``."""
    return "$" + arm.replace("+", "-")


def retention_plot(metrics: Sequence[Metric]) -> Plot:
    """Retention per metric as horizontal intervals, the control's beneath, with lines at 0 and 1."""
    rows = list(reversed(metrics))
    tuned = _marks((i + 0.12, f"{html.escape(m.name)}<br>tuned", m.retention) for i, m in enumerate(rows))
    control = _marks((i - 0.2, f"{html.escape(m.name)}<br>control", m.control_retention) for i, m in enumerate(rows))
    labels = [f"{_wrapped(m.name)}<br><b>{_retention_text(m.retention)}</b>" for m in rows]
    layout = _retention_layout([*tuned, *control], labels, reach=(-1.0, 2.0), row=66)
    window = layout["xaxis"]["range"]
    layout["annotations"] = [*_beyond("tuned", tuned, window), *_beyond("control", control, window)]
    data = [
        *_intervals("tuned", tuned, size=11, symbol="square", thickness=3),
        *_intervals("control", control, size=8, symbol="x", thickness=1.5),
    ]
    return {"data": data, "layout": layout}


def comparison_plot(rows: Sequence[tuple[str, Retention | None]]) -> Plot:
    """Retention of one metric, a row a run."""
    shown = [(name, kept) for name, kept in reversed(rows) if kept is not None and kept.estimate is not None]
    marks = _marks((i, html.escape(name), kept) for i, (name, kept) in enumerate(shown))
    layout = _retention_layout(marks, [_wrapped(name) for name, _ in shown], reach=(-3.0, 4.0), row=34)
    layout["annotations"] = _beyond("tuned", marks, layout["xaxis"]["range"])
    return {"data": _intervals("tuned", marks, size=11, symbol="square", thickness=3), "layout": layout}


def trajectory_plots(trajectories: Sequence[Trajectory], default_z: float | None) -> list[tuple[str, Plot]]:
    """Mean z per turn, one panel a domain on a common scale, one line and interval band an arm."""
    ends = [end for t in trajectories for p in t.points for end in (p.z.low, p.z.high)]
    if not ends:
        return []
    ends += [default_z] if default_z is not None else []
    pad = 0.06 * (max(ends) - min(ends) or 1.0)
    panels = []
    for domain in dict.fromkeys(t.domain for t in trajectories):
        here = [t for t in trajectories if t.domain == domain and t.points]
        here.sort(key=lambda t: ALL_ARMS.index(t.arm) if t.arm in ALL_ARMS else len(ALL_ARMS))
        turns = sorted({p.turn for t in here for p in t.points})
        layout = {
            "height": 270,
            "margin": {"l": 44, "r": 10, "t": 8, "b": 40},
            "xaxis": {
                "title": {"text": "turn"},
                "tickvals": turns[:: math.ceil(len(turns) / 8) or 1],
                "showgrid": False,
            },
            "yaxis": {"title": {"text": "z"}, "range": [min(ends) - pad, max(ends) + pad], "zeroline": False},
            "shapes": [_level(default_z)] if default_z is not None else [],
            "hovermode": "x unified",
        }
        panels.append((domain, {"data": [*map(_band, here), *map(_line, here)], "layout": layout}))
    return panels


def persona_plot(space: Mapping[str, Any]) -> Plot | None:
    """Role vectors on the first two components; the default Assistant is marked, the outermost roles are named."""
    names, points = space.get("roles", []), space.get("coordinates", [])
    if len(names) < 3 or len(points[0]) < 2:
        return None
    roles = [(str(name), point) for name, point in zip(names, points, strict=True) if name != "default"]
    defaults = [point for name, point in zip(names, points, strict=True) if name == "default"]
    named = _named(roles, defaults[0] if defaults else None)
    variance = [*space.get("variance", []), 0.0, 0.0]
    common = {"type": "scatter", "hovertemplate": "%{customdata}<br>%{hovertext}<extra></extra>"}
    data: list[dict[str, Any]] = [
        {**common, "name": "roles", "mode": "markers+text",
         "x": [p[0] for _, p in roles], "y": [p[1] for _, p in roles],
         "text": [_wrapped(name) if i in named else "" for i, (name, _) in enumerate(roles)],
         "customdata": [html.escape(name) for name, _ in roles], "hovertext": [_place(point) for _, point in roles],
         "textposition": "top center", "textfont": {"size": 11, "color": "$soft"},
         "marker": {"size": 9, "color": "$role", "line": {"color": "$page", "width": 1}}},
    ]  # fmt: skip
    if defaults:
        data.append(
            {**common, "name": "default Assistant", "mode": "markers+text",
             "x": [defaults[0][0]], "y": [defaults[0][1]],
             "text": ["<b>default Assistant</b>"], "customdata": ["default Assistant"],
             "hovertext": [_place(defaults[0])],
             "textposition": "bottom center", "cliponaxis": False, "textfont": {"size": 13, "color": "$ink"},
             "marker": {"size": 17, "symbol": "star", "color": "$tuned", "line": {"color": "$page", "width": 1}}}
        )  # fmt: skip
    layout = {
        "height": 430,
        "margin": {"l": 52, "r": 40, "t": 12, "b": 46},
        "xaxis": {
            "title": {"text": f"PC1 ({number(100 * variance[0], 0)} % of variance)"},
            **_padded([p[0] for p in points]),
        },
        "yaxis": {
            "title": {"text": f"PC2 ({number(100 * variance[1], 0)} % of variance)"},
            **_padded([p[1] for p in points]),
        },
        "hovermode": "closest",
        "zoomable": True,
    }
    return {"data": data, "layout": layout}


def layers_plot(space: Mapping[str, Any], axis: Mapping[str, Any], window: Sequence[int]) -> Plot | None:
    """Cosines per decoder layer: how well the axis is determined, and how it lies in persona space."""
    series = (
        ("split-half", axis.get("split_half"), "$base-cap", "solid"),
        ("|cos(axis, PC1)|", space.get("cosine_pc1"), "$tuned", "solid"),
        ("held-out axis", axis.get("cosine_held_out"), "$tuned-cap", "dash"),
        ("split-half, held-out axis", axis.get("split_half_held_out"), "$tuned-cap", "dot"),
        ("anew from tuned", axis.get("cosine_reextracted_tuned"), "$base", "dashdot"),
        ("anew from base", axis.get("cosine_reextracted_base"), "$base", "dot"),
        ("anew under the cap", axis.get("cosine_reextracted_base+cap"), "$base-cap", "dot"),
    )
    data = [
        {"type": "scatter", "mode": "lines", "name": name, "x": list(range(len(values))), "y": list(values),
         "line": {"color": ink, "width": 2, "dash": dash}, **_told(values, 2)}
        for name, values, ink, dash in series
        if isinstance(values, list) and values
    ]  # fmt: skip
    if not data:
        return None
    lowest = min(value for trace in data for value in trace["y"] if value is not None)
    layout = {
        "height": 430,
        "margin": {"l": 44, "r": 12, "t": 12, "b": 100},
        "xaxis": {"title": {"text": "decoder layer"}, "showgrid": False},
        "yaxis": {"title": {"text": "cosine"}, "range": [min(0.0, lowest - 0.05), 1.03], "zeroline": False},
        "hovermode": "x unified",
        "showlegend": True,
        "legend": {"orientation": "h", "x": 0, "y": -0.2, "yanchor": "top"},
    }
    if window:
        left, right = min(window) - 0.5, max(window) + 0.5
        layout["shapes"] = [
            {"type": "rect", "x0": left, "x1": right, "y0": 0, "y1": 1, "yref": "paper", "layer": "below",
             "fillcolor": "$window", "line": {"width": 0}}
        ]  # fmt: skip
        layout["annotations"] = [
            {"x": (left + right) / 2, "y": 0.01, "yref": "paper", "yanchor": "bottom", "text": "floor",
             "showarrow": False, "font": {"color": "$soft", "size": 12}}
        ]  # fmt: skip
    return {"data": data, "layout": layout}


def components_plot(rerouting: Rerouting | None) -> Plot | None:
    """Shift along each persona component, cap and tuning side by side, with intervals."""
    if rerouting is None or not rerouting.components:
        return None
    data = [
        {
            "type": "bar", "name": name, "x": [c.number for c in rerouting.components],
            "y": [e.value for e in effects], "marker": {"color": colour(arm)},
            "error_y": {
                "type": "data", "symmetric": False, "color": "$soft", "thickness": 1.2, "width": 3,
                "array": [e.high - e.value for e in effects], "arrayminus": [e.value - e.low for e in effects],
            },
            **_told([e.value for e in effects], 2, " sigma"),
        }
        for name, arm, effects in (
            ("cap", "base+cap", [c.cap_effect for c in rerouting.components]),
            ("tuned", "tuned", [c.tuned_effect for c in rerouting.components]),
        )
    ]  # fmt: skip
    layout = {
        "height": 302,
        "margin": {"l": 52, "r": 10, "t": 8, "b": 46},
        "barmode": "group",
        "bargap": 0.35,
        "xaxis": {"title": {"text": "persona component"}, "dtick": 1, "tickangle": 0, "showgrid": False},
        "yaxis": {"title": {"text": "sigma"}, "zeroline": True},
        "hovermode": "x unified",
    }
    return {"data": data, "layout": layout}


def training_plots(log: Sequence[Mapping[str, Any]]) -> list[tuple[str, Plot]]:
    """One panel for each logged number that changes over the steps, ``loss`` first."""
    keys = dict.fromkeys(key for row in log for key, value in row.items() if _is_number(value))
    panels = []
    for key in sorted(keys, key=lambda key: key != "loss"):
        rows = [row for row in log if _is_number(row.get(key)) and _is_number(row.get("step"))]
        if key in ("step", "epoch") or len({row[key] for row in rows}) < 2:
            continue
        rows = rows[:: math.ceil(len(rows) / MOST_POINTS)]
        trace = {
            "type": "scatter", "mode": "lines" if len(rows) > 30 else "lines+markers", "name": html.escape(key),
            "x": [row["step"] for row in rows], "y": [row[key] for row in rows],
            "line": {"color": "$tuned", "width": 2}, "marker": {"size": 5}, **_told([row[key] for row in rows]),
        }  # fmt: skip
        layout = {
            "height": 210,
            "margin": {"l": 54, "r": 10, "t": 8, "b": 38},
            "xaxis": {"title": {"text": "step"}, "showgrid": False},
            "yaxis": {"zeroline": False, "nticks": 5},
            "hovermode": "x unified",
        }
        panels.append((key, {"data": [trace], "layout": layout}))
    return panels[:MOST_PANELS]


def _marks(rows: Iterable[tuple[float, str, Retention | None]]) -> list[Mark]:
    """Those rows whose retention is defined."""
    return [(y, what, kept.estimate) for y, what, kept in rows if kept is not None and kept.estimate is not None]


def _retention_layout(marks: Sequence[Mark], labels: Sequence[str], *, reach: tuple[float, float], row: int) -> Plot:
    """The layout of rows of retention, from the bottom up.

    Args:
        marks: what is drawn.
        labels: of the rows.
        reach: least and most retention that the plot may be widened to; one far out must not squeeze the rest.
        row: height of a row in pixels.
    """
    ends = [end for _, _, e in marks for end in (e.low, e.high)]
    low, high = max(reach[0], min([-0.15, *ends])) - 0.05, min(reach[1], max([1.2, *ends])) + 0.05
    return {
        "height": 52 + row * max(1, len(labels)),
        "margin": {"l": 10, "r": 16, "t": 8, "b": 36},
        "xaxis": {"range": [low, high], "tickformat": ".0%", "zeroline": False},
        "yaxis": {
            "tickvals": list(range(len(labels))), "ticktext": list(labels), "range": [-0.6, len(labels) - 0.4],
            "automargin": True, "showgrid": False, "zeroline": False, "ticks": "", "tickfont": {"size": 13},
        },
        "shapes": [
            {"type": "line", "x0": x, "x1": x, "y0": 0, "y1": 1, "yref": "paper",
             "line": {"color": "$reference", "width": 1.5, "dash": dash}}
            for x, dash in ((0, "solid"), (1, "dash"))
        ],
    }  # fmt: skip


def _intervals(arm: str, marks: Sequence[Mark], *, size: int, symbol: str, thickness: float) -> list[dict[str, Any]]:
    """The trace of values with their intervals; none where there are none.

    Args:
        arm: whose they are.
        marks: what is drawn.
        size: of a value's mark, in pixels.
        symbol: of a value's mark.
        thickness: of an interval's line, in pixels.
    """
    trace = {
        "type": "scatter", "mode": "markers", "name": arm,
        "x": [e.value for _, _, e in marks], "y": [y for y, _, _ in marks],
        "customdata": [f"{what}: {percent_text(e)}, n = {e.n}" for _, what, e in marks],
        "hovertemplate": "%{customdata}<extra></extra>",
        "error_x": {
            "type": "data", "symmetric": False, "color": colour(arm), "thickness": thickness, "width": 5,
            "array": [e.high - e.value for _, _, e in marks], "arrayminus": [e.value - e.low for _, _, e in marks],
        },
        "marker": {"color": colour(arm), "size": size, "symbol": symbol},
    }  # fmt: skip
    return [trace] if marks else []


def _beyond(arm: str, marks: Sequence[Mark], window: tuple[float, float]) -> list[dict[str, Any]]:
    """An arrow to the plot's edge for each end of an interval that lies beyond it: cut off, it would look like an end.

    Args:
        arm: whose intervals they are.
        marks: what is drawn.
        window: least and most retention that the plot shows.
    """
    ends = [(0, ARROW, y) for y, _, e in marks if e.low < window[0]]
    ends += [(1, -ARROW, y) for y, _, e in marks if e.high > window[1]]
    return [
        {"name": BEYOND, "x": side, "xref": "paper", "y": y, "ax": tail, "ay": 0, "text": "", "showarrow": True,
         "arrowhead": 2, "arrowsize": 1, "arrowwidth": 2, "arrowcolor": colour(arm)}
        for side, tail, y in ends
    ]  # fmt: skip


def _retention_text(retention: Retention) -> str:
    return percent_text(retention.estimate) if retention.estimate else "undefined"


def _told(values: Sequence[float | None], decimals: int | None = None, unit: str = "") -> dict[str, Any]:
    """What the pointer shows at each value, as the rest of the page writes it: plotly's own numbers have a hyphen for a minus."""
    texts = ["" if value is None else f"{number(value, decimals)}{unit}" for value in values]
    return {"customdata": texts, "hovertemplate": "%{customdata}"}


def _place(point: Sequence[float]) -> str:
    return f"PC1 {number(point[0], 2)}, PC2 {number(point[1], 2)}"


def _band(trajectory: Trajectory) -> dict[str, Any]:
    turns = [p.turn for p in trajectory.points]
    return {
        "type": "scatter", "mode": "lines", "x": turns + turns[::-1],
        "y": [p.z.high for p in trajectory.points] + [p.z.low for p in reversed(trajectory.points)],
        "fill": "toself", "fillcolor": f"{colour(trajectory.arm)}-band", "line": {"width": 0}, "hoverinfo": "skip",
    }  # fmt: skip


def _line(trajectory: Trajectory) -> dict[str, Any]:
    ink, arm = colour(trajectory.arm), trajectory.arm
    return {
        "type": "scatter", "mode": "lines+markers", "name": ARM_NAMES.get(arm, html.escape(arm)),
        "x": [p.turn for p in trajectory.points], "y": [p.z.value for p in trajectory.points],
        "line": {"color": ink, "width": 2.2, "dash": DASHES.get(arm, "solid")},
        "marker": {"color": ink, "size": 7, "symbol": SYMBOLS.get(arm, "circle")},
        **_told([p.z.value for p in trajectory.points], 2),
    }  # fmt: skip


def _level(z: float) -> dict[str, Any]:
    line = {"color": "$reference", "width": 1, "dash": "dash"}
    return {"type": "line", "x0": 0, "x1": 1, "xref": "paper", "y0": z, "y1": z, "layer": "below", "line": line}


def _named(roles: Sequence[tuple[str, Sequence[float]]], default: Sequence[float] | None) -> set[int]:
    """Indices of the roles at the ends of both components, but for those whose name would lie on another's.

    The names' boxes are reckoned for a phone's width: on a wider page they are farther apart.

    Args:
        roles: names and [PC1, PC2, ...].
        default: where the default Assistant lies, whose name stands beneath its mark; None if it is not there.
    """
    points = [point for _, point in roles] + ([default] if default is not None else [])
    (left, right), (bottom, top) = (_padded([point[axis] for point in points])["range"] for axis in (0, 1))

    def box(point: Sequence[float], name: str, *, above: bool) -> tuple[float, float, float, float]:
        lines = _wrapped(name).split("<br>")
        x, y = (point[0] - left) / (right - left) * PHONE[0], (point[1] - bottom) / (top - bottom) * PHONE[1]
        width, height = LETTER[0] * max(map(len, lines)), LETTER[1] * len(lines)
        foot = y + 6 if above else y - 10 - height
        return x - width / 2, x + width / 2, foot, foot + height

    taken = [box(default, "default Assistant", above=False)] if default is not None else []
    named = set()
    for index in _outermost(roles):
        name, point = roles[index]
        own = box(point, name, above=True)
        if all(own[0] >= b[1] or own[1] <= b[0] or own[2] >= b[3] or own[3] <= b[2] for b in taken):
            taken.append(own)
            named.add(index)
    return named


def _outermost(roles: Sequence[tuple[str, Sequence[float]]]) -> list[int]:
    """Indices of the roles at the ends of both components, the outermost first: naming all of them would be a blot."""
    first = sorted(range(len(roles)), key=lambda i: roles[i][1][0])
    second = sorted(range(len(roles)), key=lambda i: roles[i][1][1])
    ends = [(first[k], first[-1 - k]) for k in range(min(4, len(roles)))]
    ends[1:1] = [(second[k], second[-1 - k]) for k in range(min(2, len(roles)))]
    return list(dict.fromkeys(index for pair in ends for index in pair))


def _padded(values: Sequence[float]) -> dict[str, Any]:
    """An axis range with room for the names at its ends."""
    pad = 0.14 * (max(values) - min(values) or 1.0)
    return {"range": [min(values) - pad, max(values) + pad], "zeroline": True}


def _wrapped(name: str) -> str:
    return "<br>".join(html.escape(line) for line in textwrap.wrap(name, 26))


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)
