"""Conversion: which sites, what is kept, what is refused. Counts are those of the reference's own runs."""

import pytest
import timm
import torch
from conftest import config_of, tiny
from timm.layers import LayerNorm2d, LayerNormAct, LayerNormAct2d
from timm.layers.norm import LayerNorm2dFp32
from torch import nn

from dytrun.convert import convert_norms, norm_sites, norms_left
from dytrun.errors import UserError
from dytrun.model import check_forward
from dytrun.norm import DynamicTanh
from dytrun.run import build_arm

# model: (sites, channels-first sites, parameters with LN); the reference's main.py on timm gives the same.
PUBLISHED = {
    "vit_ti": (25, 0, 5_717_416),
    "vit_s": (25, 0, 22_050_664),
    "vit_b": (25, 0, 86_567_656),
    "vit_l": (49, 0, 304_326_632),
    "convnext_t": (23, 5, 28_589_128),
    "convnext_s": (41, 5, 50_223_688),
    "convnext_b": (41, 5, 88_591_464),
    "convnext_l": (41, 5, 197_767_336),
}


@pytest.mark.parametrize("model", PUBLISHED)
def test_sites_and_parameters_of_the_papers_models(model):
    num_sites, num_first, num_params = PUBLISHED[model]
    plain, kept = build_arm(config_of(f"model={model}"), 1000, device="meta")
    converted, sites = build_arm(config_of(f"model={model}", "norm=dyt"), 1000, device="meta")
    assert len(kept) == len(sites) == num_sites
    assert sum(not site.channels_last for site in sites) == num_first
    assert sum(p.numel() for p in plain.parameters()) == num_params
    assert sum(p.numel() for p in converted.parameters()) == num_params + num_sites
    assert not any(isinstance(module, nn.LayerNorm) for module in converted.modules())
    assert {p.device.type for p in converted.parameters()} == {"meta"}


@pytest.mark.parametrize("name", ["vit_tiny_patch16_224", "convnext_atto", "swin_tiny_patch4_window7_224"])
def test_twins_are_bit_equal_but_for_the_alphas(name):
    size = "data.image_size=224" if "swin" in name else "data.image_size=32"
    kwargs = "model.kwargs={depths: [1,1,1,1]}" if "vit" not in name else "model.kwargs={depth: 2}"
    overrides = ("model=timm", f"model.name={name}", kwargs, "data=cifar10", size)
    plain, _ = build_arm(config_of(*overrides), 10)
    converted, sites = build_arm(config_of(*overrides, "norm=dyt"), 10)
    before, after = plain.state_dict(), converted.state_dict()
    assert after.keys() - before.keys() == {f"{site.name}.alpha" for site in sites}
    assert not before.keys() - after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)


# model: (sites, what is left)
FAMILIES = {
    "swin_tiny_patch4_window7_224": (29, {}),
    "vit_base_patch16_clip_224": (26, {}),
    "convnext_tiny_hnf": (23, {}),
    "davit_tiny": (29, {}),
    "xcit_nano_12_p16_224": (41, {"BatchNorm2d": 16}),
    "convnextv2_atto": (17, {"GlobalResponseNorm": 12}),
}


@pytest.mark.parametrize("name", FAMILIES)
def test_other_families_convert_and_take_images(name):
    config = config_of("model=timm", f"model.name={name}", "norm=dyt")
    model, sites = build_arm(config, 1000, device="meta")
    assert (len(sites), norms_left(model)) == FAMILIES[name]
    check_forward(model, name, 1000, 224)


def test_converting_draws_no_random_number():
    model = timm.create_model("convnext_atto", num_classes=3)
    state = torch.get_rng_state()
    convert_norms(model, 0.5)
    assert torch.equal(torch.get_rng_state(), state)


def test_alpha_starts_where_it_is_told():
    model, sites = build_arm(tiny("norm=dyt", "norm.alpha_init=0.8"), 10)
    assert [model.get_parameter(f"{site.name}.alpha").item() for site in sites] == [pytest.approx(0.8)] * 5


def test_affine_dtype_device_flags_and_gradients_are_kept():
    model = nn.Sequential(
        nn.LayerNorm(4, elementwise_affine=False),
        nn.LayerNorm(4, bias=False),
        nn.LayerNorm(4, dtype=torch.bfloat16),
        nn.LayerNorm(4, device="meta"),
    )
    nn.init.zeros_(model[1].weight)
    model[2].bias.requires_grad_(False)
    model[0].eval()
    convert_norms(model, 0.5)
    assert (model[0].weight, model[0].bias) == (None, None)
    assert model[1].bias is None
    assert model[1].weight.tolist() == [0.0] * 4
    assert {p.dtype for p in model[2].parameters()} == {torch.bfloat16}
    assert not model[2].bias.requires_grad
    assert {p.device.type for p in model[3].parameters()} == {"meta"}
    assert [module.training for module in model] == [False, True, True, True]


def test_layouts_follow_the_exact_type():
    model = nn.ModuleDict({"first": LayerNorm2d(6), "fp32": LayerNorm2dFp32(6), "last": nn.LayerNorm(6)})
    sites = convert_norms(model, 0.5)
    assert [(site.name, site.channels_last) for site in sites] == [("first", False), ("fp32", False), ("last", True)]
    assert model["fp32"](torch.randn(2, 6, 6, 6)).shape == (2, 6, 6, 6)


def test_a_shared_norm_stays_shared():
    model = nn.Module()
    model.a = model.b = nn.LayerNorm(4)
    assert len(convert_norms(model, 0.5)) == 1
    assert isinstance(model.a, DynamicTanh)
    assert model.a is model.b


@pytest.mark.parametrize("norm", [LayerNormAct(4), LayerNormAct2d(4), nn.LayerNorm((2, 4))])
def test_a_norm_without_a_twin_is_refused_by_name_and_nothing_is_touched(norm):
    model = nn.Sequential(nn.LayerNorm(4), norm)
    with pytest.raises(UserError, match=rf"1 \(.*{type(norm).__name__}\)"):
        convert_norms(model, 0.5)
    assert isinstance(model[0], nn.LayerNorm)


def test_a_model_without_layernorm_is_refused_and_its_norms_are_counted():
    model = timm.create_model("resnet18", num_classes=2)
    with pytest.raises(UserError, match=r"no LayerNorm to convert \(it has 20 BatchNorm2d\)"):
        convert_norms(model, 0.5)


def test_a_bare_layernorm_is_refused():
    with pytest.raises(UserError, match="the model itself"):
        convert_norms(nn.LayerNorm(4), 0.5)


def test_what_is_left_is_counted():
    assert norms_left(timm.create_model("convnextv2_atto", num_classes=2)) == {"GlobalResponseNorm": 12}
    assert norm_sites(nn.Sequential(nn.BatchNorm1d(2)), required=False) == []


def test_zero_initialised_norms_stay_zero():
    model = timm.create_model("swinv2_tiny_window8_256", num_classes=2, depths=(1, 1, 1, 1))
    zero = [name for name, m in model.named_modules() if isinstance(m, nn.LayerNorm) and not m.weight.any()]
    assert zero
    convert_norms(model, 0.5)
    assert all(not model.get_submodule(name).weight.any() for name in zero)


@pytest.mark.parametrize("name", ["vit_tiny_patch16_224", "convnext_atto"])
def test_a_converted_model_trains(name):
    torch.manual_seed(0)
    model = timm.create_model(name, num_classes=4)
    sites = convert_norms(model, 0.5)
    model(torch.randn(2, 3, 224, 224)).logsumexp(1).sum().backward()
    assert all(model.get_parameter(f"{site.name}.alpha").grad is not None for site in sites)
    assert all(bool(p.grad.isfinite().all()) for p in model.parameters() if p.grad is not None)


def test_a_state_dict_of_the_reference_loads():
    """The reference names its parameters alpha (1,), weight and bias, at the place of the norm."""
    model, sites = build_arm(tiny("norm=dyt"), 10)
    saved = {name: torch.full_like(value, 0.25) for name, value in model.state_dict().items()}
    assert saved["blocks.0.norm1.alpha"].shape == (1,)
    model.load_state_dict(saved)
    assert all(model.get_parameter(f"{site.name}.alpha").item() == 0.25 for site in sites)
