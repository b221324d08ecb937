"""All norm sites of a run in one chart: alpha, input std, saturation over the steps, a line a site, hued by depth."""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

PREFIX = "norm/"
_TITLES = {"alpha": "alpha", "input_std": "input std", "saturation": "saturated share"}
# Drawings a run at its evaluations; each is a file.
_MOST_DRAWINGS = 10
# Points a line; when there are more, every second goes.
_MOST_POINTS = 128
_DIGITS = 4
_GAP = 0.08


@dataclass
class _Series:
    """One kind of number for all sites, thinned; the newest is always there."""

    points: list[tuple[int, dict[str, float]]] = field(default_factory=list)
    """(step, {site: value})."""
    newest: list[tuple[int, dict[str, float]]] = field(default_factory=list)
    stride: int = 1
    seen: int = 0

    def add(self, step: int, sites: dict[str, float]) -> None:
        self.newest = [(step, sites)]
        if self.seen % self.stride == 0:
            self.points, self.newest = [*self.points, (step, sites)], []
        self.seen += 1
        if len(self.points) > _MOST_POINTS:
            self.points, self.stride = self.points[::2], 2 * self.stride


class SiteChart:
    """Keeps what records say of the norm sites, and says when it is time to draw that again."""

    def __init__(self, epochs: int):
        """Draw for a run of so many epochs."""
        self._epochs = epochs
        self._series: dict[str, _Series] = {}
        self._drawn = 0
        self.is_stale = False
        """Whether there is something that no drawing has."""

    def add(self, values: Mapping[str, float]) -> None:
        """Take what one line of metrics.jsonl, {name: value}, says of the sites, if anything."""
        for kind in _TITLES:
            start = f"{PREFIX}{kind}/"
            sites = {name.removeprefix(start): value for name, value in values.items()
                     if name.startswith(start) and math.isfinite(value)}  # fmt: skip
            if sites:
                self._series.setdefault(kind, _Series()).add(int(values["step"]), sites)
                self.is_stale = True

    def is_due(self, values: Mapping[str, float]) -> bool:
        """Whether a line is an evaluation by which a tenth of the training is done that no drawing has."""
        return self.is_stale and "val/top1" in values and self._tenths(values) > self._drawn

    def draw(self, values: Mapping[str, float]) -> Any:
        """Draw all so far, as a plotly figure that goes with the line `values`."""
        from plotly.graph_objects import Figure

        self._drawn, self.is_stale = self._tenths(values), False
        kinds = [kind for kind in _TITLES if kind in self._series]
        height = (1 - _GAP * (len(kinds) - 1)) / len(kinds)
        traces: list[dict[str, Any]] = []
        layout: dict[str, Any] = {"template": "none", "showlegend": False, "hovermode": "closest", "margin": {"t": 10}}
        for number, kind in enumerate(kinds):
            suffix, bottom = ("" if number == 0 else str(number + 1)), 1 - number * (height + _GAP) - height
            layout[f"yaxis{suffix}"] = {"domain": [max(bottom, 0), bottom + height], "title": {"text": _TITLES[kind]}}
            traces += [trace | {"yaxis": f"y{suffix}"} for trace in _traces(self._series[kind])]
        layout["xaxis"] = {"title": {"text": "step"}, "anchor": traces[-1]["yaxis"]}
        return Figure({"data": traces, "layout": layout})

    def _tenths(self, values: Mapping[str, float]) -> int:
        return math.floor(_MOST_DRAWINGS * values["epoch"] / self._epochs + 1e-9)


def _traces(series: _Series) -> list[dict[str, Any]]:
    points = series.points + series.newest
    sites = list(dict.fromkeys(site for _, found in points for site in found))
    traces = []
    for depth, site in enumerate(sites):
        mine = [(step, found[site]) for step, found in points if site in found]
        hue = 240 * (1 - depth / max(len(sites) - 1, 1))  # from blue, the first site, to red, the last
        traces.append({
            "type": "scatter", "mode": "lines", "name": site, "x": [step for step, _ in mine],
            "y": [float(f"{value:.{_DIGITS}g}") for _, value in mine],
            "line": {"color": f"hsl({hue:.0f}, 70%, 45%)", "width": 1.5},
            "hovertemplate": "%{fullData.name}: %{y} at step %{x}<extra></extra>",
        })  # fmt: skip
    return traces
