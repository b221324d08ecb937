"""What `dytrun probe` found → one HTML page that needs no network."""

import html
from collections.abc import Mapping, Sequence
from typing import Any

from dytrun.activations import SATURATED
from dytrun.probe_figures import Drawn
from dytrun.probe_sites import LINEAR, OUTLIER
from dytrun.records import Table

_STYLE = """
:root { color-scheme: light dark; --line: #8886; --soft: #8881; }
body { font: 16px/1.5 system-ui, sans-serif; max-width: 72rem; margin: 2rem auto; padding: 0 1rem; }
.scroll { overflow-x: auto; }
table { border-collapse: collapse; font-size: .85rem; }
th, td { padding: .3rem .6rem; border-bottom: 1px solid var(--line); text-align: right; white-space: nowrap; }
th:first-child, td:first-child { text-align: left; }
caption { text-align: left; padding-bottom: .4rem; }
td { font-variant-numeric: tabular-nums; }
.verdict { font-size: 1.1rem; padding: .6rem 1rem; border-left: 4px solid #2f86c1; background: var(--soft); }
.about { display: grid; grid-template-columns: max-content 1fr; gap: .1rem 1rem; font-size: .9rem; }
.about dt { opacity: .75; } .about dd { margin: 0; overflow-wrap: anywhere; }
.figures { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 26rem), 1fr)); gap: 1rem 2rem; }
.sites { display: grid; grid-template-columns: repeat(auto-fill, minmax(min(100%, 15rem), 1fr)); gap: .5rem; }
h1 { overflow-wrap: anywhere; font-size: 1.6rem; }
figure { margin: 0; break-inside: avoid; } figure svg { width: 100%; height: auto; }
figcaption { font-size: .85rem; opacity: .85; } h2 { margin-top: 2.5rem; } h3 { margin: 1rem 0 .3rem; font-size: 1rem; }
@media print { body { max-width: none; margin: 0; } }
"""
_SHOWN = ("run", "model", "norm", "data", "seed", "checkpoint", "step", "weights", "precision", "device", "torch")


def page(about: Mapping[str, Any], verdicts: Sequence[str], table: Table, figures: Sequence[Drawn]) -> str:
    """Return the page: what was probed, what it says in a sentence, the table, figures, and what the words mean."""
    title = f"dytrun probe: {about['run']}, step {about['step']:,}, {about['weights']} weights"
    rows = [(name, str(about[name])) for name in _SHOWN]
    rows.append(("images", f"{about['num_images']} of the {about['num_val']:,} validation images, spread evenly over "
                 "the classes; probe.json lists them"))  # fmt: skip
    known = "".join(f"<dt>{html.escape(name)}</dt><dd>{html.escape(text)}</dd>" for name, text in rows)
    sites = [figure for figure in figures if figure.is_site]
    over_depth = [figure for figure in figures if not figure.is_site and figure.name != "curves"]
    parts = [
        "<main>",
        f"<h1>{html.escape(title)}</h1>",
        *(f"<p class=verdict>{html.escape(verdict)}</p>" for verdict in verdicts),
        f"<dl class=about>{known}</dl>",
        "<h2>Every site</h2>",
        '<div class=scroll tabindex=0 role=region aria-label="Numbers of every site">',
        _table(table),
        "</div>",
        "<h2>Over depth</h2><div class=figures>",
        *(_figure(figure, "h3") for figure in over_depth),
        "</div>",
        "<h2>Input-output curves</h2>",
        f"<p>{html.escape(_legend(sites, table))}</p>",
        "<div class=sites>",
        *(_figure(figure, None) for figure in sites),
        "</div>",
        "<h2>What the words mean</h2>",
        *(f"<p>{html.escape(text)}</p>" for text in _WORDS),
        "</main>",
    ]
    return (
        "<!doctype html>\n<html lang=en>\n<head><meta charset=utf-8>"
        '<meta name=viewport content="width=device-width, initial-scale=1">'
        '<link rel=icon href="data:,">'
        f"<title>{html.escape(title)}</title><style>{_STYLE}</style></head>\n<body>\n"
        + "\n".join(parts)
        + "\n</body>\n</html>\n"
    )


_WORDS = (
    "Input std: standard deviation over all elements that go into a norm: images, tokens or pixels, and channels "
    "together (figure 8 of arXiv 2503.10622 v2). 1/std is what alpha is compared with.",
    "S index: a tanh(a x) b + c and a straight line are fitted, by least squares, to the elements of up to 1,024 rows "
    "(tokens or pixels) drawn at random, output before weight and bias against input. The index is the share of the "
    "line's squared error that the tanh removes: 0 where the norm is a straight line, 1 where it is a tanh. R² is the "
    "share of the output's variance that each explains.",
    f"Ranges, with z = alpha x + shift: an input is saturated where f(z) is beyond {SATURATED:g} of the way from the "
    f"middle to a bound of f (for tanh |z| > 2.65); linear where f(z) is within {LINEAR:g} of half of f's range of the "
    "straight line through f(0) with f's slope there (for tanh |z| < 0.31); curved between them. A norm has no alpha: "
    "it gets the a of its fitted tanh. A function without bounds does not saturate.",
    "RMS in, RMS out: root mean square of what goes in and of what comes out after weight and bias. Outlier channels: "
    f"those whose root mean square is beyond {OUTLIER:g} times the median channel's.",
)


def _legend(sites: Sequence[Drawn], table: Table) -> str:
    if "S index" in table.columns:
        return (f"{len(sites)} sites, output before weight and bias against input. Blue: density of the elements, on "
                "a log scale; orange, dashed: the nearest tanh; grey, dotted: the nearest straight line; S: the S "
                "index.")  # fmt: skip
    return (f"{len(sites)} sites. Orange: the function of alpha x before weight and bias, over the inputs that were "
            "seen; blue: density of the inputs.")  # fmt: skip


def _figure(figure: Drawn, heading: str | None) -> str:
    said = html.escape(figure.said)
    head = f"<{heading}>{html.escape(figure.title)}</{heading}>" if heading else ""
    caption = f"<figcaption>{said}</figcaption>" if heading else ""
    return f'<figure>{head}<div role=img aria-label="{said}">{figure.svg()}</div>{caption}</figure>'


def _table(table: Table) -> str:
    head = "".join(f"<th scope=col>{html.escape(name)}</th>" for name in table.columns)
    body = "".join(
        f"<tr><th scope=row>{html.escape(row[0])}</th>"
        + "".join(f"<td>{html.escape(cell)}</td>" for cell in row[1:])
        + "</tr>"
        for row in table.rows
    )
    caption = f"<caption>{html.escape(table.title)}</caption>"
    return f"<table>{caption}<thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>"
