"""Norms at work: hooks that are there for one pass and see what goes into them, and what is read off it.

Training glances at its norms now and then (`glance`); `dytrun probe` looks longer (probe.py).
Axes: B batch, C channel, H height, W width.
"""

import contextlib
import copy
import math
import random
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor, nn

from dytrun.functions import BOUNDS, FUNCTIONS
from dytrun.norm import PointWise

# Images of a glance. They give thousands of elements a site, and std and shares are needed to two digits; more would
# cost a small model's training more than a hundredth of its time.
GLANCE_IMAGES = 8
# A value so near to a bound, as a share of the way from the middle, is saturated: |tanh| beyond it has a slope of 0.02.
SATURATED = 0.99


class Glance(NamedTuple):
    """What the norms of a model did to a few images; by site. A number that is not finite is given as it is."""

    alpha: dict[str, float]
    """Its mean where there is one a channel; of point-wise layers alone."""
    input_std: dict[str, float]
    """Standard deviation over all elements of the norm's input: images, tokens and channels together, as in figure 8
    of DyT's paper (arXiv 2503.10622 v2)."""
    saturation: dict[str, float]
    """Share of the inputs for which f(alpha x + shift) is beyond 0.99 of the way to its bound; of functions that have
    bounds alone."""


@torch.no_grad()
def glance(model: nn.Module, sites: Sequence[str], images: Tensor, autocast: torch.autocast) -> Glance:
    """Send a few images, or windows of text, through `model` in evaluation mode, and leave no trace of it.

    Model, random generators and compiled code are as before. A site that the model does not call is left out; one that
    it calls several times is seen each time.
    """
    seen: dict[str, list[Tensor]] = {}

    def see(name: str, norm: nn.Module, x: Tensor, _: Tensor) -> None:
        var, mean = torch.var_mean(x.float(), correction=0)
        figures = [mean, var]
        if isinstance(norm, PointWise):
            figures.append(norm.alpha.float().mean())
            if norm.function in BOUNDS:
                figures.append(is_saturated(norm, x).float().mean())
        seen.setdefault(name, []).append(torch.stack(figures))

    with undisturbed(model), watched(model, sites, see), autocast:
        model(images)
    # One wait for the device, whatever the number of sites.
    flat = torch.cat([one for calls in seen.values() for one in calls]).tolist() if seen else []
    alpha, input_std, saturation = {}, {}, {}
    for name, calls in seen.items():
        # One row a call, one column a figure; the calls of a shared site are taken to be of one size.
        size = len(calls[0])
        (means, variances, *rest), flat = _columns(flat[: size * len(calls)], size), flat[size * len(calls) :]
        middle = sum(means) / len(means)
        spread = sum((mean - middle) ** 2 for mean in means) / len(means)
        input_std[name] = math.sqrt(sum(variances) / len(variances) + spread)
        for found, values in zip((alpha, saturation), rest, strict=False):
            found[name] = sum(values) / len(values)
    return Glance(alpha, input_std, saturation)


def _columns(values: list[float], size: int) -> list[list[float]]:
    return [values[number::size] for number in range(size)]


@contextlib.contextmanager
def watched(
    model: nn.Module, sites: Sequence[str], see: Callable[[str, nn.Module, Tensor, Tensor], None]
) -> Iterator[None]:
    """While it lasts, `see(name, norm, input, output)` is called whenever one of these modules computes."""

    def hook_of(name: str) -> Callable[[nn.Module, tuple[Tensor, ...], Tensor], None]:
        return lambda norm, args, output: see(name, norm, args[0].detach(), output.detach())

    handles = [model.get_submodule(name).register_forward_hook(hook_of(name)) for name in sites]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


@contextlib.contextmanager
def undisturbed(model: nn.Module) -> Iterator[None]:
    """Evaluation mode for a while, uncompiled; then training flags, random generators and the rest are as before.

    Compiled code is passed by, not thrown away: hooks would not be seen by it, and a batch of another size would
    compile it anew. Point-wise layers compute by the formula, so that nothing is compiled for their ops either.
    """
    modules = list(model.modules())
    flags = [(module, module.training) for module in modules]
    chosen = [(module, module.implementation) for module in modules if isinstance(module, PointWise)]
    states = random.getstate(), np.random.get_state()
    devices = sorted({p.device.index for p in model.parameters() if p.device.type == "cuda"})
    with torch.random.fork_rng(devices), torch.compiler.set_stance("force_eager"):
        try:
            for module, _ in flags:
                module.training = False
            for module, _ in chosen:
                module.implementation = "formula"
            yield
        finally:
            for module, was in flags:
                module.training = was
            for module, was in chosen:
                module.implementation = was
            random.setstate(states[0])
            np.random.set_state(states[1])


def inner(layer: PointWise, x: Float[Tensor, "..."]) -> Float[Tensor, "..."]:
    """Return z = alpha * x + shift of a point-wise layer, float32."""

    def spread(value: Tensor) -> Tensor:
        channels = [1] * x.ndim
        channels[layer.channel_axis] = -1
        return value.float().view(channels)

    z = spread(layer.alpha) * x.float()
    return z if layer.shift is None else z + spread(layer.shift)


def is_saturated(layer: PointWise, x: Float[Tensor, "..."]) -> Tensor:
    """Say of each input whether the function, which must have bounds, is beyond SATURATED of the way to one of them."""
    low, high = BOUNDS[layer.function]
    value = FUNCTIONS[layer.function](inner(layer, x))
    return (value - (low + high) / 2).abs() > SATURATED * (high - low) / 2


def unfused(norm: nn.Module, x: Float[Tensor, "..."]) -> Float[Tensor, "..."]:
    """Return what a norm makes of `x` before the drop-out and activation that may be fused into it."""
    bare = copy.copy(norm)
    bare._modules = {name: nn.Identity() for name in norm._modules}
    return bare.forward(x)


def normalized(norm: nn.Module, x: Float[Tensor, "..."]) -> Float[Tensor, "..."]:
    """Return what a norm makes of `x` before its weight and bias, float32: for LayerNorm (x - mean) / std."""
    bare = copy.copy(norm)
    bare._parameters = dict(norm._parameters)
    for name, fill in (("weight", torch.ones_like), ("bias", torch.zeros_like)):
        if (value := norm._parameters.get(name)) is not None:
            bare._parameters[name] = nn.Parameter(fill(value, dtype=torch.float32), requires_grad=False)
    with torch.autocast(x.device.type, enabled=False):
        return unfused(bare, x.float())
