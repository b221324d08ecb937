"""A trained LayerNorm model → a point-wise one that starts where it stood.

Each norm is replaced by the point-wise layer that comes nearest to it, by least squares over inputs it has really
seen: for a given alpha, weight and bias are a straight-line fit a channel; alpha is searched. A point-wise layer cannot
follow a norm exactly, which scales each token by itself: the error that is left is reported for each site.
"""

import math
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from dytrun.activations import unfused
from dytrun.errors import UserError
from dytrun.functions import FUNCTIONS
from dytrun.norm import PointWise

# Rows (tokens or pixels) that a fit looks at, as many from each batch.
_MAX_ROWS = 8192
# Relative deviation below which a channel counts as constant: some hundred steps of float32.
_FLAT = 1e-5
# The search for alpha: so many candidates a round, spread evenly on a log scale, each round around the last one's best.
_CANDIDATES, _ROUNDS = 25, 4
# Candidates of the first round, times 1 / std of the input.
_LOWEST, _HIGHEST = 0.02, 20.0


class Fit(NamedTuple):
    """How near a layer comes to the norm that it replaces."""

    alpha: float
    """Mean over channels, where there is one a channel."""
    error: float
    """Root of (squared error / squared deviation of the norm's output from its mean a channel), over the rows seen."""
    error_before: float
    """The same with the alpha, weight and bias that the conversion alone gives."""


def calibrate(teacher: nn.Module, student: nn.Module, batches: Sequence[Tensor]) -> dict[str, Fit]:
    """Fit every point-wise layer of `student`, in place, to the norm at its place in `teacher`.

    Both are left in evaluation mode. `batches` are images (B, 3, H, W) on the models' device. Sites are fitted in the
    order in which they compute: each sees what the layers fitted before it make of the images, and aims at what the
    trained norm makes of them.
    """
    layers = {name: module for name, module in student.named_modules() if isinstance(module, PointWise)}
    teacher.eval()
    student.eval()
    targets = _seen(teacher, {name: layer.channel_axis for name, layer in layers.items()}, batches, of_output=True)
    fits = {}
    for name, target in targets.items():
        inputs = _seen(student, {name: layers[name].channel_axis}, batches, of_output=False)[name]
        fits[name] = fit(layers[name], inputs, target)
    return fits


@torch.no_grad()
def fit(layer: PointWise, x: Tensor, y: Tensor) -> Fit:
    """Choose alpha, weight and bias of `layer`, in place, so that it maps rows `x` to `y` (rows, C) most nearly.

    What the layer does not have, or does not learn, stays as it is; so does its shift.
    """
    x, y = x.float(), y.double()
    before = _error(layer, x, y)
    # With no bend in f, alpha and weight are one number.
    if layer.alpha.requires_grad and layer.function != "identity":
        per_channel = layer.alpha.numel() > 1
        spread = x.double().std(0) if per_channel else x.double().std().view(1)
        best = 1 / spread.clamp_min(1e-12)
        low, high = _LOWEST, _HIGHEST
        for _ in range(_ROUNDS):
            factors = torch.logspace(math.log10(low), math.log10(high), _CANDIDATES, dtype=y.dtype, device=y.device)
            # (candidates, C): what is left of each channel's squared deviation
            left = torch.stack([_line(layer, x, y, factor * best)[2] for factor in factors])
            chosen = left.argmin(0) if per_channel else left.sum(1).argmin(0, keepdim=True)
            best = best * factors[chosen]
            ratio = (high / low) ** (1 / (_CANDIDATES - 1))
            low, high = 1 / ratio, ratio
        layer.alpha.copy_(best)
    weight, bias, _ = _line(layer, x, y, layer.alpha)
    if layer.weight is not None:
        layer.weight.copy_(weight)
    if layer.bias is not None:
        layer.bias.copy_(bias)
    return Fit(layer.alpha.mean().item(), _error(layer, x, y), before)


def _line(layer: PointWise, x: Tensor, y: Tensor, alpha: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return, for a given alpha, the best weight, bias and the squared error that they leave, each (C,)."""
    # As the layer computes it, in float32: what that rounds away cannot be fitted.
    z = alpha.float() * x if layer.shift is None else alpha.float() * x + layer.shift.float()
    t = layer.gain * FUNCTIONS[layer.function](z).double()
    t_mean, y_mean = (t.mean(0), y.mean(0)) if layer.bias is not None else (0.0, 0.0)
    t_off, y_off = t - t_mean, y - y_mean
    if layer.weight is None:
        weight = torch.ones_like(y[0])
    else:
        power = (t_off * t_off).sum(0)
        # A channel that is saturated throughout moves by rounding alone: it gets its mean.
        floor = len(t) * (_FLAT * t.abs().amax(0)).square()
        weight = torch.where(power > floor, (t_off * y_off).sum(0) / power.clamp_min(1e-30), 0.0)
    bias = y_mean - weight * t_mean
    return weight, bias + torch.zeros_like(weight), (y_off - weight * t_off).square().sum(0)


def _error(layer: PointWise, x: Tensor, y: Tensor) -> float:
    found = unfused(layer, x.movedim(-1, layer.channel_axis)).movedim(layer.channel_axis, -1).double()
    return ((found - y).square().sum() / (y - y.mean(0)).square().sum().clamp_min(1e-30)).sqrt().item()


@torch.no_grad()
def _seen(model: nn.Module, axes: Mapping[str, int], batches: Sequence[Tensor], of_output: bool) -> dict[str, Tensor]:
    """Return rows (rows, C) of what goes into, or comes out of, some modules, in the order in which they compute.

    Rows are drawn by a generator of its own, so every model that sees the same batches gives the same rows.

    Raises:
        UserError: a row is not finite.
    """
    rows: dict[str, list[Tensor]] = {}

    def listen(name: str) -> RemovableHandle:
        def hook(module: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> None:
            value = unfused(module, args[0]) if of_output else args[0]
            value = value.movedim(axes[name], -1).flatten(0, -2)
            parts = rows.setdefault(name, [])
            generator = torch.Generator().manual_seed(len(parts))
            drawn = torch.randperm(len(value), generator=generator)[: -(-_MAX_ROWS // len(batches))]
            parts.append(value[drawn.to(value.device)].float())
            if not bool(parts[-1].isfinite().all()):
                raise UserError(f"norm.calibrate: {name} sees values that are not finite; start from another file")

        return model.get_submodule(name).register_forward_hook(hook)

    handles = [listen(name) for name in axes]
    try:
        for images in batches:
            model(images)
    finally:
        for handle in handles:
            handle.remove()
    return {name: torch.cat(parts) for name, parts in rows.items()}
