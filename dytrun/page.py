"""A report → one HTML file that needs no network: table, verdicts, curves."""

import html
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import plotly.graph_objects as go
from plotly.offline import get_plotlyjs

# Distinguishable with every kind of colour vision (Okabe and Ito); the baseline is the first.
_COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#F0E442", "#777777")
_DASHES = ("solid", "dash", "dot", "dashdot")
_TITLES = {"val/top1": "Validation top-1, %", "train/loss": "Training loss"}
_STYLE = """
:root { color-scheme: light dark; --line: #8886; --soft: #8881; }
body { font: 16px/1.5 system-ui, sans-serif; max-width: 72rem; margin: 2rem auto; padding: 0 1rem; }
.scroll { overflow-x: auto; }
table { border-collapse: collapse; font-size: .9rem; }
th, td { padding: .35rem .7rem; border-bottom: 1px solid var(--line); text-align: left; vertical-align: top; }
td { font-variant-numeric: tabular-nums; white-space: nowrap; }
.verdict { font-size: 1.15rem; padding: .6rem 1rem; border-left: 4px solid #0072B2; background: var(--soft); }
.chart { min-height: 440px; }
"""


class Curve(NamedTuple):
    """One metric of one run over epochs."""

    pair_id: str
    title: str
    arm: str
    seed: int
    metric: str
    points: list[tuple[float, float]]


class AlphaPoint(NamedTuple):
    """Top-1 of an arm whose alphas start at `alpha_init`; None where every run of it diverged or failed."""

    alpha_init: float
    top1: float | None
    std: float | None


class AlphaSweep(NamedTuple):
    """Arms that differ in alpha_init alone."""

    title: str
    points: list[AlphaPoint]
    others: list[tuple[str, float]]
    """Label and top-1 of the arms of the pair that have no alpha."""


class Charts(NamedTuple):
    """Everything that is drawn."""

    sweeps: list[AlphaSweep]
    curves: list[Curve]


def write(
    path: Path,
    verdicts: Sequence[str],
    table: tuple[Sequence[str], Sequence[Sequence[str]]],
    remarks: Sequence[str],
    charts: Charts,
) -> None:
    """Write the page whole or not at all."""
    parts = [
        "<h1>dytrun report</h1>",
        *(f"<p class=verdict>{html.escape(verdict)}</p>" for verdict in verdicts),
        '<div class=scroll tabindex=0 role=region aria-label="Table of results">',
        _table(*table),
        "</div>",
        *(f"<p>{html.escape(remark)}</p>" for remark in remarks),
        *(part for sweep in charts.sweeps for part in _alpha_chart(sweep)),
        *_charts(charts.curves),
    ]
    text = (
        "<!doctype html>\n<html lang=en>\n<head><meta charset=utf-8>"
        '<meta name=viewport content="width=device-width, initial-scale=1"><title>dytrun report</title>'
        f"<style>{_STYLE}</style><script>{get_plotlyjs()}</script></head>\n<body>\n"
        + "\n".join(parts)
        + "\n</body>\n</html>\n"
    )
    partial = path.with_name(f".{path.name}.partial")
    partial.write_text(text)
    partial.replace(path)


def _table(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    head = "".join(f"<th scope=col>{html.escape(name)}</th>" for name in columns)
    body = "".join("<tr>" + "".join(f"<td>{html.escape(cell)}</td>" for cell in row) + "</tr>" for row in rows)
    return f"<table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>"


def _charts(curves: list[Curve]) -> list[str]:
    charts = []
    for pair_id in dict.fromkeys(curve.pair_id for curve in curves):
        own = [curve for curve in curves if curve.pair_id == pair_id]
        charts.append(f"<h2>{html.escape(own[0].title)} (pair {pair_id})</h2>")
        for metric, title in _TITLES.items():
            figure = _figure([curve for curve in own if curve.metric == metric], title)
            charts.append(_chart(figure, f"{title} over epochs, one line a run"))
    return charts


def _alpha_chart(sweep: AlphaSweep) -> list[str]:
    """Draw top-1 against alpha_init, with what has no alpha as level lines, and diverged arms at the foot."""
    figure = go.Figure()
    known = [point for point in sweep.points if point.top1 is not None]
    figure.add_scatter(
        x=[point.alpha_init for point in known],
        y=[point.top1 for point in known],
        error_y={"type": "data", "array": [point.std or 0 for point in known]},
        mode="lines+markers",
        name="top-1",
        line={"color": _COLOURS[1]},
    )
    lost = [point.alpha_init for point in sweep.points if point.top1 is None]
    if lost:
        figure.add_scatter(
            x=lost, y=[min((point.top1 or 0 for point in known), default=0)] * len(lost), mode="markers+text",
            text=["diverged"] * len(lost), textposition="top center", name="diverged or failed",
            marker={"symbol": "x", "size": 12, "color": _COLOURS[3]},
        )  # fmt: skip
    for number, (label, top1) in enumerate(sweep.others):
        colour = _COLOURS[(0, *range(4, len(_COLOURS)))[number % 5]]
        figure.add_hline(y=top1, line={"color": colour, "dash": "dash"}, annotation_text=label)
    ticks = [point.alpha_init for point in sweep.points]
    _lay_out(figure, "Validation top-1, %, against alpha_init", "alpha_init")
    figure.update_xaxes(type="log", tickvals=ticks, ticktext=[f"{tick:g}" for tick in ticks])
    said = "; ".join(f"{point.alpha_init:g}: " + (f"{point.top1:.2f}" if point.top1 is not None else "diverged")
                     for point in sweep.points)  # fmt: skip
    return [f"<h2>{html.escape(sweep.title)}</h2>", _chart(figure, f"Top-1 in percent against alpha_init: {said}")]


def _chart(figure: go.Figure, said: str) -> str:
    """Return a figure as HTML, with what a screen reader says of it."""
    drawn = figure.to_html(
        full_html=False, include_plotlyjs=False, config={"displayModeBar": False, "responsive": True}
    )
    return f'<div class=chart role=img aria-label="{html.escape(said)}">{drawn}</div>'


def _figure(curves: list[Curve], title: str) -> go.Figure:
    arms = list(dict.fromkeys(curve.arm for curve in curves))
    figure = go.Figure()
    for curve in curves:
        number = arms.index(curve.arm)
        seeds = sorted({other.seed for other in curves if other.arm == curve.arm})
        figure.add_scatter(
            x=[x for x, _ in curve.points],
            y=[y for _, y in curve.points],
            mode="lines",
            name=f"{curve.arm}, seed {curve.seed}",
            legendgroup=curve.arm,
            line={
                "color": _COLOURS[number % len(_COLOURS)],
                "dash": _DASHES[(seeds.index(curve.seed) + number // len(_COLOURS)) % len(_DASHES)],
            },
        )
    _lay_out(figure, title, "epoch")
    return figure


def _lay_out(figure: go.Figure, title: str, x_title: str) -> None:
    figure.update_layout(
        title=title,
        xaxis_title=x_title,
        height=440,
        margin={"l": 60, "r": 20, "t": 50, "b": 90},
        paper_bgcolor="rgba(0,0,0,0)",
        plot_bgcolor="rgba(0,0,0,0)",
        font={"color": "#888"},
        hovermode="x unified",
        legend={"orientation": "h", "yanchor": "top", "y": -0.18},
    )
    figure.update_xaxes(gridcolor="#8884", zeroline=False)
    figure.update_yaxes(gridcolor="#8884", zeroline=False)
