"""A directory of runs → table, verdicts, JSON and page."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from dytrun import page
from dytrun.config import ReportConfig
from dytrun.pairs import Arm, Pair, Run, load_runs, pair_runs
from dytrun.records import write_json
from dytrun.stats import Sample

# From this share of waiting on, a speed says more about the loader than about the norm.
_DATA_BOUND = 0.1

COLUMNS = (
    "pair", "model", "data", "norm", "n", "top-1 %", "published %", "difference to baseline", "EMA top-1 %", "loss",
    "images/s", "× baseline", "peak GiB", "data wait", "norm implementation",
)  # fmt: skip


@dataclass(frozen=True)
class Report:
    """What a directory of runs says."""

    directory: str
    baseline: str | None
    """As it was asked for."""
    confidence: float
    pairs: list[Pair]
    refused: list[str]
    """Comparisons that were not made, and why."""

    def table(self) -> tuple[list[str], list[list[str]]]:
        """Return the table's columns and rows; a column in which no row has anything is left out."""
        rows = [_row(pair, arm) for pair in self.pairs for arm in pair.arms]
        used = [number for number in range(len(COLUMNS)) if any(row[number] not in ("", "–") for row in rows)]
        return [COLUMNS[number] for number in used], [[row[number] for number in used] for row in rows]

    def verdicts(self) -> list[str]:
        """Return a sentence for each arm that was compared with the baseline."""
        return [f"{pair.model} on {pair.data} (pair {pair.pair_id}): {_named(pair, verdict)}" for pair in self.pairs
                for verdict in pair.verdicts]  # fmt: skip

    def remarks(self) -> list[str]:
        """Return what belongs under the table: where speeds were measured, and what was not compared."""
        arms = [arm for pair in self.pairs for arm in pair.arms]
        devices = sorted({device for arm in arms for device in arm.device})
        lines = [f"Speed and memory were measured on: {device}" for device in devices]
        lines += _footnotes(arms)
        if max((arm.data_wait_frac or 0 for arm in arms), default=0) > _DATA_BOUND:
            lines.append(
                "Where the data wait is large, the images/s may say more about the loader than about the norm."
            )
        if any(pair.data == "text" for pair in self.pairs):
            lines.append("Where data is text: the loss is in nats a byte over every validation byte, top-1 the share "
                         "of bytes guessed first (next-byte accuracy), images/s are windows of text a second. Nothing "
                         "is compared byte by byte: neighbours are no independent cases.")  # fmt: skip
        return lines + [f"Not compared: {reason}" for reason in self.refused]


def build(config: ReportConfig) -> Report:
    """Read the runs of a directory, pair them, and write report.json and report.html beside them.

    Raises:
        UserError: there is no run with a result.
    """
    directory = Path(config.dir)
    runs, refused = load_runs(directory)
    pairs, not_made = pair_runs(runs, config.baseline, config.confidence)
    refused += not_made
    report = Report(config.dir, config.baseline, config.confidence, pairs, refused)
    write_json(directory / "report.json", asdict(report))
    charts = page.Charts(_alpha_sweeps(pairs), _curves(pairs, runs))
    page.write(directory / "report.html", report.verdicts(), report.table(), report.remarks(), charts)
    return report


def _named(pair: Pair, verdict: str) -> str:
    """Say what top-1 is of a text."""
    return verdict.replace("top-1", "next-byte top-1") if pair.data == "text" else verdict


def _row(pair: Pair, arm: Arm) -> list[str]:
    found = arm.top1_difference
    gap = "" if found is None else f"{found.mean:+.2f}"
    if found is not None and found.low is not None:
        gap += f" [{found.low:+.2f}, {found.high:+.2f}]"
    elif found is not None:
        gap += f" (n = {found.n})"
    unfinished = ", ".join(f"{count} {status}" for status, count in sorted(arm.status.items()) if status != "finished")
    return [
        pair.pair_id,
        pair.model,
        pair.data,
        arm.label,
        str(arm.top1.n if arm.top1 else 0) + (f" ({unfinished})" if unfinished else ""),
        _spread(arm.top1),
        _expected(arm),
        gap,
        _spread(arm.ema_top1),
        _spread(arm.val_loss, 4) if pair.data == "text" else "",
        f"{arm.images_per_s:,.0f}" if arm.images_per_s else "–",
        f"{arm.speed_ratio:.2f}" if arm.speed_ratio else "",
        f"{arm.peak_mem_gib:.2f}" if arm.peak_mem_gib else "–",
        f"{100 * arm.data_wait_frac:.0f} %" if arm.data_wait_frac is not None else "–",
        "; ".join(arm.norm_impl),
    ]


def _expected(arm: Arm) -> str:
    """Return the published figures of an arm, starred where a footnote limits them."""
    figures = [("–" if page["top1"] is None else f"{page['top1']:g}") + ("*" if page["differs"] or page["note"] else "")
               for page in arm.published]  # fmt: skip
    return ", ".join(dict.fromkeys(figures))


def _footnotes(arms: Sequence[Arm]) -> list[str]:
    """Say where published figures come from, and what keeps them from being those of the runs."""
    lines = []
    for expected in (item for arm in arms for item in arm.published):
        text = f"Published: {expected['page']} ({expected['source']})"
        text += f". * {expected['note']}" if expected["note"] else ""
        text += f". * The runs have another recipe: {'; '.join(expected['differs'])}" if expected["differs"] else ""
        lines.append(text)
    return list(dict.fromkeys(lines))


def _alpha_sweeps(pairs: Sequence[Pair]) -> list[page.AlphaSweep]:
    """Find arms that differ in alpha_init alone: two or more of them are a sweep."""
    sweeps = []
    for pair in pairs:
        groups: dict[str, list[Arm]] = {}
        for arm in pair.arms:
            if arm.alpha_init is not None:
                groups.setdefault(arm.label.replace(f" alpha_init={arm.alpha_init:g}", ""), []).append(arm)
        base = [(arm.label, arm.top1.mean) for arm in pair.arms if arm.alpha_init is None and arm.top1 is not None]
        for label, arms in groups.items():
            if len({arm.alpha_init for arm in arms}) > 1:
                points = [page.AlphaPoint(arm.alpha_init or 0.0, arm.top1.mean if arm.top1 else None,
                                          arm.top1.std if arm.top1 else None) for arm in arms]  # fmt: skip
                title = f"{pair.model} on {pair.data} (pair {pair.pair_id}): {label}"
                sweeps.append(page.AlphaSweep(title, sorted(points), base))
    return sweeps


def _curves(pairs: list[Pair], runs: list[Run]) -> list[page.Curve]:
    by_name = {run.name: run for run in runs}
    curves = []
    for pair in pairs:
        for arm in pair.arms:
            for run in (by_name[name] for name in arm.runs):
                for metric in ("val/top1", "train/loss"):
                    points = [(line["epoch"], line[metric]) for line in run.records if line.get(metric) is not None]
                    curves.append(page.Curve(pair.pair_id, f"{pair.model} on {pair.data}", arm.label,
                                             run.result.seed, metric, points))  # fmt: skip
    return curves


def _spread(found: Sample | None, digits: int = 2) -> str:
    if found is None:
        return "–"
    return f"{found.mean:.{digits}f}" + (f" ± {found.std:.{digits}f}" if found.std is not None else "")
