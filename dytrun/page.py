"""A report → one HTML file that needs no network: a section for each pair, verdict first, and how to do it again.

Whatever comes from a run is escaped; scripts run by their hash alone, so that nothing else on the page can.
"""

import base64
import hashlib
import json
from collections.abc import Sequence
from functools import cache
from html import escape
from importlib.resources import files
from pathlib import Path
from typing import NamedTuple

from plotly.offline import get_plotlyjs

from dytrun import __version__
from dytrun.cost_figures import costs
from dytrun.figures import Chart, Group, Look, alpha_sweeps, grouped, over_epochs
from dytrun.markup import counted, figure, swatch, table
from dytrun.pairs import Pair
from dytrun.recipe import differences, recipes, told, value_at
from dytrun.records import difference, whole_file
from dytrun.runs import Run
from dytrun.site_figures import DEEP, MIDDLE, SHALLOW, Depth, by_depth

# Columns of the report's table that the heading of a section says already.
_SAID_ABOVE = ("pair", "model", "data")
# More reasons than these are folded away.
_MOST_REASONS = 5
# Settings that a heading names at most, and letters from which on a verdict is set smaller.
_MOST_KEYS, _LONG = 3, 240


class Section(NamedTuple):
    """A pair and the report's own words on it."""

    pair: Pair
    columns: Sequence[str]
    rows: Sequence[Sequence[str]]
    """One an arm."""
    remarks: Sequence[str]


def write(path: Path, sections: Sequence[Section], runs: Sequence[Run], refused: Sequence[str]) -> None:
    """Write the page whole or not at all.

    Raises:
        OSError: it cannot be written.
    """
    charts: list[Chart] = []
    groups = [grouped(section.pair, runs) for section in sections]
    titles = _titles(sections, groups)
    several = f", {len(sections)} comparisons" if len(sections) > 1 else ""
    body = [
        "<a class=skip href=#main>To the results</a>",
        f"<header><h1>dytrun report: {counted(len(runs), 'run')}{several}</h1>",
        _contents(sections, titles),
        "</header><main id=main tabindex=-1>",
        "<noscript><p>The charts need JavaScript. The table of numbers under each is there without it.</p></noscript>",
        *(_section(sections[number], titles[number], number, own, charts) for number, own in enumerate(groups)),
        _refusals(refused),
        f"</main><footer class=quiet>Made by dytrun {__version__} from metrics.jsonl, result.json, config.json and "
        "starts.jsonl of each run. The same numbers: report.json.</footer>",
    ]
    with whole_file(path) as file:
        file.write(_document("\n".join(body), charts).encode())


def _document(body: str, charts: Sequence[Chart]) -> str:
    """Put the page together. The policy lets our two scripts run, by their hashes, and no connection be made."""
    assets = files("dytrun").joinpath("assets")
    style, script = (assets.joinpath(name).read_text() for name in ("page.css", "page.js"))
    plotly = _plotly()
    hashes = " ".join(f"'sha256-{_hash(text)}'" for text in (plotly, script))
    figures = json.dumps([{"data": chart.data, "layout": chart.layout} for chart in charts], separators=(",", ":"))
    # "<" in a string could end the element early; as \u003c it is the same string.
    figures = figures.replace("<", "\\u003c")
    return (
        "<!doctype html>\n<html lang=en>\n<head>\n<meta charset=utf-8>\n"
        f"<meta http-equiv=Content-Security-Policy content=\"default-src 'none'; script-src {hashes}; "
        "style-src 'unsafe-inline'; img-src data:; base-uri 'none'; form-action 'none'\">\n"
        '<meta name=viewport content="width=device-width, initial-scale=1">\n<title>dytrun report</title>\n'
        f"<style>{style}</style>\n</head>\n<body>\n{body}\n"
        f"<script id=charts type=application/json>{figures}</script>\n"
        f"<script>{plotly}</script>\n<script>{script}</script>\n</body>\n</html>\n"
    )


@cache
def _plotly() -> str:
    return get_plotlyjs().replace("\r\n", "\n")


def _hash(text: str) -> str:
    return base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()


def _contents(sections: Sequence[Section], titles: Sequence[str]) -> str:
    if len(sections) < 2:
        return ""
    items = "".join(
        f"<li><a href=#pair-{number}>{escape(title)}</a>: {escape(_verdict(section.pair))}</li>"
        for number, (section, title) in enumerate(zip(sections, titles, strict=True))
    )
    return f'<nav aria-label="Comparisons"><ol>{items}</ol></nav>'


def _titles(sections: Sequence[Section], groups: Sequence[Sequence[Group]]) -> list[str]:
    """Name each comparison by its norms, model and data, and by what else keeps it apart from the others."""
    sciences = [own[0].runs[0].result.science for own in groups]
    keys = dict.fromkeys(key for science in sciences[1:] for key, _, _ in difference(sciences[0], science)
                         if not key.startswith(("norm.", "model.", "data.")))  # fmt: skip
    names = []
    for section, science in zip(sections, sciences, strict=True):
        found = [f"{key}={told(value_at(science, key))}" for key in list(keys)[:_MOST_KEYS]]
        names.append(", ".join([_name(section.pair), *found]))
    return [f"{name} ({section.pair.pair_id})" if names.count(name) > 1 else name
            for name, section in zip(names, sections, strict=True)]  # fmt: skip


def _section(section: Section, title: str, number: int, groups: Sequence[Group], charts: list[Chart]) -> str:
    """Return a pair's part of the page; its charts are added to `charts`."""
    pair, curves, depth, place = section.pair, over_epochs(groups), by_depth(groups), f"pair-{number}"
    kind = "none" if not pair.verdicts else "long" if len(pair.verdict) > _LONG else ""
    remarks = _list([*_more(pair), *section.remarks])
    parts = [
        f"<section aria-labelledby={place}{' class=first' if not number else ''}>",
        f"<h2 id={place}>{escape(title)}</h2>",
        f"<p class=quiet>{escape(_facts(groups))}</p>",
        f'<p class="verdict {kind}">{escape(_verdict(pair))}</p>',
        _results(section, title, groups),
        remarks,
        _part("Over the epochs", _arms(groups) + _charts(curves, charts) if curves else ""),
        _part("Where alpha starts", _charts(alpha_sweeps(groups), charts)),
        _part("The norms by depth", _ramp(depth) + _charts(depth.charts, charts) if depth else ""),
        _part("Speed and memory", _charts(costs(groups), charts)),
        _part("Reproduce", differences(groups, title) + recipes(groups)),
        "</section>",
    ]
    return "\n".join(part for part in parts if part)


def _part(title: str, content: str) -> str:
    return f"<h3>{title}</h3>\n{content}" if content else ""


def _name(pair: Pair) -> str:
    norms = list(dict.fromkeys(arm.label.partition(" ")[0] for arm in pair.arms))
    against = " and ".join([", ".join(norms[:-1]), norms[-1]]) if len(norms) > 1 else norms[0]
    return f"{against}: {pair.model} on {pair.data}"


def _verdict(pair: Pair) -> str:
    return pair.verdict or "Nothing was compared here: these runs have no counterpart with the baseline's norm."


def _more(pair: Pair) -> list[str]:
    """Return what is said of each arm, where the verdict on the pair does not say it all."""
    return [text for text in pair.verdicts if text != pair.verdict and pair.verdict != " ".join(pair.verdicts)]


def _list(lines: Sequence[str]) -> str:
    items = "".join(f"<li>{escape(line)}</li>" for line in lines)
    return f"<ul class=remarks>{items}</ul>" if lines else ""


def _facts(groups: Sequence[Group]) -> str:
    """Say what was compared: arms, seeds, epochs, days, and which comparison this is."""
    runs = [run for group in groups for run in group.runs]
    seeds = sorted({len({run.result.seed for run in group.runs}) for group in groups})
    epochs = sorted({run.result.epochs for run in runs})
    words = [
        counted(len(groups), "arm"),
        counted(seeds[0], "seed") + " each" * (len(groups) > 1)
        if len(seeds) == 1
        else f"{seeds[0]} to {seeds[-1]} seeds",
        " or ".join(counted(number, "epoch") for number in epochs),
        *([f"started {days}"] if (days := _days(runs)) else []),
        f"pair {runs[0].result.pair_id}",
    ]
    return " · ".join(words)


def _days(runs: Sequence[Run]) -> str:
    days = sorted({run.started[:10] for run in runs if run.started})
    return " to ".join(dict.fromkeys([days[0], days[-1]])) if days else ""


def _results(section: Section, title: str, groups: Sequence[Group]) -> str:
    """Return the table: an arm a row, its line's look beside its name."""
    kept = [number for number, name in enumerate(section.columns) if name not in _SAID_ABOVE]
    first = section.columns.index("norm")
    kept = [first, *(number for number in kept if number != first)]
    drawn = table(
        [section.columns[number] for number in kept],
        [[row[number] for number in kept] for row in section.rows],
        "Results, an arm a row",
        [swatch(group.look) for group in groups],
    )
    label = escape(f"Results, {title}")
    return f'<div class=scroll tabindex=0 role=region aria-label="{label}">{drawn}</div>'


def _arms(groups: Sequence[Group]) -> str:
    """Return the legend of all charts of a pair: boxes that show and hide an arm."""
    if len(groups) < 2:
        return ""
    boxes = "".join(
        f"<label><input type=checkbox checked data-arm={group.number}>{swatch(group.look)}{escape(group.arm.label)}"
        "</label>"
        for group in groups
    )
    return f"<fieldset class=arms><legend>Show</legend>{boxes}</fieldset>"


def _ramp(depth: Depth) -> str:
    """Return the legend of the charts that have a line a site."""
    colours = ", ".join(f"rgb{colour}" for colour in (SHALLOW, MIDDLE, DEEP))
    kinds = "; ".join(f"{_line(dash)} {escape(kind)}" for kind, dash in depth.kinds)
    ramp = f"<span class=ramp style='background:linear-gradient(90deg,{colours})'></span>"
    return (
        "<p class='quiet charts-legend'>In the charts with a line a site, the colour is the depth, "
        f"{escape(depth.ends[0])} {ramp} {escape(depth.ends[1])}, and the dash the kind of site: {kinds}. "
        "All arms have the same scale.</p>"
    )


def _line(dash: str) -> str:
    return swatch(Look("currentColor", dash, ""))


def _charts(new: Sequence[Chart], charts: list[Chart]) -> str:
    if not new:
        return ""
    drawn = "\n".join(figure(chart, len(charts) + number) for number, chart in enumerate(new))
    charts += new
    return f'<div class="charts{" few" if len(new) == 1 else ""}">\n{drawn}\n</div>'


def _refusals(refused: Sequence[str]) -> str:
    if not refused:
        return ""
    reasons = _list(refused)
    if len(refused) > _MOST_REASONS:
        reasons = f"<details><summary>{len(refused)} reasons</summary>{reasons}</details>"
    return f"<section aria-labelledby=not-compared><h2 id=not-compared>Not compared</h2>{reasons}</section>"
