"""The figures of `dytrun probe`, for the page and, as SVG with text and PNG at 300 dpi, for papers (a column wide)."""

import io
import itertools
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import matplotlib as mpl
import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.colors import LinearSegmentedColormap, LogNorm
from matplotlib.figure import Figure

from dytrun.functions import FUNCTIONS
from dytrun.probe_sites import Cloud, SiteLook, Spread

# Distinguishable with every kind of colour vision (Okabe and Ito), and on white as on black.
_BLUE, _ORANGE, _GREEN, _GREY = "#2f86c1", "#d55e00", "#009e73", "#8a8a8a"
# Text and axes: in the page it is whatever colour the page's text has.
_INK = "#1b1b1c"
_MARKERS = (("o", _BLUE), ("s", _ORANGE), ("^", _GREEN), ("D", _GREY), ("v", "#cc79a7"))
_COLUMN, _PAGE = 3.5, 7.1  # inches
_CELLS = 72
# Sites in the figure of curves that goes into papers, and names that fit below an axis.
_MOST_PANELS, _MOST_NAMES = 8, 14
_STYLE: Any = {
    "font.size": 8, "axes.titlesize": 8, "svg.fonttype": "none", "svg.hashsalt": "dytrun", "text.color": _INK,
    "axes.edgecolor": _INK, "axes.labelcolor": _INK, "xtick.color": _INK, "ytick.color": _INK, "axes.linewidth": 0.6,
    "axes.spines.top": False, "axes.spines.right": False, "legend.frameon": False, "legend.fontsize": 7,
    "grid.color": "#88888855", "grid.linewidth": 0.5, "lines.linewidth": 1.2, "lines.markersize": 3.5,
    "axes.axisbelow": True,
}  # fmt: skip
_DENSITY = LinearSegmentedColormap.from_list("density", [(0.2, 0.55, 0.8, 0.3), (0.2, 0.55, 0.8, 1.0)])


@dataclass(frozen=True)
class Drawn:
    """A figure."""

    name: str
    title: str
    said: str
    """What it shows, for a caption and for who cannot see it."""
    figure: Figure
    is_site: bool = False
    """Whether it is one of a site, for the page alone."""

    def save(self, folder: Path) -> None:
        """Write NAME.svg and NAME.png; nothing of a site's own figure."""
        if self.is_site:
            return
        with mpl.rc_context(_STYLE):
            self.figure.savefig(folder / f"{self.name}.svg", metadata={"Date": None})
            self.figure.savefig(folder / f"{self.name}.png", dpi=300, facecolor="white")

    def svg(self) -> str:
        """Return it as an element of an HTML page, in the colour of the page's text."""
        written = io.StringIO()
        with mpl.rc_context(_STYLE):
            self.figure.savefig(written, format="svg", transparent=True, dpi=150, metadata={"Date": None})
        text = written.getvalue()
        text = text[text.index("<svg") :].replace(_INK, "currentColor")
        text = re.sub(r"<metadata>.*?</metadata>", "", text, flags=re.DOTALL)
        # Several figures share a page, and their names of parts must not meet.
        text = re.sub(r'(\bid="|url\(#|xlink:href="#)', rf"\g<1>{self.name}-", text)
        return re.sub(r'<svg ([^>]*?)width="[^"]*"', r'<svg aria-hidden="true" \1', text, count=1).replace(
            ' height="', ' data-height="', 1
        )


def draw(sites: Sequence[SiteLook], clouds: Sequence[Cloud]) -> list[Drawn]:
    """Draw everything: first the figures over depth, then the curve of each site."""
    pairs = list(zip(sites, clouds, strict=True))
    with mpl.rc_context(_STYLE):
        return [
            _curves(pairs),
            *(_s_index(sites) if any(site.shape for site in sites) else []),
            *_against_std(sites),
            _ranges(sites),
            _norms(sites),
            *_parameters(sites),
            *(_site(number, *pair) for number, pair in enumerate(pairs)),
        ]


def _curves(pairs: Sequence[tuple[SiteLook, Cloud]]) -> Drawn:
    """Draw some sites, evenly over depth."""
    chosen = np.unique(np.linspace(0, len(pairs) - 1, min(_MOST_PANELS, len(pairs))).round().astype(int))
    columns = min(4, len(chosen))
    rows = -(-len(chosen) // columns)
    figure = Figure((_PAGE, 1.75 * rows), layout="constrained")
    for place, number in enumerate(chosen):
        _panel(figure.add_subplot(rows, columns, place + 1), *pairs[number])
    figure.supxlabel("input", fontsize=8)
    figure.supylabel("output before weight and bias", fontsize=8)
    said = f"Output against input of {len(chosen)} of {len(pairs)} sites, from the first to the last."
    return Drawn("curves", "Input-output curves", said, figure)


def _site(number: int, site: SiteLook, cloud: Cloud) -> Drawn:
    figure = Figure((2.3, 1.9), layout="constrained")
    _panel(figure.add_subplot(), site, cloud)
    low, high = float(cloud.x.min()), float(cloud.x.max())
    said = f"{site.name}: inputs from {low:.3g} to {high:.3g}"
    if site.shape is not None:
        said += f", outputs from {cloud.y.min():.3g} to {cloud.y.max():.3g}; S-shape index {site.shape.s_index:.3f}"
    return Drawn(f"site-{number}", site.name, said, figure, is_site=True)


def _panel(axes: Axes, site: SiteLook, cloud: Cloud) -> None:
    """Draw a norm's cloud with the nearest tanh and line, or a function's curve with the density of its inputs."""
    x, y = cloud.x.ravel(), cloud.y.ravel()
    along = np.linspace(x.min(), x.max(), 200)
    if site.shape is not None:
        counts, x_edges, y_edges = np.histogram2d(x, y, _CELLS)
        shown = np.ma.masked_equal(counts.T, 0)
        mesh = axes.pcolormesh(x_edges, y_edges, shown, cmap=_DENSITY, norm=LogNorm(1, counts.max()), rasterized=True)
        mesh.set_edgecolor("none")
        shape = site.shape
        axes.plot(along, np.poly1d(np.polyfit(x, y, 1))(along), color=_GREY, linestyle=":", linewidth=1)
        tanh = np.tanh(shape.scale * along) * shape.height + shape.offset
        axes.plot(along, tanh, color=_ORANGE, linestyle="--", linewidth=1)
        margin = 0.05 * np.ptp(y)
        axes.set_ylim(y.min() - margin, y.max() + margin)
        note = f"S {shape.s_index:.2f}"
    else:
        z = torch.from_numpy(along) * (site.alpha or 0.0) + (site.shift or 0.0)
        curve = FUNCTIONS[site.kind](z).numpy()
        density, edges = np.histogram(x, _CELLS)
        middle = (edges[1:] + edges[:-1]) / 2
        low = min(float(curve.min()), -1.0)
        axes.fill_between(middle, low, low + density / density.max(), color=_BLUE, alpha=0.35, linewidth=0)
        axes.plot(along, curve, color=_ORANGE)
        note = "" if site.shares.saturated is None else f"{site.shares.saturated:.1%} saturated"
    axes.set_title(site.name)
    axes.text(0.03, 0.97, note, transform=axes.transAxes, va="top", fontsize=7)
    axes.grid(visible=True)


def _s_index(sites: Sequence[SiteLook]) -> Iterator[Drawn]:
    values = [site.shape.s_index if site.shape else np.nan for site in sites]
    with _over_depth(sites) as (figure, axes):
        axes.bar(range(len(sites)), values, color=_ORANGE, width=0.7)
        axes.set_ylim(0, 1)
        axes.set_ylabel("S-shape index")
    said = ("Share of the best straight line's squared error that the best tanh removes, by site: 0 is a straight "
            "line, 1 a tanh.")  # fmt: skip
    yield Drawn("s-shape", "How S-shaped the norms are", said, figure)


def _against_std(sites: Sequence[SiteLook]) -> Iterator[Drawn]:
    inverse = [site.inverse_std if site.inverse_std else np.nan for site in sites]
    alphas = [np.nan if site.alpha is None else site.alpha for site in sites]
    has_alphas = not np.isnan(alphas).all()
    with _over_depth(sites) as (figure, axes):
        axes.plot(inverse, "o-", color=_BLUE, label="1/std of the input")
        if has_alphas:
            axes.plot(alphas, "s--", color=_ORANGE, label="alpha")
        axes.set_ylim(bottom=0)
        figure.legend(loc="outside upper center", ncols=2)
    what = "Alpha and 1/std of the input" if has_alphas else "1/std of the input"
    yield Drawn("std-by-depth", f"{what} over depth", f"{what} of each site, in the order of the model.", figure)
    if not has_alphas:
        return
    figure = Figure((_COLUMN, 2.7), layout="constrained")
    axes = figure.add_subplot()
    roles = [site.role for site in sites]
    for role, (marker, colour) in zip(dict.fromkeys(roles), itertools.cycle(_MARKERS), strict=False):
        own = [number for number, one in enumerate(roles) if one == role]
        x, y = ([values[number] for number in own] for values in (inverse, alphas))
        axes.plot(x, y, marker, color=colour, linestyle="", label=role.replace("_", " "))
    is_numbered = len(sites) <= _MOST_NAMES
    for number, (x, y) in enumerate(zip(inverse, alphas, strict=True)) if is_numbered else ():
        axes.annotate(str(number), (x, y), xytext=(3, 3), textcoords="offset points", fontsize=6)
    axes.set_xlabel("1/std of the input")
    axes.set_ylabel("alpha")
    axes.grid(visible=True)
    figure.legend(loc="outside upper center", ncols=3)
    said = "Alpha against 1/std of the input, a point a site, marked by its role"
    said += ", numbered by depth from 0." if is_numbered else "."
    yield Drawn("alpha-against-std", "Alpha against 1/std", said, figure)


def _ranges(sites: Sequence[SiteLook]) -> Drawn:
    figure = Figure((_COLUMN, 0.9 + 0.15 * len(sites)), layout="constrained")
    axes = figure.add_subplot()
    left = np.zeros(len(sites))
    hatches = {"linear": "", "curved": "", "saturated": "////"}
    for part, colour in (("linear", _BLUE), ("curved", "#b9b9b9"), ("saturated", _ORANGE)):
        width = np.array([100 * (getattr(site.shares, part) or 0.0) for site in sites])
        axes.barh(range(len(sites)), width, left=left, color=colour, height=0.8, label=part, hatch=hatches[part])
        left += width
    axes.set_yticks(range(len(sites)), [site.name for site in sites], fontsize=6)
    axes.invert_yaxis()
    axes.set_xlim(0, 100)
    axes.set_xlabel("share of the inputs, %")
    figure.legend(loc="outside upper center", ncols=3)
    said = "Share of each site's inputs in the linear, the curved and the saturated range of its function."
    return Drawn("ranges", "Where the inputs lie", said, figure)


def _norms(sites: Sequence[SiteLook]) -> Drawn:
    with _over_depth(sites) as (figure, axes):
        axes.plot([site.largest_in for site in sites], "^:", color=_GREY, label="largest |input|")
        axes.plot([site.rms_in for site in sites], "o-", color=_BLUE, label="RMS of the input")
        axes.plot([site.rms_out for site in sites], "s--", color=_ORANGE, label="RMS of the output")
        axes.set_yscale("log")
        figure.legend(loc="outside upper center", ncols=3, columnspacing=1)
    said = "Root mean square of what goes into each site and of what comes out, and the largest absolute input."
    return Drawn("activations", "Size of the activations", said, figure)


def _parameters(sites: Sequence[SiteLook]) -> Iterator[Drawn]:
    """Draw weight and bias, if there are any: mean, standard deviation, range over channels."""
    for name, title, colour in (("weight", "Weight (gamma)", _GREEN), ("bias", "Bias (beta)", _BLUE)):
        found: list[tuple[int, Spread]] = [
            (number, getattr(site, name)) for number, site in enumerate(sites) if getattr(site, name) is not None
        ]
        if not found:
            continue
        at = [number for number, _ in found]
        mean = np.array([one.mean for _, one in found])
        with _over_depth(sites) as (figure, axes):
            axes.vlines(at, [one.least for _, one in found], [one.most for _, one in found], color=_GREY, linewidth=0.8)
            std = [one.std for _, one in found]
            axes.errorbar(at, mean, std, fmt="o", color=colour, elinewidth=2.5, markersize=4)
            axes.set_ylabel(name)
        said = f"{title} over the channels of each site: mean, one standard deviation (thick), range (thin)."
        yield Drawn(name, title, said, figure)


@contextmanager
def _over_depth(sites: Sequence[SiteLook]) -> Iterator[tuple[Figure, Axes]]:
    """Give axes whose x are the sites in the order of the model: by name, or by number where they are many."""
    figure = Figure((_COLUMN, 2.5), layout="constrained")
    axes = figure.add_subplot()
    axes.grid(visible=True, axis="y")
    yield figure, axes
    if len(sites) <= _MOST_NAMES:
        axes.set_xticks(range(len(sites)), [site.name for site in sites], rotation=45, ha="right", fontsize=6)
    else:
        axes.set_xlabel("site, by number")
