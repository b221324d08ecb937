"""What the norms do: glances while a run trains, and `dytrun probe` with its numbers, page and figures."""

import itertools
import json
import math
import random
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from browser import CHROMIUM
from conftest import TINY, lines, only, tiny
from safetensors.torch import load_file
from test_cli import run
from test_engine import Bench, equal, weights
from timm.layers import LayerNorm2d
from torch import nn

from dytrun import activations, probe
from dytrun.agreement import Interrupted
from dytrun.arm import build_arm
from dytrun.compute import autocast
from dytrun.data import ValBatches
from dytrun.engine import fit
from dytrun.norm import GroupNorm, PointWise, RmsNorm
from dytrun.probe_sites import SiteLook, Watch, correlation
from dytrun.records import ProbeRecord, Remark
from dytrun.run import load_config
from dytrun.sites import Site
from dytrun.sources import Split, load_data

CPU = torch.device("cpu")
CONVNEXT = ("model.name=convnext_atto", "model.kwargs={depths: [1, 1, 1, 1], dims: [8, 8, 16, 16], patch_size: 1}")
PROBE = ("batches=2", "batch=16", "workers=0")


def glance(config, images: torch.Tensor) -> tuple[nn.Module, list[str], activations.Glance]:
    model, sites = build_arm(config, 10)
    model.train()
    names = [site.name for site in sites]
    return model, names, activations.glance(model, names, images, autocast(config, CPU))


@pytest.mark.parametrize(
    ("overrides", "f", "middle", "half"),
    [
        (["norm=dyt", "norm.alpha_init=3"], torch.tanh, 0.0, 1.0),
        (["norm=dyt", "norm.alpha_init=3", "norm.per_channel_alpha=true"], torch.tanh, 0.0, 1.0),
        (["norm=derf", "norm.shift_init=0.7", "norm.alpha_init=3"], torch.erf, 0.0, 1.0),
        (["norm=sigmoid", "norm.alpha_init=5"], torch.sigmoid, 0.5, 0.5),
        (["norm=dyt", "norm.alpha_init=3", "precision=bf16"], torch.tanh, 0.0, 1.0),
        (["norm=dyt", "norm.alpha_init=30", *CONVNEXT], torch.tanh, 0.0, 1.0),
        (["norm=identity"], None, 0.0, 1.0),
        (["norm=ln"], None, 0.0, 1.0),
        (["norm=rms", *CONVNEXT], None, 0.0, 1.0),
    ],
)
def test_a_glance_is_what_hooks_written_out_say(overrides, f, middle, half):
    config = tiny(*overrides)
    images = torch.randn(8, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    model, names, found = glance(config, images)
    inputs: dict[str, torch.Tensor] = {}
    for name in names:
        model.get_submodule(name).register_forward_pre_hook(
            lambda _, args, name=name: inputs.__setitem__(name, args[0].float())
        )
    model.eval()
    with torch.no_grad(), autocast(config, CPU):
        model(images)
    assert list(found.input_std) == names
    tolerance = 1e-5 if config.precision == "fp32" else 0.02
    for name, x in inputs.items():
        assert found.input_std[name] == pytest.approx(x.std(unbiased=False).item(), rel=tolerance)
    if config.norm.name in ("ln", "rms"):
        assert (found.alpha, found.saturation) == ({}, {})  # there are none: not zero, not null
        return
    assert found.alpha == {name: pytest.approx(config.norm.alpha_init) for name in names}
    if f is None:
        assert found.saturation == {}
        return
    for name, x in inputs.items():
        z = config.norm.alpha_init * x + (config.norm.shift_init or 0.0)
        far = (f(z) - middle).abs() / half
        assert is_share_above(found.saturation[name], far, 0.99, 1e-6 if config.precision == "fp32" else 0.01)
    assert max(found.saturation.values()) > 0.001


def is_share_above(share: float, values: torch.Tensor, limit: float, slack: float) -> bool:
    """Whether a share is that of the values above a limit; one so near to it may have been seen on either side."""
    least, most = ((values > limit + off).double().mean().item() for off in (slack, -slack))
    return least - 1e-6 <= share <= most + 1e-6  # means in float32


def test_a_norm_that_is_called_twice_is_seen_twice():
    class Twice(nn.Module):
        def __init__(self):
            super().__init__()
            self.norm = PointWise(4, "dyt", alpha_init=2.0)

        def forward(self, x):
            return self.norm(x[..., 0, :4] + 10) + self.norm(x[..., 1, :4] - 10)

    images = torch.randn(4, 3, 6, 6)
    found = activations.glance(Twice(), ["norm"], images, torch.autocast("cpu", enabled=False))
    x = torch.cat([images[..., 0, :4] + 10, images[..., 1, :4] - 10])
    assert found.input_std["norm"] == pytest.approx(x.std(unbiased=False).item(), rel=1e-5)
    assert found.saturation["norm"] == 1.0


def test_what_is_not_finite_is_a_number_that_is_not_and_no_error():
    config = tiny("norm=dyt")
    model, _ = build_arm(config, 10)
    with torch.no_grad():
        model.get_parameter("blocks.0.norm1.weight").fill_(math.inf)
    found = activations.glance(model, ["blocks.0.norm2"], torch.randn(2, 3, 8, 8), autocast(config, CPU))
    record = ProbeRecord(1, 0.1, 32, *found)
    assert math.isnan(record.metrics()["norm/input_std/blocks.0.norm2"])


def test_a_glance_leaves_no_trace():
    class Mixed(nn.Module):
        """It draws, it keeps statistics, and parts of it are in evaluation mode while it trains."""

        def __init__(self):
            super().__init__()
            self.bn, self.drop, self.norm = nn.BatchNorm2d(3), nn.Dropout(0.5), PointWise(8, "dyt")

        def forward(self, x):
            random.random()
            np.random.rand()
            torch.rand(1)
            return self.norm(self.drop(self.bn(x)))

    model = Mixed().train()
    model.bn.eval()
    model.norm.implementation = "torch"
    before = {name: value.clone() for name, value in model.state_dict().items()}
    states = random.getstate(), np.random.get_state(), torch.get_rng_state()
    images = torch.randn(8, 3, 8, 8)
    torch.set_rng_state(states[2])
    with activations.undisturbed(model):  # beartype, which checks a glance's arguments in tests, draws too
        model(images)
    assert random.getstate() == states[0]
    assert all(np.array_equal(one, other) for one, other in zip(np.random.get_state(), states[1], strict=True))
    assert torch.equal(torch.get_rng_state(), states[2])
    activations.glance(model, ["norm"], images, torch.autocast("cpu", enabled=False))
    assert [module.training for module in model.modules()] == [True, False, True, True]
    assert model.norm.implementation == "torch"
    assert not model.norm._forward_hooks
    assert equal(before, model.state_dict())
    assert all(parameter.grad is None for parameter in model.parameters())


DRAWS = ("norm=dyt", "augment=light", "augment.mixup=0.5", "model.drop_path=0.3", "ema=on", "epochs=1")


def test_training_is_the_same_to_the_bit_with_and_without_probes(tmp_path):
    ends = []
    for every in ("null", "3"):
        bench = Bench(tmp_path / every, *DRAWS, f"tracking.probe_every_steps={every}")
        records = bench.records()
        probes = [record.step for record in records if isinstance(record, ProbeRecord)]
        assert probes == ([] if every == "null" else [*range(3, 43, 3), 44])
        ends.append((weights(bench.state.model), weights(bench.state.ema.module), bench.state.weights_sha256))
    assert equal(ends[0][0], ends[1][0])
    assert equal(ends[0][1], ends[1][1])
    assert ends[0][2] == ends[1][2]


def test_a_run_that_was_stopped_has_the_same_probes(tmp_path):
    overrides = (*DRAWS, "tracking.probe_every_steps=5")

    def probes(records) -> list[ProbeRecord]:
        return [record for record in records if isinstance(record, ProbeRecord)]

    whole = probes(Bench(tmp_path / "whole", *overrides).records())
    first, seen = Bench(tmp_path / "parts", *overrides), []
    with pytest.raises(Interrupted):
        seen.extend(fit(first.config, first.state, first.around(stop_at=17)))
    rest = probes(Bench(tmp_path / "parts", *overrides).take_up().records())
    assert probes(seen) + rest == whole
    assert [one.step for one in rest] == [20, 25, 30, 35, 40, 44]


def test_probes_never_come_where_there_is_no_norm(tmp_path):
    bench = Bench(tmp_path, "tracking.probe_every_steps=5")
    bench.sites = []
    assert not [record for record in bench.records() if isinstance(record, ProbeRecord)]


def test_a_probe_that_fails_ends_no_run(tmp_path):
    bench = Bench(tmp_path, *DRAWS, "tracking.probe_every_steps=22")
    bench.state.model.get_submodule("blocks.0").register_forward_pre_hook(full)
    records = bench.records()
    assert not [record for record in records if isinstance(record, ProbeRecord)]
    assert [record.text for record in records if isinstance(record, Remark)] == [
        f"the norms after step {step} could not be looked at (no memory for 8 images)" for step in (22, 44)
    ]
    assert bench.state.step == 44


def full(_: nn.Module, args: tuple[torch.Tensor]) -> None:
    """Raise what CUDA raises where a probe's images no longer fit."""
    if len(args[0]) == activations.GLANCE_IMAGES and not torch.is_grad_enabled():
        raise torch.OutOfMemoryError("no memory for 8 images")


@pytest.mark.slow
def test_a_glance_compiles_nothing_anew(tmp_path):
    script = Path(__file__).parent / "probe_compiled.py"
    done = subprocess.run([sys.executable, script, *TINY], capture_output=True, text=True, check=True, cwd=tmp_path)
    for how, found in json.loads(done.stdout).items():
        assert found["sites"] == 5, how
        assert found["seen"][0] == found["seen"][1] == found["seen"][2], how
        assert found["seen"][0][1]["stats"]["unique_graphs"] >= 1
        assert not found["seen"][0][1]["graph_break"]


# dytrun probe


@pytest.fixture(scope="module")
def runs(warm, tmp_path_factory):
    """Tiny runs that have been trained and probed: {name: directory of the run}."""
    folder = tmp_path_factory.mktemp("runs")
    found = {}
    several = {"ln": (), "dyt": ("ema=on",), "convnext": ("norm=ln", *CONVNEXT)}
    for name, overrides in several.items():
        place = f"runs_dir={folder / name}"
        norm = [] if name == "convnext" else [f"norm={name}"]
        base = [one for one in TINY if not (CONVNEXT[0] in overrides and one.startswith(("model.name", "model.kw")))]
        job = warm.run(folder / f"{name}.log", "train", *base, "optim.lr=3e-3", *norm, *overrides, place)
        assert job.code == 0, job.said()
        found[name] = only(folder / name)
        more = ("weights=ema",) if name == "dyt" else ()
        job = warm.run(folder / f"{name}.probe.log", "probe", str(found[name]), *PROBE, *more)
        assert job.code == 0, job.said()
        assert "probe.html, probe.json and figures/ written" in job.said().replace("\n", "")
    return found


def values(run_dir: Path) -> dict:
    return json.loads((run_dir / "probe" / "probe.json").read_text())


def seen_by_hooks(run_dir: Path) -> dict[str, torch.Tensor]:
    """What goes into each site of a run's model, by hooks written out; channels last."""
    about, config = values(run_dir), load_config(run_dir)
    model, _ = build_arm(config, 10)
    part = "ema" if about["weights"] == "ema" else "model"
    model.load_state_dict(load_file(run_dir / "checkpoints" / f"step-{about['step']:08d}" / f"{part}.safetensors"))
    data = load_data(config.data)
    images = ValBatches(config.data, data.val.part(np.array(about["images"])), 8, 0, (0, 1, CPU))
    found: dict[str, list[torch.Tensor]] = {site["name"]: [] for site in about["sites"]}
    for name, parts in found.items():
        norm = model.get_submodule(name)
        is_first = "2d" in type(norm).__name__ or getattr(norm, "channel_axis", -1) == 1
        norm.register_forward_pre_hook(
            lambda _, args, parts=parts, is_first=is_first: parts.append(
                (args[0].movedim(1, -1) if is_first else args[0]).flatten(0, -2)
            )
        )
    model.eval()
    with torch.no_grad():
        for batch in images():
            model(batch.images)
    return {name: torch.cat(parts).double() for name, parts in found.items()}


@pytest.mark.parametrize("name", ["ln", "dyt", "convnext"])
def test_its_numbers_are_those_of_hooks_written_out(runs, name):
    about, inputs = values(runs[name]), seen_by_hooks(runs[name])
    model_sites = about["sites"]
    assert len(model_sites) == (5 if name in ("ln", "dyt") else 9)
    assert (about["norm"], about["num_images"], about["num_val"]) == ("ln" if name == "convnext" else name, 32, 360)
    for site in model_sites:
        x = inputs[site["name"]]
        assert site["num_elements"] == x.numel()
        assert site["input_std"] == pytest.approx(x.std(unbiased=False).item(), rel=1e-5)
        assert site["inverse_std"] == pytest.approx(1 / site["input_std"])
        assert site["rms_in"] == pytest.approx(x.square().mean().sqrt().item(), rel=1e-5)
        assert site["largest_in"] == pytest.approx(x.abs().max().item(), rel=1e-5)
        by_channel = x.square().mean(0).sqrt()
        far = (by_channel > 5 * by_channel.median()).nonzero().flatten().tolist()
        assert {int(channel) for channel in site["outliers"]} == set(far) or name != "ln"
        if name != "dyt":
            assert site["alpha"] is None
            assert 0 < site["shape"]["r2_line"] <= site["shape"]["r2_tanh"] + 1e-3
            continue
        z = site["alpha"] * x
        assert is_share_above(site["shares"]["saturated"], z.tanh().abs(), 0.99, 1e-6)
        assert is_share_above(1 - site["shares"]["linear"], (z - z.tanh()).abs(), 0.01, 1e-6)
        assert sum(site["shares"].values()) == pytest.approx(1)


def test_a_layernorm_is_fitted_before_its_weight_and_bias(runs):
    """The best straight line's R² over all elements, by NumPy; the probe drew from no more rows than there are."""
    inputs = seen_by_hooks(runs["ln"])
    for site in values(runs["ln"])["sites"]:
        x = inputs[site["name"]]
        y = (x - x.mean(1, keepdim=True)) / (x.var(1, unbiased=False, keepdim=True) + 1e-6).sqrt()
        r2 = np.corrcoef(x.flatten().numpy(), y.flatten().numpy())[0, 1] ** 2
        assert site["shape"]["r2_line"] == pytest.approx(r2, abs=0.01)
        state = load_file(max((runs["ln"] / "checkpoints").glob("step-*")) / "model.safetensors")
        weight, bias = (state[f"{site['name']}.{part}"].double() for part in ("weight", "bias"))
        assert site["rms_out"] == pytest.approx((y * weight + bias).square().mean().sqrt().item(), rel=1e-4)
        assert site["weight"]["mean"] == pytest.approx(weight.mean().item(), rel=1e-5)
        assert site["bias"]["most"] == pytest.approx(bias.max().item(), rel=1e-5)
        assert sum(site["weight"]["counts"]) == len(weight)


@pytest.mark.parametrize(
    ("norm", "mean_over", "is_centred"),
    [(RmsNorm(6, 1, 1e-6), (1,), False), (GroupNorm(6, 1, 1, 1e-6), (1, 2, 3), True), (LayerNorm2d(6), (1,), True)],
)
def test_a_norm_is_seen_before_its_weight_and_bias(norm, mean_over, is_centred):
    x = 3 * torch.randn(2, 6, 4, 5) + 1
    for parameter in norm.parameters():
        nn.init.normal_(parameter)
    before = {name: value.clone() for name, value in norm.state_dict().items()}
    centred = x - x.mean(mean_over, keepdim=True) if is_centred else x
    expected = centred / (centred.square().mean(mean_over, keepdim=True) + 1e-6).sqrt()
    torch.testing.assert_close(activations.normalized(norm, x), expected, rtol=1e-4, atol=1e-5)
    assert equal(before, norm.state_dict())


def test_alpha_is_compared_with_one_over_std(runs):
    about = values(runs["dyt"])
    points = [(site["alpha"], site["inverse_std"]) for site in about["sites"]]
    found = about["alpha_against_inverse_std"]
    assert found["num_sites"] == 5
    assert found["pearson"] == pytest.approx(np.corrcoef(np.array(points).T)[0, 1])
    ranks = np.argsort(np.argsort(np.array(points), axis=0), axis=0)
    assert found["spearman"] == pytest.approx(np.corrcoef(ranks.T)[0, 1])
    assert found["low"] < found["pearson"] < found["high"]
    assert values(runs["ln"])["alpha_against_inverse_std"] is None


def test_alphas_that_are_all_the_same_have_no_correlation():
    def site(alpha: float | None, std: float) -> SiteLook:
        watch = Watch(Site("a", "DyT", "layernorm", 2, True, "other", None, True), PointWise(2, "dyt"), 1)
        watch.take(torch.tensor([[std, -std]]))
        look, _ = watch.look()
        return SiteLook(**{**look.__dict__, "alpha": alpha})

    stds = (1.0, 2.0, 3.0, 4.0)
    assert correlation([site(0.5, std) for std in stds]) is None
    assert correlation([site(None, std) for std in stds]) is None
    assert correlation([site(1 / std, std) for std in stds[:3]]) is None
    found = correlation([site(1 / std, std) for std in stds])
    assert (found.pearson, found.spearman) == (pytest.approx(1), pytest.approx(1))


class Made(nn.Module):
    """A norm whose output is a given function of its input."""

    def __init__(self, f):
        super().__init__()
        self.f = f

    def forward(self, x):
        return self.f(x)


@pytest.mark.parametrize(
    ("f", "index", "scale"),
    [
        (lambda x: 1.5 * torch.tanh(2 * x) + 0.3, 1.0, 2.0),
        (lambda x: 3 * x - 1, 0.0, None),
    ],
)
def test_the_s_index_is_one_for_a_tanh_and_nothing_for_a_line(f, index, scale):
    watch = Watch(Site("a", "Made", "layernorm", 4, True, "other", None, True), Made(f), 1)
    watch.take(torch.randn(500, 4, generator=torch.Generator().manual_seed(0)))
    shape = watch.look()[0].shape
    assert shape.r2_tanh == pytest.approx(1, abs=1e-3)
    if scale is None:
        assert shape.r2_line == pytest.approx(1)
        return
    assert shape.s_index == pytest.approx(index, abs=1e-3)
    assert (shape.scale, shape.height, shape.offset) == pytest.approx((scale, 1.5, 0.3), rel=0.02)


@pytest.mark.parametrize(
    ("function", "linear_to", "saturated_from"),
    [("dyt", 0.3144, 2.6467), ("hardtanh", 0.99, 0.99), ("sigmoid", 0.6296, 5.2933), ("identity", 10.0, None)],
)
def test_the_ranges_of_a_function(function, linear_to, saturated_from):
    """Their ends, found by hand: |tanh z - z| = 0.01, |1/(1 + exp -z) - 1/2 - z/4| = 0.005, and 0.99 of the bounds."""
    watch = Watch(
        Site("a", "PointWise", "layernorm", 1, True, "other", None, True), PointWise(1, function, alpha_init=1.0), 1
    )
    watch.take(torch.linspace(-10, 10, 200_001).view(-1, 1))
    shares = watch.look()[0].shares
    assert shares.linear == pytest.approx(linear_to / 10, abs=2e-4)
    expected = None if saturated_from is None else pytest.approx(1 - saturated_from / 10, abs=2e-4)
    assert shares.saturated == expected
    assert shares.linear + shares.curved + (shares.saturated or 0) == pytest.approx(1)


@pytest.mark.parametrize("labels", [np.repeat(np.arange(10), 36), np.tile(np.arange(10), 36)])
def test_the_images_are_spread_over_the_classes(labels):
    chosen = probe.spread_over_classes(Split(labels, lambda index: b""), 2, 20)
    assert len(set(chosen.tolist())) == 40
    for batch in (chosen[:20], chosen[20:]):
        assert np.bincount(labels[batch]).tolist() == [2] * 10


def test_a_run_has_its_probes_in_its_metrics(runs):
    for name, run_dir in runs.items():
        probed = [line for line in lines(run_dir) if any(key.startswith("norm/") for key in line)]
        assert [line["step"] for line in probed] == [44]
        kinds = {key.split("/")[1] for key in probed[0] if key.startswith("norm/")}
        assert kinds == ({"alpha", "input_std", "saturation"} if name == "dyt" else {"input_std"})
        assert not [line for line in lines(run_dir) if "train/loss" in line and any("norm/" in key for key in line)]


def test_figures_are_vectors_with_text_and_images_for_papers(runs):
    for name, own in (("ln", {"s-shape"}), ("dyt", {"alpha-against-std"})):
        folder = runs[name] / "probe" / "figures"
        names = {"curves", "std-by-depth", "ranges", "activations", "weight", "bias"} | own
        assert {path.name for path in folder.iterdir()} == {f"{one}.{end}" for one in names for end in ("svg", "png")}
        assert "blocks.0.norm1</text>" in (folder / "ranges.svg").read_text()
        for path in folder.glob("*.png"):
            with probe_image(path) as image:
                assert image.info["dpi"] == (pytest.approx(300, abs=1), pytest.approx(300, abs=1))
                assert image.width <= 7.2 * 300


def probe_image(path: Path):
    from PIL import Image

    return Image.open(path)


@pytest.mark.slow
@pytest.mark.skipif(CHROMIUM is None, reason="there is no Chromium here")
def test_the_page_opens_in_a_browser_without_an_error(runs, tmp_path):
    page = runs["dyt"] / "probe" / "probe.html"
    text = page.read_text()
    assert not re.search(r"(src|href)=(?![\"']?(data:|#))", text)  # nothing is loaded from anywhere
    assert "weights of step 44" in text or "ema weights" in text
    ids = re.findall(r'\bid="([^"]+)"', text)
    assert len(ids) == len(set(ids))
    assert text.count("role=img") == text.count("aria-label=") - 1 == text.count("<svg")
    picture = tmp_path / "page.png"
    done = subprocess.run(
        [CHROMIUM, "--headless", "--no-sandbox", "--disable-gpu", "--enable-logging=stderr", "--window-size=900,3000",
         f"--user-data-dir={tmp_path / 'profile'}", f"--screenshot={picture}", page.as_uri()],
        capture_output=True, text=True, timeout=120, check=True,
    )  # fmt: skip
    assert "CONSOLE" not in done.stderr
    with probe_image(picture) as image:
        pixels = np.asarray(image.convert("RGB")).astype(int)
    # The figures' blue and orange are there: curves and bars were drawn.
    for colour in ((47, 134, 193), (213, 94, 0)):
        assert (np.abs(pixels - colour).max(-1) < 24).sum() > 300


def test_a_second_probe_takes_the_place_of_the_first(runs, monkeypatch, capsys, tmp_path):
    out = tmp_path / "deep" / "out"
    for number in ("1", "2"):
        code, said, err = run(
            monkeypatch, capsys, "probe", str(runs["dyt"]), "batches=1", f"batch={number}0", f"out={out}", "workers=0",
            "checkpoint=44",
        )  # fmt: skip
        assert (code, err) == (0, [])
        assert json.loads((out / "probe.json").read_text())["num_images"] == 10 * int(number)
    assert [path.name for path in out.parent.iterdir()] == ["out"]
    assert "alpha" in said


def test_wrong_input_is_one_line_and_leaves_nothing(runs, monkeypatch, capsys, tmp_path, warm):
    damaged = tmp_path / "damaged"
    (damaged / "checkpoints").mkdir(parents=True)
    (damaged / "config.json").write_text((runs["ln"] / "config.json").read_text())
    (tmp_path / "file").write_text("")
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "thesis.txt").write_text("")
    for name in ("shared", "drawn"):
        (tmp_path / name / "figures").mkdir(parents=True)
        (tmp_path / name / "probe.json").write_text("an earlier one")
    (tmp_path / "shared" / "notes.md").write_text("")
    (tmp_path / "drawn" / "figures" / "paper.tex").write_text("")
    (tmp_path / "link").symlink_to(tmp_path / "full")
    cases = (
        ([str(tmp_path / "nowhere")], "no run there"),
        ([str(damaged)], "no LATEST checkpoint there; train the run first"),
        ([str(runs["ln"]), "checkpoint=7"], "no checkpoint of step 7 there; there are those of 44"),
        ([str(runs["ln"]), "checkpoint=worst"], "checkpoint: 'worst'"),
        ([str(runs["ln"]), "weights=ema"], "the run has no ema weights; say weights=raw"),
        ([str(runs["ln"]), "batches=12"], "12 of 32 images are 384, and the validation split has 360; lower"),
        ([str(runs["ln"]), f"out={tmp_path / 'file'}"], "file is a file; give a folder"),
        ([str(runs["ln"]), f"out={tmp_path / 'full'}"], "full holds other files (thesis.txt)"),
        ([str(runs["ln"]), f"out={tmp_path / 'shared'}"], "shared holds other files (notes.md)"),
        ([str(runs["ln"]), f"out={tmp_path / 'drawn'}"], "drawn holds other files (figures/paper.tex)"),
        ([str(runs["ln"]), f"out={tmp_path / 'link'}"], "link is a link; give a folder"),
        ([str(runs["ln"]), "out=."], "out: . is where this command runs"),
        ([str(runs["ln"]), "data_root=/nope"], "data.root: digits comes with dytrun, and /nope is not read"),
        ([str(runs["ln"]), "out=/proc/nowhere"], "/proc/nowhere cannot be written"),
        ([], "dir: which run? say dytrun probe DIR"),
        ([str(runs["ln"]), "-m"], "takes one directory"),
    )
    before = sorted(tmp_path.rglob("*"))
    for args, said in cases:
        code, _, err = run(monkeypatch, capsys, "probe", *args)
        assert (code, len(err)) == (2, 1), err
        assert said in err[0]
        assert sorted(tmp_path.rglob("*")) == before


def test_other_wrong_runs(runs, monkeypatch, capsys, tmp_path, image_tree):
    """A damaged checkpoint, another model's, data that is gone, a norm without a curve, a model without norms."""

    def copied(name: str, **changes) -> Path:
        folder = tmp_path / name
        subprocess.run(["cp", "-r", str(runs["ln"]), str(folder)], check=True)
        config = json.loads((folder / "config.json").read_text())
        for part, values in changes.items():
            config[part] = values if part == "norm" else config[part] | values
        (folder / "config.json").write_text(json.dumps(config))
        return folder

    damaged = copied("damaged")
    path = next((damaged / "checkpoints").glob("step-*/model.safetensors"))
    path.write_bytes(path.read_bytes()[:-1])
    point_wise = tiny("norm=identity").model_dump(mode="json")["norm"]
    kwargs = {"patch_size": 4, "embed_dim": 32, "depth": 2, "num_heads": 2, "global_pool": "avg"}
    gone = str(tmp_path / "gone")
    classes = {f"c{number}": 1 for number in range(10)}
    others = str(image_tree(train=classes, val=classes))
    cases = (
        (damaged, "damaged (model.safetensors has"),
        (copied("other", model={"kwargs": kwargs}), "checkpoint of step 44: it does not fit the model of this run"),
        (copied("data", data={"name": "folder", "root": gone}), f"{gone} is no folder"),
        (
            copied("others", data={"name": "folder", "root": others}),
            "not the validation images of the run (val 360",
        ),
        (copied("identity", norm=point_wise), "straight lines (norm=identity)"),
        (copied("resnet", model={"name": "resnet18", "kwargs": {}}), "no norm that is known here (resnet18)"),
    )
    for folder, said in cases:
        code, _, err = run(monkeypatch, capsys, "probe", str(folder), *PROBE)
        assert (code, len(err)) == (2, 1), err
        assert said in err[0]


def test_a_full_disk_leaves_the_first_probe_as_it_was(runs, monkeypatch, capsys, tmp_path):
    disk = tmp_path / "disk"
    disk.mkdir()
    done = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", disk], capture_output=True, check=False)
    if done.returncode:
        pytest.skip(f"no file system can be mounted here: {done.stderr.decode().strip()}")
    try:
        (disk / "out").mkdir()
        (disk / "out" / "probe.json").write_text("the first one")
        code, _, err = run(monkeypatch, capsys, "probe", str(runs["ln"]), *PROBE, f"out={disk / 'out'}")
        assert (code, len(err)) == (2, 1), err
        assert "cannot be written (No space left on device); make room" in err[0]
        assert [path.name for path in disk.rglob("*")] == ["out", "probe.json"]
    finally:
        subprocess.run(["umount", disk], check=True)


@pytest.mark.slow
def test_wandb_gets_figures_and_table_if_asked(runs, warm, tmp_path):
    """Offline, as there is no key; the run itself was not tracked."""
    out = tmp_path / "out"
    job = warm.run(tmp_path / "log", "probe", str(runs["ln"]), *PROBE, "wandb=true", f"out={out}")
    assert job.code == 0, job.said()
    assert "W&B offline: no API key (wandb login). Upload it: wandb sync" in job.said()
    (log,) = out.glob("wandb/offline-run-*/*.wandb")
    assert b"s-shape" in log.read_bytes() or b"S-shaped" in log.read_bytes()
    images = list(out.glob("wandb/offline-run-*/files/media/images/**/*.png"))
    assert len(images) == len(list((out / "figures").glob("*.png")))


def test_every_site_is_told_apart_in_the_page(runs):
    text = (runs["convnext"] / "probe" / "probe.html").read_text()
    for site, figure in itertools.product(values(runs["convnext"])["sites"], ("<th scope=row>{}<", 'aria-label="{}: ')):
        assert figure.format(site["name"]) in text
