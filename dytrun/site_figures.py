"""What the norms of each arm do, by depth: alpha, spread of the inputs and saturation of every site over time."""

import math
from collections.abc import Sequence
from statistics import fmean, stdev
from typing import Any, NamedTuple

from dytrun.figures import DASHES, Chart, Group, layout, plain, spread, thinned

# From shallow to deep; both ends and the middle show on white and on black, and to colour-blind eyes.
SHALLOW, MIDDLE, DEEP = (0x1F, 0x77, 0xD0), (0x8A, 0x8A, 0x8A), (0xE0, 0x76, 0x0A)
_MOST_POINTS, _MOST_POINTS_OF_MANY, _MANY_LINES = 150, 50, 1000

_TICKS = [float(f"{digit}e{power}") for power in range(-4, 5) for digit in (1, 2, 5)]


class _Panel(NamedTuple):
    prefix: str
    title: str
    axis: dict[str, Any]
    form: str


_PANELS = (
    _Panel("norm/alpha/", "alpha", {}, ".3f"),
    _Panel("norm/input_std/", "standard deviation of the inputs", {"type": "log", "tickvals": _TICKS}, ".3g"),
    _Panel("norm/saturation/", "share of saturated inputs", {"tickformat": ".0%"}, ".1%"),
)


class Depth(NamedTuple):
    """What the norms of a pair's arms do."""

    kinds: list[tuple[str, str]]
    """Name and dash of each kind of site: sites whose names differ in a number alone."""
    ends: tuple[str, str]
    """The first and the last site."""
    charts: list[Chart]


def by_depth(groups: Sequence[Group]) -> Depth | None:
    """Draw each arm's sites over time, a chart a metric; None where no run has recorded any."""
    sites = list(dict.fromkeys(site for group in groups for panel in _PANELS for site in _sites(group, panel)))
    if not sites:
        return None
    # The order of the records is the order of depth.
    kinds = dict.fromkeys(_kind(site) for site in sites)
    dashes = {kind: DASHES[number % len(DASHES)] for number, kind in enumerate(kinds)}
    charts = [chart for chart in [_at_the_end(groups, sites)] if chart is not None]
    most = _MOST_POINTS_OF_MANY if len(groups) * len(sites) > _MANY_LINES else _MOST_POINTS
    for panel in _PANELS:
        found = [(group, lines) for group in groups if (lines := _lines(group, panel, most))]
        values = [value for _, lines in found for _, values in lines.values() for value in values]
        bounds = _bounds(values, panel.axis.get("type") == "log")
        charts += [_panel(group, panel, lines, dashes, bounds) for group, lines in found]
    return Depth(list(dashes.items()), (sites[0], sites[-1]), charts)


def _sites(group: Group, panel: _Panel) -> list[str]:
    names = (name for run in group.runs for line in run.records[:2] + run.records[-2:] for name in line)
    return [name.removeprefix(panel.prefix) for name in dict.fromkeys(names) if name.startswith(panel.prefix)]


def _lines(group: Group, panel: _Panel, most: int) -> dict[str, tuple[list[float], list[float]]]:
    """Return (epochs, mean over seeds) of each site; of an arm that never finished, its longest run."""
    lines = {}
    for site in _sites(group, panel):
        found = spread(group.runs, panel.prefix + site, most)
        if found.xs:
            lines[site] = found.xs, found.means
        elif found.own:
            points = max((points for _, points in found.own), key=len)
            lines[site] = [x for x, _ in points], [y for _, y in points]
    return lines


def _bounds(values: list[float], is_log: bool) -> tuple[float, float]:
    """Return one range for all arms, so that their charts can be compared by eye; of a log axis as plotly wants it."""
    known = [math.log10(value) for value in values if value > 0] if is_log else values
    low, high = min(known, default=0.0), max(known, default=1.0)
    room = 0.04 * (high - low) or 0.04 * abs(high) or 0.04
    return low - room, high + room


def _panel(
    group: Group,
    panel: _Panel,
    lines: dict[str, tuple[list[float], list[float]]],
    dashes: dict[str, str],
    bounds: tuple[float, float],
) -> Chart:
    last = max(len(lines) - 1, 1)
    data: list[dict[str, Any]] = [
        {
            "type": "scatter", "mode": "lines" if len(xs) > 1 else "markers", "name": plain(site),
            "x": [float(f"{x:.5g}") for x in xs], "y": [float(f"{y:.4g}") for y in ys], "opacity": 0.9,
            "hovertemplate": f"{plain(site)}: %{{y:{panel.form}}} at epoch %{{x}}<extra></extra>",
            "line": {"width": 1.5, "color": _colour(place / last), "dash": dashes[_kind(site)]},
            "marker": {"color": _colour(place / last)},
        }
        for place, (site, (xs, ys)) in enumerate(lines.items())
    ]  # fmt: skip
    shape: dict[str, Any] = layout("epoch", height=260) | {"hovermode": "closest"}
    shape["yaxis"] |= panel.axis | {"range": list(bounds)}
    ended = sum(run.result.status == "finished" for run in group.runs)
    mean = f" Mean of {ended} seeds." if ended > 1 else ""
    rows = [[site, f"{ys[0]:{panel.form}}", f"{ys[-1]:{panel.form}}"] for site, (_, ys) in lines.items()]
    low, high = (pick(lines.items(), key=lambda item: item[1][1][-1]) for pick in (min, max))
    said = (
        f"{panel.title} of {len(lines)} sites of {group.arm.label} over epochs, a line a site. At the end the least is "
        f"{low[1][1][-1]:{panel.form}} ({low[0]}), the most {high[1][1][-1]:{panel.form}} ({high[0]}).{mean}"
    )
    return Chart(f"{group.arm.label}: {panel.title}", said, data, shape, ["site", "first", "last"], rows, mean.strip())


def _at_the_end(groups: Sequence[Group], sites: Sequence[str]) -> Chart | None:
    """Draw the last alpha of every site, a line an arm, with its spread over seeds."""
    data, rows, told = [], {site: [site] for site in sites}, []
    drawn = [(group, found) for group in groups if (found := _last_alphas(group))]
    for group, found in drawn:
        look, name = group.look, plain(group.arm.label)
        means = [fmean(found[site]) if site in found else None for site in sites]
        stds = [stdev(found[site]) if len(found.get(site, [])) > 1 else 0 for site in sites]
        data.append({
            "type": "scatter", "mode": "lines+markers", "name": name, "meta": group.number,
            "x": list(range(len(sites))), "y": means, "customdata": [plain(site) for site in sites],
            "error_y": {"type": "data", "array": stds, "color": look.colour, "thickness": 1, "width": 2},
            "hovertemplate": "%{customdata}: %{y:.3f}", "line": {"width": 2, "color": look.colour, "dash": look.dash},
            "marker": {"symbol": look.symbol, "size": 7, "color": look.colour},
        })  # fmt: skip
        for site in sites:
            spreads = f" ± {stdev(found[site]):.3f}" if len(found.get(site, [])) > 1 else ""
            rows[site].append(f"{fmean(found[site]):.3f}{spreads}" if site in found else "–")
        first, last = next(iter(found)), list(found)[-1]
        told.append(f"{group.arm.label}: {fmean(found[first]):.3f} at {first}, {fmean(found[last]):.3f} at {last}.")
    if not drawn:
        return None
    shape = layout("", height=340)
    ticks = thinned(range(len(sites)), 13)
    shape["margin"] |= {"l": 96}  # plotly leaves a slanted label out that would reach over the edge
    shape["xaxis"] |= {"tickvals": ticks, "ticktext": [plain(sites[tick]) for tick in ticks], "tickangle": -40,
                       "hoverformat": "d"}  # fmt: skip
    note = "Bars: ± one standard deviation over seeds." if any(len(group.runs) > 1 for group, _ in drawn) else ""
    return Chart("alpha at the end, by depth", f"Last alpha of each site by depth. {' '.join(told)}", data, shape,
                 ["site", *(group.arm.label for group, _ in drawn)], list(rows.values()), note)  # fmt: skip


def _last_alphas(group: Group) -> dict[str, list[float]]:
    """Return the last alphas of each site over the finished seeds."""
    found: dict[str, list[float]] = {}
    for site in _sites(group, _PANELS[0]):
        name = _PANELS[0].prefix + site
        for run in (run for run in group.runs if run.result.status == "finished"):
            value = next((line[name] for line in reversed(run.records) if line.get(name) is not None), None)
            if value is not None:
                found.setdefault(site, []).append(value)
    return found


def _kind(site: str) -> str:
    """Return the name with a star for each number that stands alone in it: `blocks.*.norm1`."""
    return ".".join("*" if part.isdigit() else part for part in site.split("."))


def _colour(place: float) -> str:
    """Return the colour of a depth between 0 and 1."""
    one, other = (SHALLOW, MIDDLE) if place < 0.5 else (MIDDLE, DEEP)
    part = 2 * place - (place >= 0.5)
    return "#" + "".join(f"{round(left + part * (right - left)):02x}" for left, right in zip(one, other, strict=True))
