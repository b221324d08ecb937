"""A directory of runs → table, verdicts, JSON and page."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from dytrun import page
from dytrun.config import ReportConfig
from dytrun.contrast import Arm, Rule
from dytrun.pairs import Pair, pair_runs
from dytrun.records import write_json
from dytrun.runs import load_runs
from dytrun.stats import Difference, Sample
from dytrun.verdict import p_value

# From this share of waiting on, a speed says more about the loader than about the norm.
_DATA_BOUND = 0.1

COLUMNS = (
    "pair", "model", "data", "norm", "n", "top-1 %", "published %", "difference to baseline", "p (Holm)",
    "equal within margin", "over images", "EMA top-1 %", "loss", "images/s", "× baseline", "peak GiB",
    "data wait", "norm implementation",
)  # fmt: skip


@dataclass(frozen=True)
class Report:
    """What a directory of runs says; report.json is its fields."""

    directory: str
    baseline: str | None
    """As it was asked for."""
    confidence: float
    margin: float
    """Points of top-1 within which two arms count as equal."""
    pairs: list[Pair]
    refused: list[str]
    """Comparisons that were not made, and why."""

    def table(self) -> tuple[list[str], list[list[str]]]:
        """Return the table's columns and rows; a column in which no row has anything is left out."""
        rows = [_row(pair, arm) for pair in self.pairs for arm in pair.arms]
        used = [number for number in range(len(COLUMNS)) if any(row[number] not in ("", "–") for row in rows)]
        names = [name.replace("margin", f"±{self.margin:g}") for name in COLUMNS]
        return [names[number] for number in used], [[row[number] for number in used] for row in rows]

    def verdicts(self) -> list[str]:
        """Return what each pair says, and then each of its arms, where that is more."""
        return [f"{pair.model} on {pair.data} (pair {pair.pair_id}): {verdict}" for pair in self.pairs if pair.verdicts
                for verdict in _without_repeats(pair)]  # fmt: skip

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
    pairs, not_made = pair_runs(runs, config.baseline, Rule(config.confidence, config.margin))
    refused += not_made
    report = Report(config.dir, config.baseline, config.confidence, config.margin, pairs, refused)
    write_json(directory / "report.json", asdict(report))
    alone = [replace(report, pairs=[pair], refused=[]) for pair in pairs]
    sections = [page.Section(one.pairs[0], *one.table(), one.remarks()) for one in alone]
    page.write(directory / "report.html", sections, runs, refused)
    return report


def _without_repeats(pair: Pair) -> list[str]:
    """Return the verdict on a pair, unless the one on its only arm begins with it, and the verdicts on its arms."""
    is_in_first = pair.verdicts[0].startswith(pair.verdict)
    return pair.verdicts if is_in_first else [pair.verdict, *pair.verdicts]


def _row(pair: Pair, arm: Arm) -> list[str]:
    found = arm.top1_difference
    unfinished = ", ".join(f"{count} {status}" for status, count in sorted(arm.status.items()) if status != "finished")
    return [
        pair.pair_id,
        pair.model,
        pair.data,
        arm.label,
        str(arm.top1.n if arm.top1 else 0) + (f" ({unfinished})" if unfinished else ""),
        _spread(arm.top1),
        _expected(arm),
        _gap(found),
        _p(found.p_holm) if found else "",
        _same(arm),
        _over_images(arm),
        _spread(arm.ema_top1),
        _spread(arm.val_loss, 4) if pair.data == "text" else "",
        f"{arm.images_per_s:,.0f}" if arm.images_per_s else "–",
        f"{arm.speed_ratio:.2f}" if arm.speed_ratio else "",
        f"{arm.peak_mem_gib:.2f}" if arm.peak_mem_gib else "–",
        f"{100 * arm.data_wait_frac:.0f} %" if arm.data_wait_frac is not None else "–",
        "; ".join(arm.norm_impl),
    ]


def _gap(found: Difference | None) -> str:
    if found is None:
        return ""
    return f"{found.mean:+.2f}" + (_ends(found.low, found.high) or f" (n = {found.n})")


def _same(arm: Arm) -> str:
    """Say whether two one-sided tests show an arm equal to the baseline."""
    found = arm.equivalence
    if found is None:
        return ""
    p = found.p if found.p_holm is None else found.p_holm
    return f"yes, {p_value(p)}" if found.is_equal else "not shown"


def _over_images(arm: Arm) -> str:
    """Return the interval over images, and McNemar's p where there is one pair of runs."""
    found = arm.images
    if found is None:
        return ""
    said = [_ends(found.low, found.high).strip() or "too few differ", *([p_value(p)] if (p := found.p_holm) else [])]
    return ", ".join(said)


def _ends(low: float | None, high: float | None) -> str:
    return "" if low is None or high is None else f" [{low:+.2f}, {high:+.2f}]"


def _p(p: float | None) -> str:
    return "" if p is None else p_value(p).removeprefix("p").removeprefix(" = ").strip()


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


def _spread(found: Sample | None, digits: int = 2) -> str:
    if found is None:
        return "–"
    return f"{found.mean:.{digits}f}" + (f" ± {found.std:.{digits}f}" if found.std is not None else "")
