"""Every model of timm that has LayerNorm: converted with nothing else changed, or refused by name.

By default one model of each of timm's modules; all of them with `pytest -m zoo`. On the meta device: shapes, no memory.
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

# timm 1.0.31: of 1,371 architectures so many have LayerNorm, in so many of its 98 modules.
NUM_MODELS, NUM_MODULES, NUM_WITH_LAYERNORM = 1371, 98, 676


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


@pytest.mark.parametrize("module", MODULES, ids=lambda name: name.rpartition(".")[2])
def test_one_model_a_module(module):
    assert check(MODULES[module][0]) in ("none", "converted")


@pytest.mark.zoo
@pytest.mark.timeout(1800)
def test_all_models():
    found = {name: check(name) for names in MODULES.values() for name in names}
    outcomes = list(found.values())
    refused = {name: outcome for name, outcome in found.items() if outcome not in ("none", "converted")}
    assert len(outcomes) - outcomes.count("none") == NUM_WITH_LAYERNORM
    assert refused == {}
    assert outcomes.count("converted") == NUM_WITH_LAYERNORM


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
