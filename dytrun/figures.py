"""Arms and their runs → charts: plotly's data and layout as plain values, with a sentence and a table for each.

Nothing here says what colour text or paper has: the page's style sheet does, for light, dark and print.
"""

import html
import math
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import fmean
from typing import Any, NamedTuple, TypeVar

from dytrun.contrast import Arm, speed_setting
from dytrun.pairs import Pair
from dytrun.runs import Run

# Distinguishable with every kind of colour vision (Okabe and Ito; their yellow is darkened, it would not show on
# white). Dash and symbol say the same as the colour.
_COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#8C7A00", "#777777")
DASHES = ("solid", "8px,4px", "2px,3px", "9px,3px,2px,3px", "15px,4px", "5px,2px", "15px,3px,2px,3px", "2px,6px")
_SYMBOLS = ("circle", "square", "diamond", "triangle-up", "triangle-down", "pentagon", "star", "hexagon2")
# A line of more points looks the same and fills the page.
MOST_POINTS = 300
_MOST_ROWS = 12
_MOST_THIN_LINES = 5
_FEW_EPOCHS = 8
_Item = TypeVar("_Item")


class Look(NamedTuple):
    """How an arm is drawn, everywhere on the page."""

    colour: str
    dash: str
    symbol: str


class Group(NamedTuple):
    """An arm with its runs; `number` is its place in the table."""

    number: int
    arm: Arm
    runs: list[Run]

    @property
    def look(self) -> Look:
        """Colour, dash and symbol; the second eight arms have the colours again with other dashes and symbols."""
        place, lap = self.number % 8, self.number // 8
        return Look(_COLOURS[place], DASHES[(place + 3 * lap) % 8], _SYMBOLS[(place + 5 * lap) % 8])


@dataclass(frozen=True)
class Chart:
    """A figure, and the same for who cannot see it."""

    title: str
    said: str
    """What a screen reader says of it: what is drawn, and the numbers that matter."""
    data: list[dict[str, Any]]
    layout: dict[str, Any]
    columns: list[str]
    rows: list[list[str]]
    """The numbers; the first of a row is its header."""
    note: str = ""


class Spread(NamedTuple):
    """A metric over epochs: the mean over the finished seeds, and each run's own line."""

    xs: list[float]
    means: list[float]
    stds: list[float]
    """Empty where there is one seed."""
    n: int
    own: list[tuple[Run, list[tuple[float, float]]]]


class _Scale(NamedTuple):
    title: str
    metric: str
    form: str


_OVER_EPOCHS = (
    _Scale("Validation top-1, %", "val/top1", ".2f"),
    _Scale("Validation top-1 of the EMA weights, %", "ema/top1", ".2f"),
    _Scale("Training loss", "train/loss", ".3f"),
    _Scale("Training images a second", "perf/images_per_s", ",.0f"),
)


def grouped(pair: Pair, runs: Sequence[Run]) -> list[Group]:
    """Return the arms of a pair with their runs, in the table's order."""
    by_name = {run.name: run for run in runs}
    return [Group(number, arm, [by_name[name] for name in arm.runs]) for number, arm in enumerate(pair.arms)]


def spread(runs: Sequence[Run], metric: str, most: int) -> Spread:
    """Average a metric over the finished runs where all of them have it, at no more than `most` points."""
    own = [(run, points) for run in runs if (points := _points(run, metric))]
    ended = [dict(points) for run, points in own if run.result.status == "finished"]
    xs = thinned(sorted(set.intersection(*(set(values) for values in ended))), most) if ended else []
    means = [fmean(values[x] for values in ended) for x in xs]
    stds = [_deviation([values[x] for values in ended]) for x in xs] if len(ended) > 1 else []
    return Spread(xs, means, stds, len(ended), [(run, thinned(points, most)) for run, points in own])


def thinned(items: Sequence[_Item], most: int) -> list[_Item]:
    """Return at most `most` of the items, evenly spread, the first and the last among them."""
    if len(items) <= most:
        return list(items)
    return [items[round(number * (len(items) - 1) / (most - 1))] for number in range(most)]


def over_epochs(groups: Sequence[Group]) -> list[Chart]:
    """Draw what was measured as training went on: a line an arm with its band over seeds."""
    charts = [_curve(groups, scale) for scale in _OVER_EPOCHS]
    return [chart for chart in charts if chart is not None]


def alpha_sweeps(groups: Sequence[Group]) -> list[Chart]:
    """Draw top-1 against alpha_init wherever arms differ in it alone: two or more are a sweep, if one has a top-1."""
    sweeps: dict[str, list[Group]] = {}
    for group in groups:
        if (alpha := group.arm.alpha_init) is not None:
            sweeps.setdefault(group.arm.label.replace(f" alpha_init={alpha:g}", ""), []).append(group)
    others = [group for group in groups if group.arm.alpha_init is None and group.arm.top1 is not None]
    return [_sweep(name, sorted(sweep, key=lambda group: group.arm.alpha_init or 0.0), others)
            for name, sweep in sweeps.items() if len({group.arm.alpha_init for group in sweep}) > 1
            and any(group.arm.top1 is not None for group in sweep)]  # fmt: skip


def layout(x_title: str, y_title: str = "", height: int = 320) -> dict[str, Any]:
    """Return what all figures have in common."""
    axis = {"zeroline": False, "automargin": True, "fixedrange": False}
    return {
        "height": height, "autosize": True, "showlegend": False, "hovermode": "x unified",
        "margin": {"l": 48, "r": 16, "t": 12, "b": 44},
        "paper_bgcolor": "rgba(0,0,0,0)", "plot_bgcolor": "rgba(0,0,0,0)",
        "font": {"family": "system-ui, sans-serif", "size": 13},
        "hoverlabel": {"namelength": -1},
        "xaxis": axis | {"title": {"text": x_title}}, "yaxis": axis | {"title": {"text": y_title}},
    }  # fmt: skip


def plain(text: str) -> str:
    """Keep plotly, which knows some HTML, from reading any in a name."""
    return html.escape(text, quote=False)


def _deviation(values: Sequence[float]) -> float:
    """Return the sample's standard deviation; `statistics.stdev` is exact, and takes most of the time of a big page."""
    mean = fmean(values)
    return math.sqrt(math.fsum((value - mean) * (value - mean) for value in values) / (len(values) - 1))


def _points(run: Run, metric: str) -> list[tuple[float, float]]:
    found = [(line["epoch"], line[metric]) for line in run.records if metric in line and "epoch" in line]
    return [(x, y) for x, y in found if isinstance(y, int | float) and math.isfinite(y)]


def _curve(groups: Sequence[Group], scale: _Scale) -> Chart | None:
    drawn = [(group, spread(group.runs, scale.metric, MOST_POINTS)) for group in groups]
    drawn = [(group, found) for group, found in drawn if found.own]
    if not drawn:
        return None
    traces = [trace for group, found in drawn for trace in _band(group, found, scale.form)]
    said = [_told(group, found, scale.form) for group, found in drawn]
    notes = []
    if any(found.stds for _, found in drawn):
        thin = " Thin lines: single seeds." if all(found.n <= _MOST_THIN_LINES for _, found in drawn) else ""
        notes.append(f"Line: mean over seeds. Band: ± one standard deviation.{thin}")
    if any(len(_points(run, scale.metric)) > MOST_POINTS for group, _ in drawn for run in group.runs):
        notes.append(f"At most {MOST_POINTS} points of a line are drawn.")
    settings = {speed_setting(run.result) for group, _ in drawn for run in group.runs}
    if scale.metric.startswith("perf/") and len(settings) > 1:
        notes.append(
            f"These runs were measured in {len(settings)} settings: lines of different ones are not comparable."
        )
    xs = thinned(sorted({x for _, found in drawn for x in _all_xs(found)}), _MOST_ROWS)
    rows = [[f"{x:g}", *(_cell(found, x, scale.form) for _, found in drawn)] for x in xs]
    shape = layout("epoch")
    if xs[-1] - xs[0] <= _FEW_EPOCHS:
        shape["xaxis"] |= {"dtick": 1}
    return Chart(scale.title, f"{scale.title}, over epochs. {' '.join(said)}", traces, shape,
                 ["epoch", *(group.arm.label for group, _ in drawn)], rows, " ".join(notes))  # fmt: skip


def _band(group: Group, found: Spread, form: str) -> list[dict[str, Any]]:
    """Return an arm's traces: band, thin lines, mean, and a cross where a run ended before its time."""
    look, name = group.look, plain(group.arm.label)
    common = {"type": "scatter", "meta": group.number, "name": name}
    quiet = common | {"hoverinfo": "skip"}
    traces: list[dict[str, Any]] = []
    if found.stds:
        edge = [mean + std for mean, std in zip(found.means, found.stds, strict=True)]
        foot = [mean - std for mean, std in zip(found.means, found.stds, strict=True)]
        traces.append(quiet | {
            "x": short(found.xs + found.xs[::-1]), "y": short(edge + foot[::-1]), "mode": "lines", "fill": "toself",
            "fillcolor": f"{look.colour}2e", "line": {"width": 0},
        })  # fmt: skip
    for run, points in found.own:
        is_whole = run.result.status == "finished"
        xs, ys = short([x for x, _ in points]), short([y for _, y in points])
        if (
            (is_whole and 1 < found.n <= _MOST_THIN_LINES)
            or not is_whole
            or (is_whole and found.n > 1 and not found.xs)
        ):
            traces.append(quiet | {"x": xs, "y": ys, "mode": "lines", "opacity": 0.55,
                                   "line": {"width": 1, "color": look.colour, "dash": look.dash}})  # fmt: skip
        if not is_whole:
            label = f"{name}, seed {run.result.seed}: {run.result.status}"
            traces.append(common | {
                "x": xs[-1:], "y": ys[-1:], "mode": "markers", "name": label, "hovertemplate": f"%{{y:{form}}}",
                "marker": {"symbol": "x", "size": 9, "color": look.colour},
            })  # fmt: skip
    if found.xs:
        more = {"customdata": short(found.stds)} if found.stds else {}
        tail = f" ± %{{customdata:{form}}}" if found.stds else ""
        traces.append(common | more | {
            "x": short(found.xs), "y": short(found.means), "mode": "lines+markers",
            "hovertemplate": f"%{{y:{form}}}{tail}", "line": {"width": 2.5, "color": look.colour, "dash": look.dash},
            "marker": {"symbol": look.symbol, "size": 8, "color": look.colour, "maxdisplayed": 8},
        })  # fmt: skip
    return traces


def _told(group: Group, found: Spread, form: str) -> str:
    """Say in words what an arm's line shows."""
    text = f"{group.arm.label}: "
    if found.xs:
        last = f"{found.means[-1]:{form}}" + (f" ± {found.stds[-1]:{form}}" if found.stds else "")
        text += f"from {found.means[0]:{form}} to {last} at epoch {found.xs[-1]:g}, "
        text += f"mean of {found.n} seeds" if found.n > 1 else "one seed"
    ends = [f"seed {run.result.seed} {run.result.status} after epoch {points[-1][0]:g}" for run, points in found.own
            if run.result.status != "finished"]  # fmt: skip
    return text + ("; " if found.xs and ends else "") + ", ".join(ends) + "."


def _all_xs(found: Spread) -> list[float]:
    return found.xs or [x for _, points in found.own for x, _ in points]


def _cell(found: Spread, x: float, form: str) -> str:
    if x in found.xs:
        place = found.xs.index(x)
        return f"{found.means[place]:{form}}" + (f" ± {found.stds[place]:{form}}" if found.stds else "")
    return ", ".join(f"{y:{form}}" for _, points in found.own for at, y in points if at == x) if not found.xs else "–"


def _sweep(name: str, sweep: Sequence[Group], others: Sequence[Group]) -> Chart:
    """Draw a sweep, with what has no alpha as level lines, and diverged arms at the foot."""
    known = [(group, group.arm.top1) for group in sweep if group.arm.top1 is not None]
    lost = [group for group in sweep if group.arm.top1 is None]
    levels = [(group, group.arm.top1) for group in others if group.arm.top1 is not None]
    ticks = [group.arm.alpha_init or 0.0 for group in sweep]
    data: list[dict[str, Any]] = []
    for group, top1 in levels:
        data.append({
            "type": "scatter", "mode": "lines+text", "x": [ticks[0], ticks[-1]], "y": [top1.mean] * 2,
            "text": ["", plain(group.arm.label)], "textposition": "top left", "name": plain(group.arm.label),
            "line": {"color": group.look.colour, "dash": group.look.dash, "width": 2}, "hovertemplate": "%{y:.2f}",
        })  # fmt: skip
    data.append({
        "type": "scatter", "mode": "lines+markers", "name": plain(name), "hovertemplate": "%{y:.2f}",
        "x": [group.arm.alpha_init for group, _ in known], "y": [top1.mean for _, top1 in known],
        "error_y": {"type": "data", "array": [top1.std or 0 for _, top1 in known], "color": "#777777"},
        "line": {"color": "#777777", "width": 1.5},
        "marker": {"size": 10, "color": [group.look.colour for group, _ in known],
                   "symbol": [group.look.symbol for group, _ in known]},
    })  # fmt: skip
    if lost:
        foot = min(top1.mean for _, top1 in known)
        data.append({
            "type": "scatter", "mode": "markers+text", "x": [group.arm.alpha_init for group in lost],
            "y": [foot] * len(lost), "text": ["diverged"] * len(lost), "textposition": "top center",
            "name": "diverged or failed", "hoverinfo": "skip", "cliponaxis": False,
            "marker": {"symbol": "x", "size": 10, "color": [group.look.colour for group in lost]},
        })  # fmt: skip
    shape = layout("alpha_init")
    shape["xaxis"] |= {"type": "log", "tickvals": ticks, "ticktext": [f"{tick:g}" for tick in ticks]}
    told = [(f"{group.arm.alpha_init:g}", _mean(group)) for group in sweep]
    said = "; ".join(f"{alpha}: {value}" for alpha, value in told)
    said += "".join(f"; {group.arm.label}: {_mean(group)}" for group in others)
    return Chart(f"Validation top-1, %, against alpha_init: {name}", f"Top-1 in percent against alpha_init: {said}",
                 data, shape, ["alpha_init", "top-1 %"], [list(row) for row in told],
                 "Bars: ± one standard deviation over seeds. Level lines: arms without alpha.")  # fmt: skip


def _mean(group: Group) -> str:
    found = group.arm.top1
    if found is None:
        return "diverged"
    return f"{found.mean:.2f}" + (f" ± {found.std:.2f}" if found.std is not None else "")


def short(values: Sequence[float]) -> list[float]:
    """Round to six digits: more of them cannot be seen, and they would double the page."""
    return [float(f"{value:.6g}") for value in values]
