"""The layers that take the place of a norm: one shape, a line for each function, and which implementation runs where.

    y = weight * f(alpha * x [+ shift]) + bias

alpha, and shift where there is one, is a learnable scalar a layer (or a value a channel); weight and bias are one value
a channel. No statistics are computed. `RmsNorm` and `GroupNorm`, at the end, are the comparators that do compute some.
Axes: channels last (..., C), as tokens have them, or channels first (B, C, H, W).

The maths is float32 (float64 for float64) in all implementations. What comes out has the dtype of x, or of autocast
where that is on, as a linear layer's output has.
"""

import functools
import math
import os
import shutil
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn
from torch.autograd import forward_ad

from dytrun import cpu_kernels
from dytrun.functions import FUNCTIONS, dyt_by_sigmoid

# Said in every result: which implementation a speed belongs to.
IMPLEMENTATIONS = {
    "formula": "row-expanded formula",
    "sigmoid": "row-expanded formula, tanh by a sigmoid",
    "triton": "Triton op",
    "native": "C++ op",
    "torch": "sigmoid-form Function",
}
_OF_NORMS = {"ln": "F.layer_norm", "rms": "F.rms_norm", "group": "F.group_norm"}


def formula(
    f: Callable[[Tensor], Tensor],
    x: Float[Tensor, "..."],
    inner: tuple[Tensor, Tensor | None],
    affine: tuple[Tensor | None, Tensor | None],
    channel_axis: int = -1,
    dtype: torch.dtype | None = None,
) -> Float[Tensor, "..."]:
    """Compute weight * f(alpha * x + shift) + bias in torch's operators, and return it as `dtype`, or as x is.

    `inner` is (alpha, shift), each of shape (1,) or (C,); `affine` is (weight, bias), each (C,); None leaves one out.

    A scalar alpha is expanded over rows before it is used. The value is the same, but its gradient then is a sum a
    row followed by a small sum, which torch.compile folds into the one backward kernel of x, weight and bias; the
    gradient of an unexpanded scalar costs a pass over the activations of its own.
    """
    rows, channels = list(x.shape), [1] * x.ndim
    rows[channel_axis], channels[channel_axis] = 1, -1

    def spread(value: Tensor) -> Tensor:
        return value.expand(rows) if value.numel() == 1 else value.view(channels)

    alpha, shift = inner
    weight, bias = affine
    z = spread(alpha) * x.to(torch.promote_types(x.dtype, torch.float32))
    y = f(z if shift is None else z + spread(shift))
    if weight is not None:
        y = y * weight.view(channels)
    if bias is not None:
        y = y + bias.view(channels)
    return y.to(dtype or x.dtype)


def implementation(x: Tensor, function: str) -> str:
    """Choose what computes a function of these activations, a key of IMPLEMENTATIONS: the one place where it is chosen.

    Under torch.compile, export and tracing it is the formula, because a compiler fuses it with what stands around it
    and cannot look into an op; so it is where tensors are not plain ones (torch.func, forward-mode derivatives, fake
    tensors), and for a function, a dtype or a device that no kernel is there for.
    """
    if torch.compiler.is_compiling() and not torch.compiler.is_exporting():
        return compiled_implementation(x.device, function)
    if torch.compiler.is_compiling() or type(x) not in (Tensor, nn.Parameter):
        return "formula"
    if torch.jit.is_tracing() or torch._C._are_functorch_transforms_active() or forward_ad._current_level >= 0:
        return "formula"
    if torch._C._get_dispatch_mode(torch._C._TorchDispatchModeKey.PROXY) is not None:
        return "formula"
    if x.is_cuda:
        return "triton" if _triton() and _triton().fits(x, function) else "formula"
    if x.device.type == "cpu" and function == "dyt":
        return "native" if cpu_kernels.fits_native(x, out_dtype(x)) else "torch"
    return "formula"


def compiled_implementation(device: torch.device, function: str) -> str:
    """Choose the spelling that torch.compile is given.

    Compiled for a CPU, forward and backward take 0.7 to 0.95 of the time with a sigmoid (runs/README.md). For CUDA it
    is counted to need 22 instead of 31 instructions forward and 53 instead of 60 back, and the same bytes
    (tests/traffic.py); until a GPU has shown that this is faster, tanh stays.
    """
    return "sigmoid" if function == "dyt" and device.type == "cpu" else "formula"


def described(name: str, compiled: str, device: torch.device) -> str:
    """Say what computes the norms of a run: of `norm=name` under `machine.compile=compiled`, float32 at rest.

    Asked within the run's autocast.
    """
    eager = _OF_NORMS.get(name) or IMPLEMENTATIONS[implementation(torch.empty(0, device=device), name)]
    traced = _OF_NORMS.get(name) or IMPLEMENTATIONS[compiled_implementation(device, name)]
    return {
        "off": f"{eager}, eager",
        "blocks": f"{traced}, compiled block by block; {eager}, eager, outside the blocks",
        "model": f"{traced}, compiled whole",
    }[compiled]


def out_dtype(x: Tensor) -> torch.dtype:
    """Return autocast's dtype where that is on for these activations, else their own."""
    device = x.device.type
    if device not in ("cpu", "cuda") or x.dtype == torch.float64 or not torch.is_autocast_enabled(device):
        return x.dtype
    return torch.get_autocast_dtype(device)


@functools.cache
def _triton() -> Any:
    """Return the Triton kernels, or None without Triton, or without the C compiler that it needs to start them."""
    if not (os.environ.get("CC") or shutil.which("gcc") or shutil.which("clang")):
        return None
    try:
        from dytrun import kernels
    except ImportError:
        return None
    return kernels


class PointWise(nn.Module):
    """A point-wise function in the place of a norm over `num_channels`; `function` is a name of FUNCTIONS.

    Parameters carry the names of the reference implementations (jiachenzhu/DyT, dynamic_tanh.py; zlab-princeton/Derf,
    ViT/dynamic_erf.py), so that state dicts are exchangeable: `alpha` and, if `shift_init` is given, `shift`, of shape
    (1,), or (C,) with `per_channel_alpha`; `weight` and `bias` of shape (C,), or None.

    `eps` is that of the norm replaced: unused, but models read it off their norms. `replaced` names that norm's own
    parameters.
    """

    def __init__(
        self,
        num_channels: int,
        function: str = "dyt",
        alpha_init: float = 0.5,
        shift_init: float | None = None,
        channel_axis: int = -1,
        per_channel_alpha: bool = False,
    ):
        super().__init__()
        self.normalized_shape = (num_channels,)
        self.function = function
        self.alpha_init = alpha_init
        self.channel_axis = channel_axis
        self.eps = 0.0
        size = num_channels if per_channel_alpha else 1
        self.alpha = nn.Parameter(torch.full((size,), float(alpha_init)))
        self.shift = None if shift_init is None else nn.Parameter(torch.full((size,), float(shift_init)))
        self.weight: nn.Parameter | None = nn.Parameter(torch.ones(num_channels))
        self.bias: nn.Parameter | None = nn.Parameter(torch.zeros(num_channels))
        self.gain = math.sqrt(num_channels) if function == "dyisru" else 1.0
        self.implementation: str | None = None
        """A key of IMPLEMENTATIONS where a benchmark wants it to be that one; None leaves it to `implementation`."""
        self.replaced: tuple[str, ...] = ()
        self.drop: nn.Module | None = None
        self.act: nn.Module | None = None

    def forward(self, x: Float[Tensor, "..."]) -> Float[Tensor, "..."]:
        """Map activations of any shape with C on the channel axis to the same shape, in `out_dtype(x)`."""
        weight = self.weight
        if self.gain != 1.0:
            ones = torch.ones(self.normalized_shape, device=x.device) if weight is None else weight
            weight = self.gain * ones.to(torch.promote_types(ones.dtype, torch.float32))
        return _fused(self, self._computed(x, (self.alpha, self.shift), (weight, self.bias)))

    def _computed(
        self, x: Tensor, inner: tuple[Tensor, Tensor | None], affine: tuple[Tensor | None, Tensor | None]
    ) -> Tensor:
        axis, dtype = self.channel_axis, out_dtype(x)

        def by_formula(x: Tensor, inner: Any, affine: Any) -> Tensor:
            return formula(FUNCTIONS[self.function], x, inner, affine, axis, dtype)

        which = self.implementation or implementation(x, self.function)
        if which == "formula":
            return by_formula(x, inner, affine)
        if which == "sigmoid":
            return formula(dyt_by_sigmoid, x, inner, affine, axis, dtype)
        if which == "triton":
            return _triton().point_wise(x, inner, affine, self.function, axis, dtype)
        call = cpu_kernels.Call(axis, dtype, which == "native", by_formula)
        return cpu_kernels.point_wise(x, inner, affine, call)

    def extra_repr(self) -> str:
        """Say channels, function, initial alpha and layout."""
        layout = "channels_last" if self.channel_axis == -1 else "channels_first"
        return f"{self.normalized_shape[0]}, {self.function}, alpha_init={self.alpha_init:g}, {layout}"


def alphas(model: nn.Module) -> dict[str, float]:
    """Return the alpha of each point-wise layer; its mean where there is one a channel."""
    return {name: module.alpha.mean().item() for name, module in model.named_modules()
            if isinstance(module, PointWise)}  # fmt: skip


class RmsNorm(nn.Module):
    """RMSNorm (Zhang and Sennrich 2019) over channels, in any layout: weight, no bias, as torch's F.rms_norm has it.

    ViT-B 82.4, ViT-L 83.0 (Derf's paper).
    """

    def __init__(self, num_channels: int, channel_axis: int, eps: float):
        super().__init__()
        self.normalized_shape = (num_channels,)
        self.channel_axis = channel_axis
        self.eps = eps
        self.weight: nn.Parameter | None = nn.Parameter(torch.ones(num_channels))
        self.replaced: tuple[str, ...] = ()
        self.drop: nn.Module | None = None
        self.act: nn.Module | None = None

    def forward(self, x: Float[Tensor, "..."]) -> Float[Tensor, "..."]:
        """Divide each token, or pixel, by the root mean square of its channels; shape and dtype stay."""
        maths = x.to(torch.promote_types(x.dtype, torch.float32)).movedim(self.channel_axis, -1)
        y = F.rms_norm(maths, self.normalized_shape, _as(maths, self.weight), self.eps)
        return _fused(self, y.movedim(-1, self.channel_axis).to(x.dtype))


class GroupNorm(nn.Module):
    """GroupNorm (Wu and He 2018) over all tokens, or pixels, and a group's channels, in any layout.

    ViT-B 82.5, ViT-L 83.1 (Derf's paper, which leaves the number of groups open).
    """

    def __init__(self, num_channels: int, num_groups: int, channel_axis: int, eps: float):
        super().__init__()
        self.normalized_shape = (num_channels,)
        self.num_groups = num_groups
        self.channel_axis = channel_axis
        self.eps = eps
        self.weight: nn.Parameter | None = nn.Parameter(torch.ones(num_channels))
        self.bias: nn.Parameter | None = nn.Parameter(torch.zeros(num_channels))
        self.replaced: tuple[str, ...] = ()
        self.drop: nn.Module | None = None
        self.act: nn.Module | None = None

    def forward(self, x: Float[Tensor, "..."]) -> Float[Tensor, "..."]:
        """Normalize each group of channels of each image; shape and dtype stay."""
        maths = x.to(torch.promote_types(x.dtype, torch.float32)).movedim(self.channel_axis, 1)
        y = F.group_norm(maths, self.num_groups, _as(maths, self.weight), _as(maths, self.bias), self.eps)
        return _fused(self, y.movedim(1, self.channel_axis).to(x.dtype))


def _as(x: Tensor, value: Tensor | None) -> Tensor | None:
    return None if value is None else value.to(x.dtype)


def _fused(layer: "PointWise | RmsNorm | GroupNorm", y: Tensor) -> Tensor:
    """Apply the drop-out and the activation that timm has fused into some norms (`drop`, `act`), if there are any."""
    if layer.drop is not None:
        y = layer.drop(y)
    return y if layer.act is None else layer.act(y)
