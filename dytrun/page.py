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


def write(
    path: Path,
    verdicts: Sequence[str],
    table: tuple[Sequence[str], Sequence[Sequence[str]]],
    remarks: Sequence[str],
    curves: list[Curve],
) -> None:
    """Write the page whole or not at all."""
    parts = [
        "<h1>dytrun report</h1>",
        *(f"<p class=verdict>{html.escape(verdict)}</p>" for verdict in verdicts),
        '<div class=scroll tabindex=0 role=region aria-label="Table of results">',
        _table(*table),
        "</div>",
        *(f"<p>{html.escape(remark)}</p>" for remark in remarks),
        *_charts(curves),
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
            charts.append(
                f'<div class=chart role=img aria-label="{html.escape(title)} over epochs, one line a run">'
                + figure.to_html(
                    full_html=False, include_plotlyjs=False, config={"displayModeBar": False, "responsive": True}
                )
                + "</div>"
            )
    return charts


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
            line={"color": _COLOURS[number % len(_COLOURS)], "dash": _DASHES[seeds.index(curve.seed) % len(_DASHES)]},
        )
    figure.update_layout(
        title=title,
        xaxis_title="epoch",
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
    return figure
