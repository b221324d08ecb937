"""Parity with the reference, by numbers: its recipe written out here again, in plain torch, and its figures.

Sources: jiachenzhu/DyT aab5dde (dynamic_tanh.py, main.py, engine.py, optim_factory.py, utils.py) and the paper's
appendix A (arXiv 2503.10622 v2).
"""

import copy
import itertools
import math

import pytest
import torch
import torch.nn.functional as F
from conftest import config_of
from test_engine import PLACE, Bench
from torch import Tensor, nn

from dytrun.arm import build_arm
from dytrun.optim import lr_at, param_groups, plan_steps

# ------------------------------------------------------------------------------------------ the oracle


class PlainDyT(nn.Module):
    """The layer of the paper's equation 1, nothing else."""

    def __init__(self, num_channels: int, channels_last: bool):
        super().__init__()
        self.channels_last = channels_last
        self.alpha = nn.Parameter(torch.full((1,), 0.5))
        self.weight = nn.Parameter(torch.ones(num_channels))
        self.bias = nn.Parameter(torch.zeros(num_channels))

    def forward(self, x: Tensor) -> Tensor:
        weight, bias = self.weight, self.bias
        if not self.channels_last:
            weight, bias = weight[:, None, None], bias[:, None, None]
        return weight * torch.tanh(self.alpha * x) + bias


def plain_twin(model: nn.Module, norm: str) -> nn.Module:
    """The same model with the same weights, its point-wise layers replaced by the oracle's."""
    twin = copy.deepcopy(model)
    if norm == "dyt":
        for name, module in list(twin.named_modules()):
            if hasattr(module, "alpha"):
                parent, _, child = name.rpartition(".")
                plain = PlainDyT(len(module.weight), channels_last=module.channel_axis == -1)
                setattr(twin.get_submodule(parent), child, plain)
    twin.load_state_dict(model.state_dict())
    return twin


def reference_lr(total: int, warmup: int, lr: float, min_lr: float) -> list[float]:
    """Every step's rate: a closed linear warm-up from 0, then half a cosine over what is left."""
    rising = [lr * step / (warmup - 1) for step in range(warmup)]
    left = total - warmup
    return rising + [min_lr + 0.5 * (lr - min_lr) * (1 + math.cos(math.pi * step / left)) for step in range(left)]


def reference_groups(model: nn.Module, weight_decay: float) -> list[dict]:
    """No decay for 1-d parameters, biases and what the model names (optim_factory.get_parameter_groups)."""
    named = model.no_weight_decay() if hasattr(model, "no_weight_decay") else ()
    decayed, plain = [], []
    for name, parameter in model.named_parameters():
        is_plain = parameter.ndim == 1 or name.endswith(".bias") or name in named
        (plain if is_plain else decayed).append(parameter)
    return [{"params": decayed, "weight_decay": weight_decay}, {"params": plain, "weight_decay": 0.0}]


VIT = ("model.name=vit_tiny_patch16_224",
       "model.kwargs={patch_size: 4, embed_dim: 16, depth: 2, num_heads: 2, global_pool: avg}")  # fmt: skip
CONVNEXT = ("model.name=convnext_atto", "data.image_size=32",
            "model.kwargs={depths: [1, 1, 2, 1], dims: [8, 16, 24, 32], ls_init_value: 1e-6}")  # fmt: skip


@pytest.mark.parametrize("norm", ["ln", "dyt"])
@pytest.mark.parametrize("model", [VIT, CONVNEXT], ids=["vit", "convnext"])
def test_three_steps_and_the_ema_equal_the_plain_recipe(tmp_path, model, norm):
    recipe = (*model, f"norm={norm}", "optim.lr=4e-3", "optim.weight_decay=0.05", "optim.warmup_epochs=0.25", "ema=on",
              "augment.smoothing=0.1", "tracking.log_every_steps=1")  # fmt: skip
    bench = Bench(tmp_path, *recipe)
    twin = plain_twin(bench.state.model, norm).train()
    average = copy.deepcopy(twin.state_dict())
    optimizer = torch.optim.AdamW(
        reference_groups(twin, 0.05), lr=4e-3, betas=(0.9, 0.999), eps=1e-8, fused=False, foreach=False
    )
    rates = reference_lr(44, 11, 4e-3, 1e-6)
    around = bench.around()
    losses = []
    for step, (images, labels, *_) in enumerate(itertools.islice(around.train, 3)):
        for group in optimizer.param_groups:
            group["lr"] = rates[step]
        loss = F.cross_entropy(twin(images), labels, label_smoothing=0.1)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
        for name, value in twin.state_dict().items():
            average[name] = 0.9999 * average[name] + (1 - 0.9999) * value
    around.train.close()
    again = Bench(tmp_path, *recipe)
    found = again.records(3)
    assert [record.loss for record in found] == pytest.approx(losses, rel=1e-6)
    assert [record.lr for record in found] == pytest.approx(rates[:3], rel=1e-12)
    for name, value in again.state.ema.module.state_dict().items():
        torch.testing.assert_close(value.to(PLACE.device), average[name], rtol=1e-6, atol=1e-8)


def test_every_steps_learning_rate_over_the_whole_of_imagenet():
    config = config_of()
    plan = plan_steps(config, 1_281_167, world=64)
    expected = reference_lr(93_600, 6_240, 4e-3, 1e-6)
    assert plan.total_steps == len(expected)
    assert max(abs(lr_at(step, config.optim, plan) - lr) for step, lr in enumerate(expected)) < 1e-12


@pytest.mark.parametrize("norm", ["ln", "dyt", "derf"])
@pytest.mark.parametrize("model", ["vit_b", "convnext_b"])
def test_every_parameter_is_in_its_group(model, norm):
    config = config_of(f"model={model}", f"norm={norm}")
    built, _ = build_arm(config, 1000, device="meta")
    ours, theirs = param_groups(built, config.optim), reference_groups(built, 0.05)
    for one, other in zip(ours, theirs, strict=True):
        assert one["weight_decay"] == other["weight_decay"]
        assert {id(p) for p in one["params"]} == {id(p) for p in other["params"]}


# model, norm: (standard deviation of the logits, loss) of an untrained model on noise, batch 4; computed with the
# reference implementation (other seeds, so the scale is what is compared).
INITIAL = {
    ("vit_b", "ln"): (0.562, 6.895),
    ("vit_b", "dyt"): (0.0194, 6.909),
    ("convnext_b", "ln"): (0.627, 6.874),
    ("convnext_b", "dyt"): (1.0e-4, 6.9077),
}


@pytest.mark.slow
@pytest.mark.parametrize(("model", "norm"), INITIAL)
def test_an_untrained_model_gives_logits_of_the_references_scale(model, norm):
    scale, loss = INITIAL[model, norm]
    built, _ = build_arm(config_of(f"model={model}", f"norm={norm}"), 1000)
    torch.manual_seed(0)
    with torch.no_grad():
        logits = built.eval()(torch.randn(4, 3, 224, 224))
    assert logits.std().item() == pytest.approx(scale, rel=0.15)
    assert F.cross_entropy(logits, torch.arange(4)).item() == pytest.approx(loss, abs=3 * scale)


def test_layer_decay_puts_alpha_where_its_site_is_in_every_family():
    """Also where timm has no grouping of its own and counts parameters: alphas must not shift its count."""
    for name in ("vit_tiny_patch16_224", "convnext_atto", "caformer_s18", "pit_ti_224", "swin_tiny_patch4_window7_224"):
        common = ("model=timm", f"model.name={name}", "optim.layer_decay=0.7")
        scale = {}
        for norm in ("ln", "derf"):
            config = config_of(*common, f"norm={norm}")
            model, sites = build_arm(config, 10, device="meta")
            names = {id(p): name for name, p in model.named_parameters()}
            scale[norm] = {names[id(p)]: group["lr_scale"] for group in param_groups(model, config.optim)
                           for p in group["params"]}  # fmt: skip
        assert {key: scale["derf"][key] for key in scale["ln"]} == scale["ln"], name
        for site in sites:
            for part in ("alpha", "shift"):
                assert scale["derf"][f"{site.name}.{part}"] == scale["derf"][f"{site.name}.weight"], (name, site.name)
