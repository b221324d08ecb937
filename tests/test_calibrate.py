"""Calibration: least squares by hand, and a trained model that stays a model."""

import json
import math
from pathlib import Path

import pytest
import torch
from conftest import TINY, dytrun, tiny
from safetensors.torch import load_file, save_file
from timm.layers import LayerNormAct
from torch import nn

from dytrun.arm import build_arm
from dytrun.calibrate import calibrate, fit
from dytrun.convert import Conversion, convert_norms
from dytrun.errors import UserError
from dytrun.norm import FUNCTIONS, PointWise
from dytrun.plan import outline


@pytest.mark.parametrize("name", sorted(set(FUNCTIONS) - {"identity"}))
@pytest.mark.parametrize("per_channel", [False, True])
def test_a_layer_of_the_same_kind_is_found_again(name, per_channel):
    """What a point-wise layer gives can be matched exactly, so alpha, weight and bias must come back."""
    torch.manual_seed(0)
    x = 3 * torch.randn(2000, 4)
    told = PointWise(4, name, 0.37, per_channel_alpha=per_channel)
    nn.init.uniform_(told.weight, 1, 2)
    nn.init.normal_(told.bias)
    found = PointWise(4, name, 0.5, per_channel_alpha=per_channel)
    result = fit(found, x, told(x).detach())
    assert result.error < 2e-3 < result.error_before
    assert result.alpha == pytest.approx(0.37, rel=2e-2)
    for part in ("alpha", "weight", "bias"):
        torch.testing.assert_close(getattr(found, part), getattr(told, part), rtol=3e-2, atol=3e-2)


def test_weight_and_bias_are_the_straight_line_a_channel():
    """With alpha held, against NumPy-free formulas: slope = cov / var, intercept = mean - slope * mean."""
    torch.manual_seed(0)
    x, y = torch.randn(500, 3), torch.randn(500, 3)
    layer = PointWise(3, "dyt", 0.8)
    layer.alpha.requires_grad_(False)
    fit(layer, x, y)
    assert layer.alpha.item() == pytest.approx(0.8)
    for channel in range(3):
        t, target = torch.tanh(0.8 * x[:, channel].double()), y[:, channel].double()
        slope = ((t - t.mean()) * (target - target.mean())).sum() / (t - t.mean()).square().sum()
        assert layer.weight[channel].item() == pytest.approx(slope.item(), rel=1e-5)
        assert layer.bias[channel].item() == pytest.approx((target.mean() - slope * t.mean()).item(), rel=1e-4)


def test_what_a_layer_does_not_have_stays_away():
    torch.manual_seed(0)
    x = torch.randn(500, 3)
    bare = PointWise(3, "dyt", 2.0)
    bare.weight = bare.bias = None
    assert fit(bare, x, torch.tanh(0.7 * x)).alpha == pytest.approx(0.7, rel=2e-2)
    assert (bare.weight, bare.bias) == (None, None)
    unbiased = PointWise(3, "dyt", 2.0)
    unbiased.bias = None
    fit(unbiased, x, 1.5 * torch.tanh(0.7 * x))
    torch.testing.assert_close(unbiased.weight, torch.full((3,), 1.5), rtol=2e-2, atol=0)


def test_a_channel_that_never_moves_gets_its_constant():
    layer = PointWise(2, "dyt")
    x = torch.stack([torch.zeros(50), torch.linspace(-1, 1, 50)], dim=1)
    fit(layer, x, torch.stack([torch.full((50,), 3.0), x[:, 1]], dim=1))
    assert layer(x)[:, 0].tolist() == pytest.approx([3.0] * 50)


def test_sites_are_fitted_in_computing_order_and_to_what_comes_before_a_fused_activation():
    torch.manual_seed(0)

    class Crossed(nn.Module):
        """Registers its second norm first."""

        def __init__(self):
            super().__init__()
            self.second = LayerNormAct(6, act_layer=nn.ReLU)
            self.first = nn.LayerNorm(6)
            self.map = nn.Linear(6, 6)

        def forward(self, x):
            return self.second(self.map(self.first(x.flatten(1))))

    teacher = Crossed()
    student = Crossed()
    student.load_state_dict(teacher.state_dict())
    convert_norms(student, Conversion())
    images = [torch.randn(40, 6, 1, 1) for _ in range(3)]
    fits = calibrate(teacher, student, images)
    assert list(fits) == ["first", "second"]
    assert all(found.error < found.error_before for found in fits.values())
    # The target is the norm's own value, of either sign; ReLU stays and cuts it.
    assert student.second.bias.min() < 0.5
    assert bool((student(images[0]) >= 0).all())
    for name, module in teacher.named_modules():
        assert not module._forward_hooks, name


@pytest.fixture(scope="module")
def trained(tmp_path_factory) -> Path:
    """A LayerNorm ViT that knows digits: 12 epochs."""
    home = tmp_path_factory.mktemp("trained")
    done = dytrun("train", *TINY, "epochs=12", "optim.lr=3e-3", f"runs_dir={home}/runs", env={"OMP_NUM_THREADS": "1"})
    assert done.returncode == 0, done.stderr
    return next(home.glob("runs/*/checkpoints/step-*/model.safetensors"))


@pytest.mark.slow
@pytest.mark.parametrize("devices", [1, 2])
def test_a_calibrated_run_begins_well_above_an_uncalibrated_one(trained, tmp_path, devices):
    args = ["train", *TINY, "norm=dyt", f"init_from={trained}", f"runs_dir={tmp_path}", f"machine.devices={devices}"]
    done = dytrun(*args, "norm.calibrate=true", env={"OMP_NUM_THREADS": "1"})
    assert done.returncode == 0, done.stderr
    (path,) = tmp_path.glob("*/result.json")
    result = json.loads(path.read_text())
    found = result["init"]["calibration"]
    assert found["top1_trained"] > 80
    assert found["top1_converted"] + 10 < found["top1_calibrated"] < found["top1_trained"]
    assert set(found["sites"]) == set(result["alpha"])
    assert all(0 < site["error"] < site["error_before"] for site in found["sites"].values())
    # Two epochs of training later it has not forgotten.
    assert result["top1"] > found["top1_calibrated"] - 5
    assert "calibrated" in done.stdout


def test_a_calibration_needs_a_trained_layernorm_model(tmp_path):
    with pytest.raises(UserError, match=r"norm.calibrate: there is no trained norm to fit.* init_from=FILE"):
        tiny("norm=dyt", "norm.calibrate=true")
    path = tmp_path / "w.safetensors"
    for norm, said in (("ln", "as a new model has them.* is not trained"), ("dyt", "is of a converted model")):
        save_file(build_arm(tiny(f"norm={norm}"), 10)[0].state_dict(), path)
        with pytest.raises(UserError, match=f"norm.calibrate: .*{said}"):
            outline(tiny("norm=dyt", "norm.calibrate=true", f"init_from={path}"))


@pytest.mark.slow
def test_calibration_draws_nothing_from_the_runs_randomness(trained, tmp_path):
    """Whoever starts from the same file sees the same images in the same order, calibrated or not."""
    firsts = []
    for extra in ("false", "true"):
        args = [*TINY, "norm=dyt", f"norm.calibrate={extra}", f"init_from={trained}", f"runs_dir={tmp_path}/{extra}"]
        done = dytrun("train", *args, env={"OMP_NUM_THREADS": "1"})
        assert done.returncode == 0, done.stderr
        (metrics,) = tmp_path.glob(f"{extra}/*/metrics.jsonl")
        firsts.append(json.loads(metrics.read_text().splitlines()[0]))
    assert firsts[0]["samples_seen"] == firsts[1]["samples_seen"]
    assert firsts[1]["train/loss"] < firsts[0]["train/loss"]
    assert math.isfinite(firsts[0]["train/loss"])
    assert load_file(trained)
