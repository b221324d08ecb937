"""Conversion: which sites, what is kept, what is refused. Counts are those of the reference's own runs."""

import pytest
import timm
import torch
from conftest import config_of, tiny
from timm.layers import LayerNorm2d, LayerNormAct, LayerNormAct2d, RmsNorm
from timm.layers.norm import GroupNorm1, LayerNorm2dFp32
from torch import nn

from dytrun.arm import build_arm
from dytrun.convert import Conversion, chosen_sites, convert_norms
from dytrun.errors import UserError
from dytrun.model import check_forward
from dytrun.norm import GroupNorm, PointWise
from dytrun.norm import RmsNorm as OurRmsNorm
from dytrun.norm_config import NormTypes
from dytrun.sites import FAMILIES as NORM_FAMILIES
from dytrun.sites import norm_sites, norms_left

DYT = Conversion()

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


# norm: (parameters a site more than LN, on the tiny ViT of 5 sites and 16 channels)
MEMBERS = {
    ("dyt",): 1, ("derf",): 2, ("identity",): 1, ("dyisru",): 1, ("rms",): -16, ("group", "norm.num_groups=4"): 0,
    ("dyt", "norm.affine=false"): 1 - 32, ("dyt", "norm.per_channel_alpha=true"): 16,
    ("derf", "norm.per_channel_alpha=true"): 32, ("dyt", "norm.shift_init=0"): 2, ("rms", "norm.affine=false"): -32,
}  # fmt: skip


@pytest.mark.parametrize("norm", MEMBERS, ids=" ".join)
def test_each_member_of_the_family_adds_what_it_says_and_trains(norm):
    plain, _ = build_arm(tiny(), 10)
    model, sites = build_arm(tiny(f"norm={norm[0]}", *norm[1:]), 10)
    more = sum(p.numel() for p in model.parameters()) - sum(p.numel() for p in plain.parameters())
    assert (len(sites), more) == (5, 5 * MEMBERS[norm])
    shared = plain.state_dict().keys() & model.state_dict().keys()
    assert all(torch.equal(plain.state_dict()[name], model.state_dict()[name]) for name in shared)
    model(torch.randn(2, 3, 8, 8)).logsumexp(1).sum().backward()
    assert all(p.grad is not None and bool(p.grad.isfinite().all()) for p in model.parameters())


def test_an_alpha_that_is_not_learned_has_no_gradient_and_stays_in_the_state_dict():
    model, sites = build_arm(tiny("norm=dyt", "norm.learn_alpha=false", "norm.alpha_init=1"), 10)
    model(torch.randn(2, 3, 8, 8)).logsumexp(1).sum().backward()
    for site in sites:
        alpha = model.get_parameter(f"{site.name}.alpha")
        assert (alpha.requires_grad, alpha.grad, alpha.item()) == (False, None, 1.0)


# model: (sites, what is left)
FAMILIES = {
    "swin_tiny_patch4_window7_224": (29, {}),
    "vit_base_patch16_clip_224": (26, {}),
    "convnext_tiny_hnf": (23, {}),
    "davit_tiny": (29, {}),
    "xcit_nano_12_p16_224": (41, {"BatchNorm2d": 16}),
    "convnextv2_atto": (17, {"GlobalResponseNorm": 12}),
    "caformer_s18": (42, {}),
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
    convert_norms(model, DYT)
    assert torch.equal(torch.get_rng_state(), state)


def test_affine_dtype_device_flags_and_gradients_are_kept():
    model = nn.Sequential(
        nn.LayerNorm(4, dtype=torch.bfloat16, elementwise_affine=False),
        nn.LayerNorm(4, bias=False),
        nn.LayerNorm(4, dtype=torch.bfloat16),
        nn.LayerNorm(4, device="meta"),
    )
    nn.init.zeros_(model[1].weight)
    model[2].bias.requires_grad_(False)
    model[0].eval()
    convert_norms(model, DYT)
    assert (model[0].weight, model[0].bias) == (None, None)
    assert model[1].bias is None
    assert model[1].weight.tolist() == [0.0] * 4
    assert {p.dtype for p in model[2].parameters()} == {torch.bfloat16}
    assert not model[2].bias.requires_grad
    assert {p.device.type for p in model[3].parameters()} == {"meta"}
    assert [module.training for module in model] == [False, True, True, True]


def test_an_affineless_norm_takes_device_and_dtype_from_its_model():
    model = nn.Sequential(nn.Linear(4, 4, dtype=torch.bfloat16), nn.LayerNorm(4, elementwise_affine=False))
    convert_norms(model, DYT)
    assert model[1].alpha.dtype == torch.bfloat16
    with torch.device("meta"):
        model = nn.Sequential(nn.Linear(4, 4), nn.LayerNorm(4, elementwise_affine=False))
    convert_norms(model, DYT)
    assert model[1].alpha.device.type == "meta"


def test_layouts_follow_the_exact_type():
    model = nn.ModuleDict({"first": LayerNorm2d(6), "fp32": LayerNorm2dFp32(6), "last": nn.LayerNorm(6)})
    sites = convert_norms(model, DYT)
    assert [(site.name, site.channels_last) for site in sites] == [("first", False), ("fp32", False), ("last", True)]
    assert model["fp32"](torch.randn(2, 6, 6, 6)).shape == (2, 6, 6, 6)


@pytest.mark.parametrize("how", [DYT, Conversion(affine=False), Conversion(name="rms"), Conversion(name="group")])
def test_a_fused_activation_and_drop_out_stay(how):
    """timm's LayerNormAct activates after normalizing; its twin must too, and not in place on what backward needs."""
    model = nn.Sequential(LayerNormAct(4, act_layer=nn.ReLU, inplace=True), LayerNormAct2d(4, act_layer=nn.GELU))
    model[0].drop = nn.Dropout(0.5)
    convert_norms(model, how)
    model.eval()
    x = torch.randn(3, 4, generator=torch.Generator().manual_seed(0)).requires_grad_()
    y = model[0](x)
    assert bool((y >= 0).all())
    assert bool((y == 0).any())
    y.sum().backward()
    assert isinstance(model[0].drop, nn.Dropout)
    model[0].drop.p = 1.0
    assert not model.train()[0](x).any(), "everything is dropped"
    model.eval()
    bare = model[1](torch.randn(2, 4, 3, 3))
    assert bare.min() >= -0.2, "GELU is never lower"


def test_the_same_values_as_the_plain_formula_before_the_fused_activation():
    torch.manual_seed(0)
    model = nn.Sequential(LayerNormAct2d(4, act_layer=nn.ReLU))
    nn.init.normal_(model[0].weight)
    weight = model[0].weight.detach().clone().view(1, 4, 1, 1)
    convert_norms(model, DYT)
    x = torch.randn(2, 4, 3, 3)
    assert torch.allclose(model(x), torch.relu(weight * torch.tanh(0.5 * x)))


def test_the_converter_as_a_library():
    model = nn.Sequential(nn.LayerNorm(4), nn.LayerNorm(4))
    sites = convert_norms(model, "derf", alpha_init=0.3, shift_init=0.0, exclude=["1"])
    assert [(site.name, site.alpha_init) for site in sites] == [("0", 0.3)]
    assert model[0].function == "derf"
    assert [site.name for site in convert_norms(model)] == ["1"]
    with pytest.raises(UserError, match="there is no 'tanh'; there are dyt, derf"):
        convert_norms(nn.Sequential(nn.LayerNorm(4)), "tanh")


def test_a_shared_norm_stays_shared():
    model = nn.Module()
    model.a = model.b = nn.LayerNorm(4)
    assert len(convert_norms(model, DYT)) == 1
    assert isinstance(model.a, PointWise)
    assert model.a is model.b


class _Odd(nn.LayerNorm):
    """A LayerNorm of a class that nobody knows, which does something besides."""

    def forward(self, x):
        return super().forward(x) + 0.01


@pytest.mark.parametrize("norm", [_Odd(4), nn.LayerNorm((2, 4))])
def test_a_norm_without_a_twin_is_refused_by_name_and_nothing_is_touched(norm):
    model = nn.Sequential(nn.LayerNorm(4), norm)
    with pytest.raises(UserError, match=rf"1 norms .* first 1 \({type(norm).__name__}\)"):
        convert_norms(model, DYT)
    assert isinstance(model[0], nn.LayerNorm)
    # One that is left out need not have a twin.
    assert [site.name for site in convert_norms(model, Conversion(exclude=["1"]))] == ["0"]


def test_a_model_without_layernorm_is_refused_and_its_norms_are_counted():
    model = timm.create_model("resnet18", num_classes=2)
    with pytest.raises(UserError, match=r"no LayerNorm to convert \(it has 20 BatchNorm2d\)"):
        convert_norms(model, DYT)


def test_a_bare_layernorm_is_refused():
    with pytest.raises(UserError, match="the model itself"):
        convert_norms(nn.LayerNorm(4), DYT)


def test_groups_that_do_not_divide_the_channels_are_refused_and_nothing_is_touched():
    model = nn.Sequential(nn.LayerNorm(8), nn.LayerNorm(6))
    with pytest.raises(UserError, match=r"norm\.num_groups: 4 groups cannot share the 6 channels of 1"):
        convert_norms(model, Conversion(name="group", num_groups=4))
    assert isinstance(model[0], nn.LayerNorm)


def test_what_is_left_is_counted():
    assert norms_left(timm.create_model("convnextv2_atto", num_classes=2)) == {
        "GlobalResponseNorm": 12, "LayerNorm2d": 17,
    }  # fmt: skip
    assert norm_sites(nn.Sequential(nn.BatchNorm1d(2))) == []


def test_the_configuration_knows_the_families_of_the_converter():
    (allowed,) = NormTypes.__origin__.__args__
    assert allowed.__args__ == NORM_FAMILIES


def test_other_families_of_norms_on_request():
    model = nn.ModuleDict(
        {"rms": RmsNorm(4), "group": GroupNorm1(4), "groups": nn.GroupNorm(2, 4), "ln": nn.LayerNorm(4)}
    )
    assert [site.name for site in norm_sites(model)] == ["ln"]
    sites = convert_norms(model, Conversion(types=["rmsnorm", "groupnorm1"]))
    assert [(site.name, site.family, site.channels_last) for site in sites] == [
        ("rms", "rmsnorm", True), ("group", "groupnorm1", False),
    ]  # fmt: skip
    assert {name for name, _ in model["rms"].named_parameters()} == {"alpha", "weight"}
    assert {name for name, _ in model["group"].named_parameters()} == {"alpha", "weight", "bias"}
    assert isinstance(model["groups"], nn.GroupNorm)
    assert isinstance(model["ln"], nn.LayerNorm)


def test_rms_and_group_take_the_place_of_layernorm_in_any_layout():
    for name, kind in (("rms", OurRmsNorm), ("group", GroupNorm)):
        model = timm.create_model("convnext_atto", num_classes=3, depths=(1, 1, 1, 1))
        sites = convert_norms(model, Conversion(name=name, num_groups=8))
        assert {type(model.get_submodule(site.name)) for site in sites} == {kind}
        assert {site.alpha_init for site in sites} == {None}
        model(torch.randn(2, 3, 64, 64)).sum().backward()


def test_zero_initialised_norms_stay_zero():
    model = timm.create_model("swinv2_tiny_window8_256", num_classes=2, depths=(1, 1, 1, 1))
    zero = [name for name, m in model.named_modules() if isinstance(m, nn.LayerNorm) and not m.weight.any()]
    assert zero
    convert_norms(model, DYT)
    assert all(not model.get_submodule(name).weight.any() for name in zero)


def test_readers_of_eps_and_weight_keep_working():
    model = nn.Sequential(nn.LayerNorm(4, eps=1e-3))
    convert_norms(model, DYT)
    assert (model[0].eps, model[0].normalized_shape, model[0].weight.shape) == (1e-3, (4,), (4,))


@pytest.mark.parametrize("how", [DYT, Conversion("rms"), Conversion("group"), Conversion(exclude=["*.norm1"])])
def test_torchs_fused_encoder_layer_does_not_compute_layernorm_behind_our_back(how):
    """In evaluation nn.TransformerEncoderLayer hands eps, weight and bias of its norms to a kernel of its own."""
    torch.manual_seed(0)
    model = nn.TransformerEncoder(nn.TransformerEncoderLayer(8, 2, 16, 0.0, batch_first=True), 2)
    convert_norms(model, how)
    x = torch.randn(3, 5, 8)
    trained = model.train()(x)
    with torch.no_grad():
        assert torch.allclose(model.eval()(x), trained, atol=1e-6)


def test_parameters_of_two_dtypes_keep_theirs_and_a_frozen_norm_gets_a_frozen_alpha():
    model = nn.Sequential(nn.LayerNorm(4))
    model[0].bias = nn.Parameter(torch.zeros(4, dtype=torch.float64))
    model.requires_grad_(False)
    convert_norms(model, DYT)
    assert (model[0].weight.dtype, model[0].bias.dtype) == (torch.float32, torch.float64)
    assert not any(p.requires_grad for p in model.parameters())


# ------------------------------------------------------------------------------------------ choosing sites


def alphas(model: nn.Module, **how) -> dict[str, float]:
    chosen, _ = chosen_sites(model, Conversion(**how))
    return {site.name: site.alpha_init for site in chosen}


def test_rules_give_alpha_by_role_depth_class_and_name():
    vit = timm.create_model("vit_tiny_patch16_224", depth=3, qk_norm=True, num_classes=2)
    rules = {"attention": 0.8, "feed_forward": 0.2, "final": 0.3, "qk": 0.9, "*@1": 0.7, "blocks.2.norm1": 1.5}
    assert alphas(vit, rules=rules) == {
        "blocks.0.norm1": 0.8, "blocks.0.attn.q_norm": 0.9, "blocks.0.attn.k_norm": 0.9, "blocks.0.norm2": 0.2,
        "blocks.1.norm1": 0.7, "blocks.1.attn.q_norm": 0.7, "blocks.1.attn.k_norm": 0.7, "blocks.1.norm2": 0.7,
        "blocks.2.norm1": 1.5, "blocks.2.attn.q_norm": 0.9, "blocks.2.attn.k_norm": 0.9, "blocks.2.norm2": 0.2,
        "norm": 0.3,
    }  # fmt: skip
    convnext = timm.create_model("convnext_atto", depths=(1, 2, 1, 1), num_classes=2)
    found = alphas(convnext, rules={"LayerNorm2d": 0.1, "feed_forward@1-2": 0.2, "final": 0.4})
    assert {name: found[name] for name in ("stem.1", "stages.1.downsample.0", "head.norm")} == {
        "stem.1": 0.1, "stages.1.downsample.0": 0.1, "head.norm": 0.4,
    }  # fmt: skip


def test_the_alphas_of_a_model_start_where_the_rules_say():
    model, sites = build_arm(tiny("norm=dyt", "norm.alpha_init=0.6", "norm.rules={attention: 0.8, *@1: 0.4}"), 10)
    found = {site.name: round(model.get_parameter(f"{site.name}.alpha").item(), 6) for site in sites}
    assert found == {
        "blocks.0.norm1": 0.8, "blocks.0.norm2": 0.6, "blocks.1.norm1": 0.4, "blocks.1.norm2": 0.4, "fc_norm": 0.6,
    }  # fmt: skip
    assert found == {site.name: site.alpha_init for site in sites}


@pytest.mark.parametrize(
    ("how", "expected"),
    [
        ({"include": ["attention"]}, ["blocks.0.norm1", "blocks.1.norm1"]),
        ({"exclude": ["final", "blocks.0.*"]}, ["blocks.1.norm1", "blocks.1.norm2"]),
        ({"include": ["LayerNorm"], "exclude": ["*@0-1"]}, ["fc_norm"]),
    ],
)
def test_include_and_exclude(how, expected):
    model, _ = build_arm(tiny(), 10)
    assert list(alphas(model, **how)) == expected
    sites = convert_norms(model, Conversion(**how))
    assert [site.name for site in sites] == expected
    assert norms_left(model) == {"LayerNorm": 5 - len(expected)}


@pytest.mark.parametrize(
    ("how", "said"),
    [
        ({"rules": {"atention": 0.8}}, "norm.rules: 'atention' matches no site"),
        ({"rules": {"attention@7": 0.8}}, "norm.rules: 'attention@7' matches no site"),
        ({"include": ["blocks.9.*"]}, "norm.include: 'blocks.9.*' matches no site"),
        ({"exclude": ["LayerNorm2d"]}, "norm.exclude: 'LayerNorm2d' matches no site"),
        ({"exclude": ["*"]}, "norm.include and norm.exclude leave none of the 5 sites"),
        ({"rules": {"qk": 1.0}}, "norm.rules: 'qk' matches no site"),
        ({"types": ["rmsnorm"]}, r"no RMSNorm to convert \(it has 5 LayerNorm\)"),
    ],
)
def test_a_pattern_that_means_nothing_is_refused(how, said):
    model, _ = build_arm(tiny(), 10)
    with pytest.raises(UserError, match=said):
        convert_norms(model, Conversion(**how))
    assert norms_left(model) == {"LayerNorm": 5}


# model, arguments: roles of its sites in the order of its modules (a attention, f feed-forward, q qk, o other, F final)
ROLES = {
    ("vit_tiny_patch16_224", "depth=2"): "afafF",
    ("convnext_atto", "depths=(1,1,1,1)"): "ofofofofF",
    ("swinv2_tiny_window8_256", "depths=(1,1,1,1)"): "oafoafoafoafF",
    ("eva02_tiny_patch14_224", "depth=2"): "afafF",
    ("xcit_nano_12_p16_224", "depth=1"): "affafafF",
    ("maxvit_tiny_tf_224", "depths=(1,1,1,1)"): "afafafafafafafafF",
    ("coatnet_0_224", "depths=(1,1,1,1)"): "afafF",
    ("mixer_s32_224", "drop_rate=0"): 8 * "af" + "F",
    ("mambaout_femto", "depths=(1,1,1,1)"): "ooooooooooo",
    ("vit_base_patch16_siglip_224", "depth=1"): "afFF",
}


@pytest.mark.parametrize(("name", "arguments"), ROLES)
def test_roles(name, arguments):
    key, _, value = arguments.partition("=")
    model = timm.create_model(name, num_classes=2, **{key: eval(value)})
    letter = {"attention": "a", "feed_forward": "f", "qk": "q", "other": "o", "final": "F"}
    assert "".join(letter[site.role] for site in norm_sites(model)) == ROLES[name, arguments]


# model, arguments: how many blocks its norms are in, and one of them
BLOCKS = {
    ("vit_tiny_patch16_224", "depth=3"): (3, "blocks.2.norm1", 2),
    ("convnext_atto", "depths=(1,2,1,1)"): (5, "stages.1.blocks.1.norm", 2),
    ("twins_pcpvt_small", "depths=(1,2,1,1)"): (5, "blocks.1.1.norm2", 2),
    ("mambaout_femto", "depths=(1,1,2,1)"): (5, "stages.2.blocks.1.norm", 3),
    ("maxvit_tiny_tf_224", "depths=(1,1,1,1)"): (4, "stages.3.blocks.0.attn_grid.norm2", 3),
}


@pytest.mark.parametrize(("name", "arguments"), BLOCKS)
def test_blocks_are_counted_over_all_stages(name, arguments):
    count, site, block = BLOCKS[name, arguments]
    key, _, value = arguments.partition("=")
    sites = {one.name: one for one in norm_sites(timm.create_model(name, num_classes=2, **{key: eval(value)}))}
    assert sites[site].block == block
    assert {one.block for one in sites.values() if one.block is not None} == set(range(count))


def test_places_do_not_depend_on_which_families_are_asked_for():
    model = timm.create_model("vit_dwee_patch16_reg1_gap_256", num_classes=2)
    assert len(norm_sites(model, ("rmsnorm",))) == 14
    both = {site.name: (site.role, site.block) for site in norm_sites(model, ("layernorm", "rmsnorm"))}
    for family in ("layernorm", "rmsnorm"):
        for site in norm_sites(model, (family,)):
            assert both[site.name] == (site.role, site.block)


# ------------------------------------------------------------------------------------------ exchange


def test_a_state_dict_of_the_reference_loads():
    """The reference names its parameters alpha (1,), weight and bias, at the place of the norm."""
    model, sites = build_arm(tiny("norm=dyt"), 10)
    saved = {name: torch.full_like(value, 0.25) for name, value in model.state_dict().items()}
    assert saved["blocks.0.norm1.alpha"].shape == (1,)
    model.load_state_dict(saved)
    assert all(model.get_parameter(f"{site.name}.alpha").item() == 0.25 for site in sites)
