"""Pairs, intervals, refusals, the JSON and the page; numbers written out by hand."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
from conftest import TINY, tiny

from dytrun import compose, report
from dytrun.cli import main
from dytrun.errors import UserError
from dytrun.records import RunResult
from dytrun.run import identity
from dytrun.stats import paired_difference, sample


def put(directory: Path, *overrides: str, **fields) -> RunResult:
    """Leave a run in `directory` as a real one would."""
    config = tiny(f"runs_dir={directory}", *overrides)
    result = RunResult(
        status="finished", **identity(config), num_params=10, num_norm_sites=5, norm_impl="F.layer_norm, eager",
        device="CPU", ranks=1, data_fingerprint="f", versions={"torch": "2"}, steps=44, top1=90.0, top5=99.0,
        val_loss=0.5, num_val=360, images_per_s=100.0, peak_mem_gib=1.0, data_wait_frac=0.01,
    )  # fmt: skip
    result = replace(result, **fields)
    config.run_dir.mkdir(parents=True)
    (config.run_dir / "config.json").write_text(config.model_dump_json())
    (config.run_dir / "metrics.jsonl").write_text(
        '{"step": 44, "epoch": 1.0, "samples_seen": 1408, "train/loss": 1.5}\n'
        '{"step": 44, "epoch": 1.0, "samples_seen": 1408, "val/top1": 90.0}\n'
    )
    result.save(config.run_dir / "result.json")
    return result


def built(directory: Path, baseline: str = "ln") -> report.Report:
    return report.build(compose.expand([f"dir={directory}", f"baseline={baseline}"], "report").configs[0])


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
    (pair,) = built(tmp_path, "dyt").pairs
    assert "ln is 1.00 points above dyt alpha_init=0.5" in pair.verdicts[0]
    put(tmp_path, "norm=dyt", "norm.alpha_init=0.8", top1=91.0)
    assert not built(tmp_path, "dyt").pairs[0].verdicts
    assert "no run has norm=derf, the baseline; there are runs with dyt, ln" in built(tmp_path, "derf").refused


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
    assert labels == ["dyt alpha_init=0.5 rules=[['final', 0.3]] affine=False", "group num_groups=4", "rms"]
