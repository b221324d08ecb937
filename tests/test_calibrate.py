"""Calibration: least squares by hand, and a trained model that stays a model."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import TINY, dytrun, tiny
from safetensors.torch import load_file, save_file
from timm.layers import LayerNorm2d, LayerNormAct
from torch import nn

from dytrun.arm import build_arm
from dytrun.calibrate import _seen, calibrate, fit
from dytrun.convert import Conversion, convert_norms
from dytrun.data import RankShare, train_batches
from dytrun.distributed import Place
from dytrun.errors import UserError
from dytrun.norm import FUNCTIONS, PointWise
from dytrun.plan import outline
from dytrun.records import Accuracy
from dytrun.sources import load_data
from dytrun.warmstart import calibrate_start, load_start


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
    target = told(x).detach()
    before = (found(x).detach() - target).norm() / (target - target.mean(0)).norm()
    result = fit(found, x, target)
    assert result.error_before == pytest.approx(before.item(), rel=1e-4)
    after = (found(x).detach() - target).norm() / (target - target.mean(0)).norm()
    assert result.error == pytest.approx(after.item(), rel=1e-2, abs=1e-6)
    assert result.error < 2e-3 < result.error_before
    assert result.alpha == pytest.approx(0.37, rel=2e-2)
    for part in ("alpha", "weight", "bias"):
        torch.testing.assert_close(getattr(found, part), getattr(told, part), rtol=3e-2, atol=3e-2)


def test_a_shift_is_part_of_the_function_that_is_fitted():
    torch.manual_seed(0)
    x = 3 * torch.randn(2000, 4)
    told = PointWise(4, "derf", 0.37, shift_init=0.6)
    found = PointWise(4, "derf", 0.5, shift_init=0.6)
    assert fit(found, x, told(x).detach()).error < 2e-3
    assert found.shift.item() == pytest.approx(0.6)


def test_channels_of_very_different_size_each_find_their_alpha():
    torch.manual_seed(0)
    stds = torch.tensor([1e-3, 1.0, 300.0])
    x = stds * torch.randn(2000, 3)
    layer = PointWise(3, "dyt", per_channel_alpha=True)
    assert fit(layer, x, torch.tanh(0.8 * x / stds)).error < 1e-2
    torch.testing.assert_close(layer.alpha, 0.8 / stds, rtol=5e-2, atol=0)


def test_a_saturated_channel_gets_its_mean_and_no_enormous_weight():
    torch.manual_seed(0)
    x, y = torch.randn(4096, 8), torch.randn(4096, 8)
    x[:, 0] = 18 + 0.5 * x[:, 0]
    layer = PointWise(8, "dyt", 1.0)
    layer.alpha.requires_grad_(False)
    fit(layer, x, y)
    assert layer.weight.abs().max() < 10
    assert layer(x)[:, 0].mean().item() == pytest.approx(y[:, 0].mean().item(), abs=1e-3)


def test_identity_keeps_its_alpha():
    torch.manual_seed(0)
    x = torch.randn(500, 3)
    layer = PointWise(3, "identity", 0.5)
    assert fit(layer, x, 2 * x + 1).error < 1e-5
    assert (layer.alpha.item(), layer.weight.tolist()) == (0.5, pytest.approx([4.0] * 3, rel=1e-4))


def test_rows_are_drawn_from_all_over_the_image_and_no_more_than_needed():
    """A fixed stride would meet the same columns in every row of a feature map."""
    model = nn.Sequential(LayerNorm2d(2))
    place = torch.arange(64 * 64, dtype=torch.float32).view(1, 1, 64, 64).expand(8, 2, 64, 64)
    seen = _seen(model, {"0": 1}, [place, place + 0], of_output=False)["0"][:, 0].long()
    assert len(seen) == 8192
    assert len((seen % 64).unique()) == len((seen // 64).unique()) == 64
    again = _seen(model, {"0": 1}, [place, place + 0], of_output=False)["0"][:, 0].long()
    assert torch.equal(seen, again)


def test_channels_first_sites_are_fitted_on_their_channels():
    torch.manual_seed(0)
    teacher, student = (nn.Sequential(nn.Conv2d(3, 4, 1), LayerNorm2d(4)) for _ in range(2))
    student.load_state_dict(teacher.state_dict())
    convert_norms(student, Conversion())
    images = [torch.randn(8, 3, 9, 5) for _ in range(2)]
    (found,) = calibrate(teacher, student, images).values()
    target, output = teacher(images[0]), student(images[0])
    error = (output - target).norm() / (target - target.mean((0, 2, 3), keepdim=True)).norm()
    assert found.error == pytest.approx(error.item(), rel=0.2)
    assert found.error < 0.9 * found.error_before


def test_values_that_are_not_finite_are_an_error():
    teacher, student = nn.Sequential(nn.LayerNorm(4)), nn.Sequential(nn.LayerNorm(4))
    convert_norms(student, Conversion())
    with pytest.raises(UserError, match=r"norm\.calibrate: 0 sees values that are not finite"):
        calibrate(teacher, student, [torch.full((2, 4), torch.inf)])


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
    assert bool((student(images[0]) >= 0).all())
    # By hand: the second site sees what the first one, fitted, makes of the images, and aims at the norm without ReLU.
    inputs = torch.cat([student.map(student.first(batch.flatten(1))) for batch in images]).detach()
    hidden = torch.cat([teacher.map(teacher.first(batch.flatten(1))) for batch in images]).detach()
    by_hand = PointWise(6)
    fit(by_hand, inputs, nn.functional.layer_norm(hidden, (6,)))
    for part in ("alpha", "weight", "bias"):
        torch.testing.assert_close(getattr(student.second, part), getattr(by_hand, part), rtol=1e-3, atol=1e-4)
    for name, module in teacher.named_modules():
        assert not module._forward_hooks, name


@pytest.fixture(scope="module")
def trained(tmp_path_factory) -> Path:
    """A LayerNorm ViT that knows digits: 12 epochs."""
    home = tmp_path_factory.mktemp("trained")
    done = dytrun("train", *TINY, "epochs=12", "optim.lr=3e-3", f"runs_dir={home}/runs", env={"OMP_NUM_THREADS": "1"})
    assert done.returncode == 0, done.stderr
    return max(home.glob("runs/*/checkpoints/step-*/model.safetensors"))


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
def test_calibration_changes_nothing_of_what_training_sees(trained):
    """The batches of a run, and what its model draws, are the same whether it calibrates first or not."""
    config = tiny("norm=dyt", "norm.calibrate=true", f"init_from={trained}", "augment.mixup=0.8", "augment.hflip=0.5")
    data = load_data(config.data)
    place = Place(0, 1, torch.device("cpu"))
    firsts = []
    for is_calibrated in (False, True):
        batches = train_batches(config, data, RankShare(0, 1, 32, 1, 44, 0, 44), place.device, 0)
        model, _ = build_arm(config, 10)
        if is_calibrated:
            start = load_start(config, model)
            calibrate_start(config, start, model, data, place, lambda module: Accuracy(1, 0, 0, 0.0, np.zeros(1, bool)))
        images, targets, indices, _ = next(batches)
        firsts.append((images, targets, indices, torch.get_rng_state()))
        assert model.training
    assert all(torch.equal(one, other) for one, other in zip(*firsts, strict=True))


def test_the_size_of_evaluation_batches_does_not_change_a_calibration(trained):
    found = []
    for size in (17, 96):
        config = tiny("norm=dyt", "norm.calibrate=true", f"init_from={trained}", f"machine.eval_batch_per_rank={size}")
        model, _ = build_arm(config, 10)
        start = load_start(config, model)
        place = Place(0, 1, torch.device("cpu"))
        calibrate_start(config, start, model, load_data(config.data), place,
                        lambda module: Accuracy(1, 0, 0, 0.0, np.zeros(1, bool)))  # fmt: skip
        found.append(model.state_dict())
    assert all(torch.equal(found[0][name], found[1][name]) for name in found[0])


def test_what_calibration_decides_is_no_science_of_the_start(trained):
    args = ("norm=dyt", "norm.calibrate=true", f"init_from={trained}")
    assert tiny(*args, "norm.alpha_init=0.3").science_id == tiny(*args).science_id
    assert tiny(*args).science_id != tiny(args[0], args[2]).science_id
    held = (*args, "norm.learn_alpha=false")
    assert tiny(*held, "norm.alpha_init=0.3").science_id != tiny(*held).science_id
    assert dict(outline(tiny(*args)).rows)["alpha"].startswith("from the fit")
    assert "alpha" not in dict(outline(tiny(*held)).rows)
    with pytest.raises(UserError, match="nothing to fit"):
        tiny(*held, "norm.affine=false")


def test_accuracies_of_a_new_classifier_are_not_reported(trained):
    model, _ = build_arm(tiny("norm=dyt"), 4)
    config = tiny("norm=dyt", "norm.calibrate=true", f"init_from={trained}")
    start = load_start(config, model)
    assert start.loaded.new[:2] == ["head.weight", "head.bias"]
    data = load_data(config.data)
    found = calibrate_start(
        config, start, model, data._replace(num_classes=4), Place(0, 1, torch.device("cpu")), pytest.fail
    )
    assert found["top1_trained"] is found["top1_calibrated"] is None
    assert found["sites"]


@pytest.mark.slow
def test_a_calibrated_run_that_was_cut_short_goes_on_without_calibrating_again(trained, tmp_path):
    args = [
        "train",
        *TINY,
        "norm=derf",
        "norm.calibrate=true",
        f"init_from={trained}",
        "epochs=2",
        f"runs_dir={tmp_path}",
    ]
    env = {"OMP_NUM_THREADS": "1"}
    assert dytrun(*args, env=env).returncode == 0
    (run,) = tmp_path.glob("*/result.json")
    last = run.parent / "checkpoints" / "step-00000088"
    before = load_file(last / "model.safetensors")
    found = (run.parent / "init.json").read_text()
    run.unlink()
    shutil.rmtree(last)
    again = dytrun(*args, env=env)
    assert again.returncode == 0, again.stderr
    assert "calibration:" not in again.stdout
    after = load_file(last / "model.safetensors")
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert (run.parent / "init.json").read_text() == found
    assert json.loads(run.read_text())["init"] == json.loads(found)
    # Its own weights are evaluated without the file that it began with.
    config = json.loads((run.parent / "config.json").read_text())
    (run.parent / "config.json").write_text(json.dumps(config | {"init_from": "/gone"}))
    assert dytrun("eval", str(run.parent), env=env).returncode == 0
