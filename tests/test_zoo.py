"""Every model of timm that has LayerNorm: converted with nothing else changed, or refused by name.

By default one model of each of timm's modules; all of them with `pytest -m zoo -n auto`. On the meta device.
"""

import warnings
from collections.abc import Iterator

import pytest
import timm
import torch
from torch import nn

from dytrun.convert import Conversion, convert_norms
from dytrun.errors import UserError
from dytrun.sites import norm_sites

NUM_MODELS, NUM_MODULES, NUM_WITH_LAYERNORM = 1371, 98, 676  # in timm 1.0.31
# How many architectures of a module have an nn.LayerNorm, counted with isinstance alone; 0 for the modules not here.
NUM_CONVERTED = {
    "vision_transformer": 147, "byobnet": 4, "beit": 7, "metaformer": 18, "cait": 10, "coat": 8, "maxxvit": 57,
    "convit": 3, "convnext": 28, "cpubone": 9, "crossvit": 11, "csatv2": 2, "davit": 8, "deit": 16, "edgenext": 5,
    "efficientformer": 3, "efficientnet": 2, "efficientvim": 8, "efficientvit_mit": 7, "eva": 60, "fastvit": 2,
    "focalnet": 12, "gcvit": 5, "mlp_mixer": 11, "hiera": 8, "hieradet_sam2": 5, "inception_next": 4, "lowformer": 8,
    "mambaout": 11, "mobilevit": 3, "mvitv2": 8, "naflexvit": 14, "nest": 6, "pit": 8, "pvt_v2": 7, "qwen3_vit": 9,
    "rdnet": 4, "vision_transformer_sam": 4, "sequencer": 3, "swin_transformer": 9, "swin_transformer_v2": 12,
    "swin_transformer_v2_cr": 16, "vision_transformer_relpos": 14, "tiny_vit": 5, "tnt": 3, "twins": 6,
    "vision_transformer_hybrid": 14, "vitamin": 13, "volo": 11, "xcit": 28,
}  # fmt: skip


def by_module() -> dict[str, list[str]]:
    modules: dict[str, list[str]] = {}
    for name in timm.list_models():
        modules.setdefault(timm.models.model_entrypoint(name).__module__, []).append(name)
    return modules


def built(name: str) -> nn.Module:
    with torch.device("meta"), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of old names
        return timm.create_model(name)


def facts(model: nn.Module, names: set[str]) -> dict:
    """What conversion may not change: every other parameter and buffer, flags, and which norms an image passes."""
    size = (model.pretrained_cfg or {}).get("input_size", (3, 224, 224))
    called: list[str] = []
    handles = [
        model.get_submodule(name).register_forward_hook(lambda *_, name=name: called.append(name)) for name in names
    ]
    try:
        shape = getattr(model(torch.empty(2, *size, device="meta")), "shape", None)
    except Exception as error:  # a model that reads values on its way
        shape = type(error).__name__
    for handle in handles:
        handle.remove()
    state = {name: (value.shape, value.dtype, value.device) for name, value in model.state_dict().items()
             if not name.endswith((".alpha", ".shift"))}  # fmt: skip
    return {
        "output": shape,
        "called": called,
        "state": state,
        "training": {name: module.training for name, module in model.named_modules()
                     if name not in names and name.rpartition(".")[0] not in names},
        "flags": {name: p.requires_grad for name, p in model.named_parameters() if not name.endswith(".alpha")},
    }  # fmt: skip


def structure(norm: nn.Module) -> tuple[bool, bool]:
    return norm.weight is None, norm.bias is None


def check(name: str) -> str:
    """Convert one model and compare; return `none`, `converted` or the refusal."""
    model = built(name)
    model.eval()
    sites = norm_sites(model)
    # Counted without the converter's own list of types.
    count = sum(isinstance(module, nn.LayerNorm) for module in model.modules())
    assert len(sites) == count
    if not count:
        return "none"
    before = facts(model, {site.name for site in sites})
    num_params = sum(p.numel() for p in model.parameters())
    affine = {site.name: structure(model.get_submodule(site.name)) for site in sites}
    try:
        converted = convert_norms(model, Conversion())
    except UserError as error:
        return str(error)
    assert facts(model, {site.name for site in sites}) == before, name
    assert sum(p.numel() for p in model.parameters()) - num_params == len(converted) == count, name
    assert not any(isinstance(module, nn.LayerNorm) for module in model.modules()), name
    for site in converted:
        layer = model.get_submodule(site.name)
        assert structure(layer) == affine[site.name], (name, site.name)
        assert layer.alpha.device.type == "meta"
        assert not layer.training
    return "converted"


MODULES = by_module() if timm.__version__ == "1.0.31" else {}


def test_timm_is_as_large_as_it_was_counted():
    assert len(MODULES) == NUM_MODULES
    assert sum(len(names) for names in MODULES.values()) == NUM_MODELS
    assert sum(NUM_CONVERTED.values()) == NUM_WITH_LAYERNORM


@pytest.mark.parametrize("module", MODULES, ids=lambda name: name.rpartition(".")[2])
def test_one_model_a_module(module):
    assert check(MODULES[module][0]) in ("none", "converted")


@pytest.mark.zoo
@pytest.mark.timeout(1500)
@pytest.mark.parametrize("module", MODULES, ids=lambda name: name.rpartition(".")[2])
def test_all_models_of_a_module(module):
    outcomes = {name: check(name) for name in MODULES[module]}
    assert {name: outcome for name, outcome in outcomes.items() if outcome not in ("none", "converted")} == {}
    assert list(outcomes.values()).count("converted") == NUM_CONVERTED.get(module.rpartition(".")[2], 0)


def real(name: str) -> Iterator[nn.Module]:
    """The model with its own LayerNorms, then converted; small, on the CPU."""
    size = timm.get_pretrained_cfg(name).input_size
    for how in (None, Conversion()):
        torch.manual_seed(0)
        model = timm.create_model(name, num_classes=3, **({"depth": 2} if "vit_" in name else {}))
        if how is not None:
            convert_norms(model, how)
        model.eval()
        torch.manual_seed(1)
        model.images = torch.randn(1, *size)
        yield model


# One of each trap: fused activation, no bias, zero start, no affine, attribute readers, channels-first kinds, qk-norms.
TRAPS = [
    "coatnext_nano_rw_224", "caformer_s18", "swinv2_cr_tiny_ns_224", "qwen3_vit_88m", "swin_tiny_patch4_window7_224",
    "convnext_tiny_hnf", "mvitv2_tiny", "pvt_v2_b0", "xcit_nano_12_p16_224", "vit_relpos_small_patch16_rpn_224",
]  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("name", TRAPS)
def test_a_real_forward_and_backward_for_each_trap(name):
    plain, converted = real(name)
    outputs = []
    for model in (plain, converted):
        logits = model(model.images)
        logits.logsumexp(1).sum().backward()
        assert logits.shape == (1, 3)
        assert bool(logits.isfinite().all())
        assert all(bool(p.grad.isfinite().all()) for p in model.parameters() if p.grad is not None)
        outputs.append(logits)
    with_gradient = {name for name, p in plain.named_parameters() if p.grad is not None}
    assert {name for name, p in converted.named_parameters() if p.grad is not None} >= with_gradient
    assert not torch.equal(*outputs)
    # What reads a norm's attributes after the conversion.
    converted.reset_classifier(5)
    assert converted(converted.images).shape == (1, 5)
