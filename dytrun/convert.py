"""LayerNorm -> DyT: the one place where a model's norms change.

Structure-preserving, and it draws no random number: a converted model differs from its LayerNorm twin by the
alphas alone. weight and bias are taken over from the norm they replace (SwinV2 starts them at 0), and what is
missing stays missing.
"""

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from timm import layers as timm_layers
from timm.layers.grn import GlobalResponseNorm
from timm.layers.norm import LayerNormExp2d
from torch import nn

from dytrun.errors import UserError
from dytrun.norm import DynamicTanh

# By exact type, never isinstance: timm's LayerNormAct is an nn.LayerNorm that also activates, and
# LayerNorm2dFp32 is channels-first without being a LayerNorm2d.
CHANNEL_AXIS: dict[type[nn.Module], int] = {
    nn.LayerNorm: -1,
    timm_layers.LayerNorm: -1,
    timm_layers.LayerNormFp32: -1,
    timm_layers.LayerNorm2d: 1,
    timm_layers.LayerNorm2dFp32: 1,
    LayerNormExp2d: 1,
}
# What counts as a norm that is left alone, to be said.
_OTHER_NORMS = (
    nn.modules.batchnorm._NormBase,
    nn.GroupNorm,
    nn.RMSNorm,
    timm_layers.RmsNorm,
    timm_layers.RmsNormFp32,
    timm_layers.RmsNorm2d,
    timm_layers.RmsNorm2dFp32,
    timm_layers.SimpleNorm,
    timm_layers.SimpleNormFp32,
    timm_layers.SimpleNorm2d,
    timm_layers.SimpleNorm2dFp32,
    GlobalResponseNorm,
)


@dataclass(frozen=True)
class Site:
    """A LayerNorm of a model, converted or to be."""

    name: str
    kind: str
    num_channels: int
    channels_last: bool


def norm_sites(model: nn.Module, required: bool = True) -> list[Site]:
    """List every LayerNorm of `model` in the order of its modules.

    With `required=False`, for a model that stays as it is, nothing is refused.

    Raises:
        UserError: the model has none, or one that has no point-wise twin (a fused activation, an unknown kind,
            more than one normalized axis).
    """
    sites, refused = [], []
    for name, module in model.named_modules():
        if not isinstance(module, nn.LayerNorm):
            continue
        kind = f"{type(module).__module__}.{type(module).__qualname__}"
        if type(module) not in CHANNEL_AXIS or len(module.normalized_shape) != 1 or not name:
            refused.append(f"{name or 'the model itself'} ({kind})")
        sites.append(Site(name, kind, module.normalized_shape[-1], CHANNEL_AXIS.get(type(module), -1) == -1))
    if not required:
        return sites
    if refused:
        raise UserError(
            f"norm: {len(refused)} LayerNorms of this model are of a kind that cannot be converted, "
            f"first {refused[0]}; choose another model or norm=ln"
        )
    if not sites:
        raise UserError(
            "norm: this model has no LayerNorm to convert"
            f"{_left_text(norms_left(model))}; choose a model with LayerNorm or norm=ln"
        )
    return sites


def norms_left(model: nn.Module) -> dict[str, int]:
    """Count the norms that conversion does not touch (BatchNorm, GroupNorm, GRN, …) by class name."""
    return dict(Counter(type(module).__name__ for module in model.modules() if isinstance(module, _OTHER_NORMS)))


def convert_norms(model: nn.Module, alpha_init: float) -> list[Site]:
    """Replace every LayerNorm of `model` by a DyT, in place, and say which.

    Device, dtype, training flag and requires_grad stay as they were. Run it before the optimizer, EMA and DDP.

    Raises:
        UserError: as `norm_sites`; the model is then as it was.
    """
    sites = norm_sites(model)
    swaps: dict[nn.Module, DynamicTanh] = {}
    for parent, child, module in _places(model):
        if isinstance(module, nn.LayerNorm):
            if module not in swaps:
                swaps[module] = _twin(module, alpha_init)
            setattr(parent, child, swaps[module])
    return sites


def _places(model: nn.Module) -> Iterator[tuple[nn.Module, str, nn.Module]]:
    """Yield every (parent, name in the parent, module); a shared module once for each of its places."""
    for parent in list(model.modules()):
        for child, module in list(parent._modules.items()):
            if module is not None:
                yield parent, child, module


def _twin(norm: nn.LayerNorm, alpha_init: float) -> DynamicTanh:
    """Return the DyT that takes the place of `norm`, with its very weight and bias parameters."""
    like = norm.weight if norm.weight is not None else torch.empty(0)
    with torch.device(like.device):
        twin = DynamicTanh(norm.normalized_shape[0], alpha_init, CHANNEL_AXIS[type(norm)])
    twin.to(dtype=like.dtype).train(norm.training)
    twin.weight, twin.bias = norm.weight, norm.bias
    return twin


def _left_text(left: dict[str, int]) -> str:
    return f" (it has {', '.join(f'{count} {kind}' for kind, count in left.items())})" if left else ""
