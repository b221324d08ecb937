"""What the numbers of a pair say, in sentences that claim no more than they show."""

from collections.abc import Sequence

from dytrun.contrast import Arm
from dytrun.stats import Difference, Equivalence, reach

_NO_PROOF = "not larger than chance. That is no proof that the two are equal."
# With more arms than these, a sentence on each is enough.
_FEW = 2


def of_pair(base: Arm, arms: Sequence[Arm]) -> str:
    """Say what a pair shows, in a sentence.

    Args:
        base: the baseline.
        arms: the others.
    """
    if not arms:
        return f"Nothing is compared: there is only {base.label}."
    if len(arms) == 1:
        return _said(base, arms[0])
    known = [arm for arm in arms if arm.top1_difference is not None]
    lost = _named("without a finished run of a shared seed", [arm for arm in arms if arm not in known])
    if not known:
        return f"None of {len(arms)} arms has a finished run of a seed that {base.label} has."
    best = max(known, key=lambda arm: arm.top1_difference.mean if arm.top1_difference else 0.0)
    top = f"the highest is {best.label}, {_size(base, best)}"
    if all(arm.top1_difference and arm.top1_difference.n == 1 for arm in known):
        start = (f"{len(known)} arms have one seed each (n = 1), which says nothing about other seeds"
                 f"{_images_of_all(base, known)}")  # fmt: skip
        return f"{start}; {'; '.join([*lost, top])}."
    beyond = [arm for arm in known if arm.top1_difference and arm.top1_difference.is_beyond_chance]
    equal = [arm for arm in known if arm.equivalence and arm.equivalence.is_equal and arm not in beyond]
    differ = "differs" if len(beyond) == 1 else "differ"
    found = f"{len(beyond) or 'none'} of {len(known)} arms {differ} from {base.label} in top-1 by more than chance"
    found += " after Holm's correction" + (f" ({_labels(beyond)})" if beyond else ", which shows no equality")
    margin = next((arm.equivalence.margin for arm in equal if arm.equivalence), 0.0)
    parts = [found[0].upper() + found[1:], *_named(f"equal within ±{margin:g} points", equal), *lost, top]
    return f"{'; '.join(parts)}."


def of_arms(base: Arm, arms: Sequence[Arm]) -> list[str]:
    """Return a sentence an arm (those with one seed share one if they are many), and then what else is worth saying."""
    single = [arm for arm in arms if arm.top1_difference is not None and arm.top1_difference.n == 1]
    if len(single) <= 1:
        single = []
    found = [_said(base, arm) for arm in arms if arm not in single]
    if single:
        found.append(
            f"{len(single)} arms have one seed each (n = 1), so their differences from {base.label}, in the table, say "
            f"nothing about other seeds{_images_of_all(base, single)}. Train more seeds."
        )
    found += [text for arm in arms if len(arms) <= _FEW for text in _more(arm)]
    known = [arm.top1_difference for arm in arms if arm.top1_difference is not None]
    if any(one.n == 2 and one.is_beyond_chance is False for one in known):
        level = known[0].confidence
        found.append(f"Two seeds are few: their interval reaches {reach(2, level):.1f} standard errors to either side, "
                     f"that of three {reach(3, level):.1f}. Train more seeds.")  # fmt: skip
    return found


def p_value(p: float) -> str:
    """Write a p value as `p = 0.031`."""
    return "p < 0.0001" if p < 0.0001 else "p > 0.99" if 0.99 < p < 1 else f"p = {p:.2g}"


def _said(base: Arm, arm: Arm) -> str:
    found = arm.top1_difference
    if found is None:
        if arm.top1 is None or base.top1 is None:
            none = [f"{one.label} has no finished run ({_unfinished(one)})" for one in (base, arm) if one.top1 is None]
            return f"{arm.label} against {base.label}: {', and '.join(none)}."
        return f"{arm.label} against {base.label}: no seed has a finished run of both."
    size = f"{arm.label} is {_size(base, arm)} in top-1"
    if found.n == 1:
        alone = f"with one seed (n = 1), which says nothing about other seeds{_image_clause(arm)}"
        return f"{size} {alone}. Train more seeds."
    inside = _interval(found, 2)
    if inside is None:
        return f"{size} for each of n = {found.n} seeds alike: no interval can be had. Train more seeds."
    left_out = [f"{one.label}: {_unfinished(one)}" for one in (base, arm) if _unfinished(one)]
    inside += f"; not in it: {', '.join(left_out)}" if left_out else ""
    same = arm.equivalence if arm.equivalence and arm.equivalence.is_equal else None
    if found.is_beyond_chance:
        return f"{size} ({inside}): larger than chance" + (f", and yet {_equal(same)}." if same else ".")
    return f"{size} ({inside}): {f'{_equal(same)}.' if same else _NO_PROOF}"


def of_losses(base: Arm, arms: Sequence[Arm]) -> list[str]:
    """Return a sentence an arm on its validation loss, the measure of language models, in nats a byte."""
    lines = []
    for arm in arms:
        if (found := arm.loss_difference) is not None:
            inside = _interval(found, 3) or f"n = {found.n}"
            lines.append(f"{arm.label}, validation loss: {abs(found.mean):.3f} nats a byte "
                         f"{'above' if found.mean >= 0 else 'below'} {base.label} ({inside}).")  # fmt: skip
    return lines


def _interval(found: Difference, digits: int) -> str | None:
    """Write the interval of a difference, its p value and n; None where there is no interval."""
    if found.p is None or found.low is None or found.high is None:
        return None
    p = p_value(found.p)
    if found.p_holm is not None and found.p_holm != found.p:
        p += f", after Holm's correction {p_value(found.p_holm)}"
    ends = f"{found.low:+.{digits}f} to {found.high:+.{digits}f}"
    return f"{100 * found.confidence:g} % interval {ends}, {p}, n = {found.n} seeds"


def _size(base: Arm, arm: Arm) -> str:
    mean = arm.top1_difference.mean if arm.top1_difference else 0.0
    return f"{abs(mean):.2f} points {'above' if mean >= 0 else 'below'} {base.label}"


def _equal(found: Equivalence) -> str:
    p = found.p if found.p_holm is None else found.p_holm
    return f"equal within ±{found.margin:g} points (two one-sided tests, {p_value(p)})"


def _image_clause(arm: Arm) -> str:
    """Say what the images tell of two runs."""
    found = arm.images
    if found is None or found.p is None:
        return ""
    p = found.p if found.p_holm is None else found.p_holm
    text = "differ" if found.is_beyond_chance else "do not differ"
    said = f"; image by image these two runs {text} by more than the images' chance (exact McNemar test, {p_value(p)}"
    if found.low is not None and found.high is not None:
        said += f"; {100 * found.confidence:g} % interval {found.low:+.2f} to {found.high:+.2f}"
    said += ")"
    if arm.equivalence and arm.equivalence.is_equal:
        said += f", and are {_equal(arm.equivalence)}"
    return said + ", which is about these two runs and not about the norms"


def _images_of_all(base: Arm, arms: Sequence[Arm]) -> str:
    """Say of which of several pairs of runs the images tell a difference."""
    tested = [arm for arm in arms if arm.images is not None and arm.images.p is not None]
    if not tested:
        return ""
    beyond = [arm for arm in tested if arm.images and arm.images.is_beyond_chance]
    which = f" ({_labels(beyond)})" if beyond else ""
    return (f"; image by image {len(beyond) or 'none'} of these {len(tested)} runs{which} differ"
            f"{'s' if len(beyond) == 1 else ''} from {base.label}'s by more than the images' chance (exact McNemar "
            "tests, Holm's correction), which is about these runs and not about the norms")  # fmt: skip


def _more(arm: Arm) -> list[str]:
    """Say what EMA weights do, and whether seeds or images limit what is known."""
    lines, ema, found = [], arm.ema_difference, arm.spread
    if ema is not None:
        inside = "" if ema.low is None or ema.high is None else f" ({ema.low:+.2f} to {ema.high:+.2f})"
        lines.append(f"{arm.label}, with EMA weights: {ema.mean:+.2f} points{inside}, n = {ema.n}.")
    # Seeds that differ alike are a coincidence, of which nothing follows.
    if found is not None and arm.top1_difference is not None and arm.top1_difference.p is not None:
        advice = {"seeds": "more seeds would help more than more images", "images": "more images would help more than "
                  "more seeds", "either": "more seeds and more images would help alike"}[found.more]  # fmt: skip
        lines.append(
            f"{arm.label}: for new seeds and new images at once, the difference has a standard error of "
            f"{found.mean_std:.2f} points, of which seeds alone make {found.seeds_alone:.2f} and images alone "
            f"{found.images_alone:.2f} (in variances, the rest is what the two do together); {advice}."
        )
    return lines


def _unfinished(arm: Arm) -> str:
    return ", ".join(f"{count} {status}" for status, count in sorted(arm.status.items()) if status != "finished")


def _named(what: str, arms: Sequence[Arm]) -> list[str]:
    return [f"{len(arms)} {'is' if len(arms) == 1 else 'are'} {what} ({_labels(arms)})"] if arms else []


def _labels(arms: Sequence[Arm]) -> str:
    return ", ".join(arm.label for arm in arms)
