"""Pairs, intervals, refusals, the JSON and the page; numbers written out by hand."""

import functools
import json
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from conftest import TINY, config_of, tiny
from scipy import stats

from dytrun import compose, report, terminal
from dytrun.cli import main
from dytrun.config import RunConfig
from dytrun.errors import UserError
from dytrun.records import RunResult
from dytrun.run import identity
from dytrun.runs import load_runs
from dytrun.stats import paired_difference, sample


@functools.cache
def composed(overrides: tuple[str, ...]) -> RunConfig:
    return config_of(*overrides) if "data=text" in overrides else tiny(*overrides)


def put(directory: Path, *overrides: str, hits: np.ndarray | None = None, **fields) -> RunResult:
    """Leave a run in `directory` as a real one would; with `hits`, top-1 is theirs."""
    config = composed(overrides).model_copy(update={"runs_dir": str(directory)})
    if hits is not None:
        fields = {"top1": 100 * int(hits.sum()) / len(hits), "num_val": len(hits)} | fields
    result = RunResult(
        status="finished", **identity(config), num_params=10, num_norm_sites=5, norm_impl="F.layer_norm, eager",
        device="CPU", ranks=1, data_fingerprint="f", versions={"torch": "2"}, steps=44, top1=90.0, top5=99.0,
        val_loss=0.5, num_val=10_000, images_per_s=100.0, peak_mem_gib=1.0, data_wait_frac=0.01,
    )  # fmt: skip
    result = replace(result, **fields)
    config.run_dir.mkdir(parents=True)
    (config.run_dir / "config.json").write_text(config.model_dump_json())
    (config.run_dir / "metrics.jsonl").write_text(
        '{"step": 44, "epoch": 1.0, "samples_seen": 1408, "train/loss": 1.5}\n'
        '{"step": 44, "epoch": 1.0, "samples_seen": 1408, "val/top1": 90.0}\n'
    )
    result.save(config.run_dir / "result.json")
    if hits is None and result.status == "finished":
        hits = np.arange(result.num_val) < round(result.top1 * result.num_val / 100)
    if hits is not None:
        np.savez(config.run_dir / "correct.npz", correct=np.packbits(hits), num=np.array(len(hits)))
    return result


def guesses(seed: int, share: float, num: int = 1_000) -> np.ndarray:
    """Draw hits and misses; the same images are easy for every seed."""
    difficulty = np.random.default_rng(99).random(num)
    return np.random.default_rng(seed).random(num) * 0.2 + difficulty * 0.8 < share


def built(directory: Path, *overrides: str) -> report.Report:
    return report.build(compose.expand([f"dir={directory}", *overrides], "report").configs[0])


def test_mean_spread_and_interval_by_hand():
    assert sample([90.0, 92.0, 94.0]) == sample([92.0, 94.0, 90.0])
    assert (sample([90.0, 92.0, 94.0]).mean, sample([90.0, 92.0, 94.0]).std) == (92.0, 2.0)
    assert sample([90.0]).std is None
    # Differences 1, 2, 3: mean 2, standard error 1 / sqrt(3), t(0.975, 2) = 4.302653.
    found = paired_difference({0: 91.0, 1: 92.0, 2: 93.0, 9: 1.0}, {0: 90.0, 1: 90.0, 2: 90.0}, 0.95)
    assert (found.mean, found.n) == (2.0, 3)
    assert found.low == pytest.approx(2 - 4.302653 / 3**0.5, abs=1e-5)
    assert found.high == pytest.approx(2 + 4.302653 / 3**0.5, abs=1e-5)
    assert found.is_beyond_chance is False
    one = paired_difference({0: 91.0}, {0: 90.0}, 0.95)
    assert (one.mean, one.low, one.is_beyond_chance) == (1.0, None, None)
    assert paired_difference({0: 1.0}, {1: 1.0}, 0.95) is None
    # The same difference twice is a coincidence of coarse counts: an interval without width would claim certainty.
    alike = paired_difference({0: 91.0, 1: 92.0}, {0: 90.0, 1: 91.0}, 0.95)
    assert (alike.mean, alike.n, alike.low, alike.is_beyond_chance) == (1.0, 2, None, None)


def test_seeds_are_paired_and_the_verdict_says_what_may_be_said(tmp_path):
    for seed, ln, dyt in ((0, 90.0, 91.0), (1, 92.0, 93.1), (2, 94.0, 94.9)):
        put(tmp_path, f"seed={seed}", top1=ln)
        put(tmp_path, "norm=dyt", f"seed={seed}", top1=dyt, images_per_s=80.0)
    found = built(tmp_path)
    (pair,) = found.pairs
    assert [arm.label for arm in pair.arms] == ["ln", "dyt alpha_init=0.5"]
    assert pair.arms[1].top1_difference.mean == pytest.approx(1.0)
    assert pair.arms[1].speed_ratio == pytest.approx(0.8)
    assert "1.00 points above ln" in pair.verdicts[0]
    assert pair.verdicts[0].endswith("larger than chance.")
    assert "n = 3 seeds" in pair.verdicts[0]
    assert found.refused == []


TEXT = ("model=llama", "data=text")


def test_losses_on_text_are_compared_seed_by_seed(tmp_path):
    rms, dyt = (1.61, 1.62, 1.60), (1.73, 1.70, 1.75)
    for seed in range(3):
        put(tmp_path, *TEXT, "norm=rms", f"seed={seed}", val_loss=rms[seed], top1=55.0 + seed)
        put(tmp_path, *TEXT, "norm=dyt", f"seed={seed}", val_loss=dyt[seed], top1=54.1 + 1.1 * seed)
    (pair,) = built(tmp_path).pairs
    by_hand = stats.ttest_rel(dyt, rms)
    low, high = by_hand.confidence_interval(0.95)
    found = pair.arms[1].loss_difference
    assert (found.mean, found.low, found.high, found.p) == pytest.approx((np.mean(dyt) - np.mean(rms), low, high,
                                                                          by_hand.pvalue))  # fmt: skip
    said = f"dyt alpha_init=1, validation loss: 0.117 nats a byte above rms (95 % interval {low:+.3f} to {high:+.3f}, p"
    assert any(text.startswith(said) and text.endswith("n = 3 seeds).") for text in pair.verdicts)


def test_texts_that_differ_are_not_called_images(tmp_path):
    put(tmp_path, *TEXT, "norm=rms")
    put(tmp_path, *TEXT, "norm=dyt", num_val=20)
    assert not built(tmp_path).pairs
    assert any("were validated on different text (20 and 10,000 bytes)" in one for one in built(tmp_path).refused)


def test_one_seed_is_called_one_seed(tmp_path):
    put(tmp_path)
    put(tmp_path, "norm=dyt", top1=95.0)
    (pair,) = built(tmp_path).pairs
    assert "n = 1" in pair.verdicts[0]
    assert "larger than chance" not in pair.verdicts[0]


def test_equal_differences_claim_nothing(tmp_path):
    for seed in (0, 1):
        put(tmp_path, f"seed={seed}", top1=90.0)
        put(tmp_path, "norm=dyt", f"seed={seed}", top1=90.5)
    (verdict,) = built(tmp_path).pairs[0].verdicts
    assert "for each of n = 2 seeds alike: no interval can be had" in verdict


def test_arms_that_mixed_other_partners_are_said(tmp_path):
    put(tmp_path, "augment.mixup=0.8", machine={"batch_per_rank": 8})
    put(tmp_path, "augment.mixup=0.8", "norm=dyt", machine={"batch_per_rank": 16})
    assert "other partners" in built(tmp_path).pairs[0].verdicts[1]


def test_runs_that_differ_in_more_than_the_norm_are_not_compared(tmp_path):
    put(tmp_path)
    put(tmp_path, "norm=dyt", "optim.lr=2e-3")
    found = built(tmp_path)
    assert len(found.pairs) == 2
    assert not any(pair.verdicts for pair in found.pairs)
    assert all("differ in more than the norm" in reason for reason in found.refused)
    assert "optim.lr (0.001, 0.002)" in found.refused[0] + found.refused[1]


def test_runs_that_saw_other_images_are_not_compared(tmp_path):
    put(tmp_path)
    put(tmp_path, "norm=dyt", data_fingerprint="g")
    found = built(tmp_path)
    assert found.pairs == []
    assert "saw different images" in found.refused[0]


@pytest.mark.parametrize(
    "other", [{"device": "GPU"}, {"ranks": 2}, {"machine": {"compile": "model"}}, {"machine": {"batch_per_rank": 4}}]
)
def test_speeds_measured_differently_are_not_compared(tmp_path, other):
    put(tmp_path)
    put(tmp_path, "norm=dyt", **other)
    (pair,) = built(tmp_path).pairs
    assert pair.arms[1].speed_ratio is None


def test_a_diverged_arm_is_a_row(tmp_path):
    put(tmp_path)
    put(tmp_path, "norm=dyt", "norm.alpha_init=9", status="diverged", top1=None)
    found = built(tmp_path)
    columns, rows = found.table()
    assert rows[1][3:5] == ["dyt alpha_init=9", "0 (1 diverged)"]
    assert "EMA top-1 %" not in columns


def test_what_cannot_be_read_is_said(tmp_path):
    put(tmp_path)
    bad = put(tmp_path, "norm=dyt")
    path = next(path for path in tmp_path.glob("*dyt*/result.json"))
    path.write_text(path.read_text()[:40])
    assert bad.norm == "dyt"
    assert "cannot be read" in " ".join(built(tmp_path).refused)
    path.unlink()
    assert "no result yet" in " ".join(built(tmp_path).refused)


def test_any_norm_can_be_the_baseline(tmp_path):
    put(tmp_path, top1=92.0)
    put(tmp_path, "norm=dyt", top1=91.0)
    (pair,) = built(tmp_path, "baseline=dyt").pairs
    assert "ln is 1.00 points above dyt alpha_init=0.5" in pair.verdicts[0]
    put(tmp_path, "norm=dyt", "norm.alpha_init=0.8", top1=91.0)
    assert not built(tmp_path, "baseline=dyt").pairs[0].verdicts
    with pytest.raises(UserError, match="baseline: no run has norm=derf; there are runs with dyt, ln"):
        built(tmp_path, "baseline=derf")


def test_numbers_that_are_not_finite_are_null(tmp_path):
    put(tmp_path, val_loss=float("inf"))
    path = next(tmp_path.glob("*/result.json"))
    assert json.loads(path.read_text())["val_loss"] is None


def test_an_empty_directory_is_an_error(tmp_path):
    with pytest.raises(UserError, match="no finished run there"):
        built(tmp_path)


def test_what_is_published_stands_beside_what_was_measured(tmp_path):
    page = {"page": "vit_b_dyt", "source": "arXiv 1, Table 1", "top1": 82.5, "note": None, "differs": []}
    put(tmp_path)
    put(tmp_path, "norm=dyt", published=page)
    found = built(tmp_path)
    columns, rows = found.table()
    place = columns.index("published %")
    assert [row[place] for row in rows] == ["", "82.5"]
    assert "Published: vit_b_dyt (arXiv 1, Table 1)" in found.remarks()
    put(tmp_path, "norm=dyt", "seed=1", published=page | {"differs": ["optim.lr 0.001, there 0.004"]})
    found = built(tmp_path)
    assert found.table()[1][1][place] == "82.5, 82.5*"
    assert any("another recipe: optim.lr 0.001, there 0.004" in remark for remark in found.remarks())


def test_a_finished_run_that_is_typed_again_by_its_page_gets_its_figure(tmp_path, monkeypatch, capsys):
    put(tmp_path, "norm=dyt", best_top1=90.0, best_epoch=1, images_per_s=None)
    page = "published={page: vit_b_dyt, source: x, top1: null, note: null, differs: []}"
    monkeypatch.setattr("sys.argv", ["dytrun", "train", *TINY, "norm=dyt", f"runs_dir={tmp_path}", page])
    assert main() == 0
    assert "finished already" in capsys.readouterr().out
    result = RunResult.load(next(tmp_path.glob("*/result.json")))
    assert (result.published["page"], result.published["top1"]) == ("vit_b_dyt", 82.5)
    assert any(text.startswith("epochs 1, there 300") for text in result.published["differs"])


def test_arms_stand_by_norm_and_then_by_alpha(tmp_path):
    put(tmp_path, top1=91.0)
    for alpha, top1 in ((0.1, 80.0), (0.5, 90.0), (2.0, None)):
        put(tmp_path, "norm=dyt", f"norm.alpha_init={alpha}", top1=top1, status="finished" if top1 else "diverged")
    put(tmp_path, "norm=derf")
    found = built(tmp_path)
    assert [arm.label for arm in found.pairs[0].arms] == [
        "ln", "derf alpha_init=0.5 shift_init=0", "dyt alpha_init=0.1", "dyt alpha_init=0.5", "dyt alpha_init=2",
    ]  # fmt: skip
    assert "3 arms have one seed each" in found.pairs[0].verdicts[-1]


def test_arms_are_named_by_the_settings_that_are_not_the_usual_ones(tmp_path):
    put(tmp_path, "norm=dyt", "norm.affine=false", "norm.rules={final: 0.3}")
    put(tmp_path, "norm=group", "norm.num_groups=4")
    put(tmp_path, "norm=rms")
    labels = [arm.label for arm in built(tmp_path).pairs[0].arms]
    # Without ln, rms is the baseline, and so the first.
    assert labels == ["rms", "dyt alpha_init=0.5 rules=[['final', 0.3]] affine=False", "group num_groups=4"]


def test_the_jsons_numbers_are_what_the_images_give_by_hand(tmp_path):
    """report.json = the table = plain sums over correct.npz."""
    for seed in range(3):
        put(tmp_path, f"seed={seed}", hits=guesses(seed, 0.70))
        put(tmp_path, "norm=dyt", f"seed={seed}", hits=guesses(10 + seed, 0.73))
    found = built(tmp_path)
    values = json.loads((tmp_path / "report.json").read_text())
    (pair,) = values["pairs"]
    base, arm = pair["arms"]

    def hits(name: str) -> np.ndarray:
        with np.load(tmp_path / name / "correct.npz", allow_pickle=False) as arrays:
            return np.unpackbits(arrays["correct"], count=int(arrays["num"])).astype(int)

    ours, theirs = (np.stack([hits(name) for name in one["runs"]]) for one in (arm, base))
    for one, stacked in ((arm, ours), (base, theirs)):
        accuracies = 100 * stacked.mean(1)
        assert one["top1"]["mean"] == pytest.approx(accuracies.mean())
        assert one["top1"]["std"] == pytest.approx(accuracies.std(ddof=1))
    differences = 100 * (ours - theirs).mean(1)
    half = 4.302653 * differences.std(ddof=1) / 3**0.5
    seeds, images = arm["top1_difference"], arm["images"]
    assert seeds["mean"] == pytest.approx(differences.mean()) == images["difference"]
    assert (seeds["low"], seeds["high"]) == pytest.approx((differences.mean() - half, differences.mean() + half))
    assert images["only_arm"] == ((ours == 1) & (theirs == 0)).sum()
    assert images["only_baseline"] == ((ours == 0) & (theirs == 1)).sum()
    assert [one["only_arm"] for one in images["pairs"]] == ((ours == 1) & (theirs == 0)).sum(1).tolist()
    assert arm["spread"]["seed_std"] == pytest.approx(differences.std(ddof=1))
    error = 100 * (ours - theirs).mean(0).std() / 1_000**0.5
    assert images["high"] - images["low"] == pytest.approx(2 * 1.96 * error, rel=0.05)
    columns, rows = found.table()
    cells = dict(zip(columns, rows[1], strict=True))
    assert cells["top-1 %"] == f"{arm['top1']['mean']:.2f} ± {arm['top1']['std']:.2f}"
    assert cells["difference to baseline"] == f"{seeds['mean']:+.2f} [{seeds['low']:+.2f}, {seeds['high']:+.2f}]"
    assert cells["over images"] == f"[{images['low']:+.2f}, {images['high']:+.2f}]"
    assert cells["p (Holm)"] == f"{seeds['p_holm']:.2g}"
    assert values["margin"] == 0.2 and pair["verdict"] == pair["verdicts"][0]


def test_the_verdict_is_one_sentence_on_what_was_shown(tmp_path):
    def said(name: str, *arms: tuple[float, ...], margin: float = 0.2) -> str:
        for number, values in enumerate(arms):
            norm = ["norm=ln"] if number == 0 else ["norm=dyt", f"norm.alpha_init={number}"]
            for seed, top1 in enumerate(values):
                put(tmp_path / name, *norm, f"seed={seed}", top1=top1)
        return built(tmp_path / name, f"margin={margin}").pairs[0].verdict

    ln = (90.0, 91.0, 92.0)
    assert said("beyond", ln, (91.0, 92.1, 92.9)).endswith("n = 3 seeds): larger than chance.")
    assert said("not", ln, (90.5, 90.8, 92.6)).endswith(
        "not larger than chance. That is no proof that the two are equal."
    )
    equal = said("equal", ln, (90.02, 90.98, 92.01))
    assert "equal within ±0.2 points (two one-sided tests, p = " in equal and "chance" not in equal
    both = said("both", ln, (90.05, 91.06, 92.04))
    assert "larger than chance, and yet equal within ±0.2 points" in both
    many = said("many", ln, (91.0, 92.1, 92.9), (90.5, 90.8, 92.6), (90.02, 90.98, 92.01))
    assert many == (
        "1 of 3 arms differs from ln in top-1 by more than chance after Holm's correction (dyt alpha_init=1); 1 is "
        "equal within ±0.2 points (dyt alpha_init=3); the highest is dyt alpha_init=1, 1.00 points above ln."
    )


def test_several_arms_are_corrected_for(tmp_path):
    """A difference that is larger than chance by itself is not, once it is the best of five."""
    for seed in range(3):
        put(tmp_path, f"seed={seed}", top1=90.0 + seed)
    for alpha in range(1, 6):
        for seed, gain in enumerate((0.3, 0.5, 0.4) if alpha == 1 else (0.5, -0.6, 0.05 * alpha)):
            put(tmp_path, "norm=dyt", f"norm.alpha_init={alpha}", f"seed={seed}", top1=round(90.0 + seed + gain, 2))
    (pair,) = built(tmp_path).pairs
    first = pair.arms[1].top1_difference
    assert 0.01 < first.p < 0.05 < first.p_holm == pytest.approx(5 * first.p)
    assert first.low > 0 and first.is_beyond_chance is False
    assert "after Holm's correction p = 0.1" in pair.verdicts[0]
    assert "None of 5 arms differ from ln in top-1 by more than chance" in pair.verdict


def test_one_seed_is_told_image_by_image_and_called_one_seed(tmp_path):
    put(tmp_path, hits=guesses(0, 0.6))
    put(tmp_path, "norm=dyt", hits=guesses(1, 0.7))
    (pair,) = built(tmp_path).pairs
    assert "with one seed (n = 1), which says nothing about other seeds; image by image these two runs differ" in (
        pair.verdict
    )
    assert "about these two runs and not about the norms" in pair.verdict
    arm = pair.arms[1]
    assert (arm.top1_difference.low, arm.top1_difference.p, arm.spread) == (None, None, None)
    assert arm.images.low > 0 and arm.images.p < 0.05


def test_runs_left_out_of_a_comparison_are_said_in_it(tmp_path):
    for seed in range(3):
        put(tmp_path, f"seed={seed}", top1=90.0 + seed)
        put(tmp_path, "norm=dyt", f"seed={seed}", top1=91.0 + 1.1 * seed)
    put(tmp_path, "seed=3", status="diverged", top1=None)
    assert "not in it: ln: 1 diverged" in built(tmp_path).pairs[0].verdict
    put(tmp_path / "lost", "norm=dyt", status="diverged", top1=None)
    put(tmp_path / "lost")
    verdict = built(tmp_path / "lost").pairs[0].verdict
    assert verdict == "dyt alpha_init=0.5 against ln: dyt alpha_init=0.5 has no finished run (1 diverged)."
    put(tmp_path / "both", "norm=dyt", status="diverged", top1=None)
    put(tmp_path / "both", status="failed", top1=None)
    assert built(tmp_path / "both").pairs[0].verdict == (
        "dyt alpha_init=0.5 against ln: ln has no finished run (1 failed), "
        "and dyt alpha_init=0.5 has no finished run (1 diverged)."
    )


def test_ema_weights_are_compared_where_both_have_them(tmp_path):
    for seed in (0, 1, 2):
        put(tmp_path, f"seed={seed}", top1=90.0 + seed, ema_top1=91.0 + seed)
        put(tmp_path, "norm=dyt", f"seed={seed}", top1=90.5 + seed, ema_top1=91.5 + 1.1 * seed)
    (pair,) = built(tmp_path).pairs
    assert pair.arms[1].ema_difference.mean == pytest.approx(0.6)
    assert any("with EMA weights: +0.60 points" in text for text in pair.verdicts)


def damaged(path: Path, how: str) -> None:
    """Do to a correct.npz what disks, other versions and people do."""
    if how == "cut":
        path.write_bytes(path.read_bytes()[:-40])
    elif how == "flipped":
        raw = bytearray(path.read_bytes())
        raw[200] ^= 1
        path.write_bytes(raw)
    elif how == "text":
        path.write_text("no archive")
    elif how == "empty":
        path.write_bytes(b"")
    elif how == "short":
        np.savez(path, correct=np.packbits(np.ones(9_999, bool)), num=np.array(9_999))
    elif how == "pickle":
        np.savez(path, correct=np.array([{"a": 1}], dtype=object), num=np.array(10_000))
    elif how == "lies":
        np.savez(path, correct=np.packbits(np.ones(10_000, bool)), num=np.array(10_000))
    elif how == "bomb":
        np.savez_compressed(path, correct=np.zeros(50_000_000, np.uint8), num=np.array(10_000))
    elif how == "thin":
        np.savez(path, correct=np.packbits(np.ones(8, bool)), num=np.array(10_000))
    elif how == "endless":
        np.savez(path, correct=np.packbits(np.ones(10_000, bool)), num=np.array(np.inf))
    elif how in FLAGS:
        place, bit = FLAGS[how]
        raw = bytearray(path.read_bytes())
        raw[raw.index(b"PK\1\2") + place] |= bit
        path.write_bytes(raw)
    else:
        np.savez(path, hits=np.ones(10_000, bool))


# One bit in an entry of the archive's index, and a reader takes it to be encrypted, or packed in a way nobody knows.
FLAGS = {"encrypted": (8, 1), "unknown": (10, 0x40)}
DAMAGES = {
    "endless": "cannot be read", "encrypted": "cannot be read", "unknown": "cannot be read",
    "cut": "cannot be read", "flipped": "cannot be read", "text": "cannot be read", "empty": "cannot be read",
    "pickle": "cannot be read", "keys": "cannot be read", "short": "is of 9,999 images, result.json of 10000",
    "lies": "counts 10,000 hits, 100 %, where result.json says top-1 91.0 %",
    "bomb": "cannot be read (50,000,128 bytes are too many for 10000 images)",
    "thin": "has not one bit for each of 10,000",
}  # fmt: skip


@pytest.mark.parametrize(
    ("key", "value", "said"),
    [("top1", float("nan"), "result.json, top1: no finite number"),
     ("val_loss", float("inf"), "result.json, val_loss: no finite number"),
     ("science", {"norm": {}, "data": {}, "augment": {}}, "result.json lacks the run's science")],
)  # fmt: skip
def test_a_result_that_is_no_result_is_said(tmp_path, key, value, said):
    put(tmp_path)
    put(tmp_path, "norm=dyt", top1=91.0)
    path = next(tmp_path.glob("*dyt*/result.json"))
    path.write_text(json.dumps(json.loads(path.read_text()) | {key: value}))
    lines = built(tmp_path).refused
    assert f"{path.parent.name}: its files cannot be read ({said}); train it again" in lines


@pytest.mark.parametrize("how", DAMAGES)
def test_a_correct_npz_that_does_not_fit_is_said_and_not_used(tmp_path, how):
    put(tmp_path)
    put(tmp_path, "norm=dyt", top1=91.0)
    path = next(tmp_path.glob("*dyt*/correct.npz"))
    damaged(path, how)
    found = built(tmp_path)
    (line,) = found.refused
    assert line.startswith(f"{path.parent.name}: correct.npz {DAMAGES[how]}")
    assert line.endswith("train it again")
    assert found.pairs[0].arms[1].images is None
    assert found.pairs[0].arms[1].top1_difference.mean == pytest.approx(1.0)


def test_a_setting_in_brackets_is_no_markup(capsys):
    terminal.table("runs in a[b]", ["[c]"], [["include=['*[d]*']"]], ["e[f]"])
    said = capsys.readouterr().out
    assert [text for text in ("runs in a[b]", "[c]", "include=['*[d]*']", "e[f]") if text not in said] == []


def test_runs_without_hits_are_named_in_one_line(tmp_path):
    put(tmp_path)
    put(tmp_path, "norm=dyt")
    for path in tmp_path.glob("*/correct.npz"):
        path.unlink()
    (line,) = built(tmp_path).refused
    assert line.startswith("image by image, for want of a correct.npz: ") and line.count(", ") == 2


def test_runs_validated_on_other_images_are_not_compared(tmp_path):
    put(tmp_path)
    put(tmp_path, "norm=dyt", num_val=9_000)
    found = built(tmp_path)
    assert found.pairs == []
    assert "validated on different images (9,000 and 10,000 of them)" in found.refused[0]
    unknown = tmp_path / "unknown"
    put(unknown, data_fingerprint=None)
    put(unknown, "norm=dyt")
    found = built(unknown)
    assert found.pairs[0].arms[1].images is None
    assert "which images they saw is not known, so not image by image" in found.refused[0]


HALVES = {
    "config.json": ("", "{", "[]", "{}"), "result.json": ("", "[]", "{}", '{"status": "finished"}', "null"),
    "metrics.jsonl": ("{\n", "3\n", '"x"\n'),
}  # fmt: skip


@pytest.mark.parametrize(("file", "text"), [(file, text) for file, texts in HALVES.items() for text in texts])
def test_half_written_runs_are_said_and_left_out(tmp_path, file, text):
    put(tmp_path)
    put(tmp_path, "norm=dyt")
    path = next(tmp_path.glob(f"*dyt*/{file}"))
    path.write_text(text)
    found = built(tmp_path)
    assert [arm.label for pair in found.pairs for arm in pair.arms] == ["ln"]
    assert found.refused[0].startswith(f"{path.parent.name}: its files cannot be read (")


def test_what_else_lies_in_the_directory_does_no_harm(tmp_path):
    put(tmp_path)
    run = next(tmp_path.glob("*/config.json")).parent
    (tmp_path / "notes").mkdir()
    shutil.copytree(run, tmp_path / "without")
    (tmp_path / "without" / "config.json").unlink()
    shutil.copytree(run, tmp_path / "twice")
    with (run / "metrics.jsonl").open("a") as file:
        file.write('{"step": 45, "epo')  # as a kill leaves it
    found = built(tmp_path)
    assert sum(len(arm.runs) for pair in found.pairs for arm in pair.arms) == 1
    said = " ".join(found.refused)
    assert "without: a run without its config.json" in said
    assert f"the same run as {min('twice', run.name)}, and counted once" in said
    for path in tmp_path.glob("*/result.json"):
        path.unlink()
    with pytest.raises(UserError, match="no finished run there"):
        built(tmp_path)


def test_a_run_knows_its_configuration_and_command(tmp_path):
    put(tmp_path)
    (run,), _ = load_runs(tmp_path)
    assert (run.config["norm"]["name"], run.command) == ("ln", None)
    starts = tmp_path / run.name / "starts.jsonl"
    starts.write_text('{"command": "dytrun train a"}\n{"command": "dytrun train b"}\n{"command": "dytrun trai')
    assert load_runs(tmp_path)[0][0].command == "dytrun train b"
    starts.write_text("[]\nnonsense\n")
    assert load_runs(tmp_path)[0][0].command is None
