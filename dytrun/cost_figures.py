"""Speed and memory of each arm as bars, a chart for each setting in which they were measured."""

from collections.abc import Mapping, Sequence
from statistics import median
from typing import Any

from dytrun.contrast import speed_setting
from dytrun.figures import Chart, Group, layout, plain, short
from dytrun.runs import Run

_COSTS = (("Images a second", "images_per_s", ",.0f"), ("Peak memory, GiB", "peak_mem_gib", ".2f"))


def costs(groups: Sequence[Group]) -> list[Chart]:
    """Draw speed and memory, a chart for each setting: bars of two settings say nothing about the norms."""
    settings: dict[Any, list[Run]] = {}
    for run in (run for group in groups for run in group.runs):
        if run.result.device is not None:
            settings.setdefault(speed_setting(run.result), []).append(run)
    charts = []
    for number, runs in enumerate(settings.values(), 1):
        place, note = "", f"Measured on {runs[0].result.device} × {runs[0].result.ranks}."
        if len(settings) > 1:
            place = f", setting {number} of {len(settings)}"
            note = f"{note[:-1]} ({_machine(runs[0])}). Bars of different settings are not comparable."
        for title, name, form in _COSTS:
            if chart := _bars(groups, runs, (f"{title}{place}", name, form), note):
                charts.append(chart)
    return charts


def _bars(groups: Sequence[Group], runs: Sequence[Run], scale: tuple[str, str, str], note: str) -> Chart | None:
    """Draw one cost of each arm that was measured in a setting, its range over the runs as whiskers."""
    title, name, form = scale
    names = {run.name for run in runs}
    found: list[tuple[Group, list[float], list[Run]]] = []
    for group in groups:
        own = [run for run in group.runs if run.name in names]
        values: list[float] = [value for run in own if (value := getattr(run.result, name)) is not None]
        if values:
            found.append((group, values, own))
    if not found:
        return None
    middles = [median(values) for _, values, _ in found]
    labels = [_implemented(group, own) for group, _, own in found]
    has_baseline = found[0][0].number == 0 and any(group.arm.speed_ratio is not None for group, _, _ in found[1:])
    base = middles[0] if has_baseline and middles[0] else None
    texts = [f"{middle:{form}}" + (f" ({middle / base:.2f} ×)" if base and place else "")
             for place, middle in enumerate(middles)]  # fmt: skip
    ticks = [f"{plain(group.arm.label)}<br><span style='font-size:11px'>{plain(label)}</span>"
             for (group, _, _), label in zip(found, labels, strict=True)]  # fmt: skip
    bar = {
        "type": "bar", "orientation": "h", "x": short(middles), "y": list(range(len(found))), "text": texts,
        "textposition": "inside", "insidetextanchor": "start", "hovertemplate": "%{text}<extra></extra>",
        "marker": {"color": [f"{group.look.colour}40" for group, _, _ in found],
                   "line": {"color": [group.look.colour for group, _, _ in found], "width": 2}},
        "error_x": {"type": "data", "symmetric": False, "color": "#777777", "thickness": 1.5,
                    "array": [max(values) - middle for (_, values, _), middle in zip(found, middles, strict=True)],
                    "arrayminus": [middle - min(values) for (_, values, _), middle in
                                   zip(found, middles, strict=True)]},
    }  # fmt: skip
    shape = layout("", height=70 + 46 * len(found)) | {"hovermode": "closest", "bargap": 0.25}
    shape["yaxis"] |= {"tickvals": list(range(len(found))), "ticktext": ticks, "autorange": "reversed"}
    shape["xaxis"] |= {"rangemode": "tozero"}
    rows = [[group.arm.label, label, text, str(len(values))] for (group, values, _), label, text in
            zip(found, labels, texts, strict=True)]  # fmt: skip
    said = "; ".join(f"{row[0]} ({row[1]}): {row[2]}" for row in rows)
    whiskers = "Median over runs; whiskers: least and most." if any(len(values) > 1 for _, values, _ in found) else ""
    return Chart(title, f"{title}. {said}", [bar], shape, ["norm", "implementation", title, "runs"],
                 rows, f"{whiskers} {note}".strip())  # fmt: skip


def _implemented(group: Group, runs: Sequence[Run]) -> str:
    return "; ".join(sorted({run.result.norm_impl for run in runs if run.result.norm_impl})) or "implementation unknown"


def _machine(run: Run) -> str:
    """Name a setting: device, ranks, version, and what of the machine's part counts for a speed."""
    settings: Mapping[str, Any] = {"torch": run.result.versions.get("torch")} | dict(run.result.machine)
    return ", ".join(f"{key} {value}" for key, value in sorted(settings.items()))
