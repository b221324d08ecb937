"""The functions that take the place of a norm's statistics, a line each, and what their papers report.

Published figures are ImageNet-1K top-1 in percent: of DyT's paper (arXiv 2503.10622 v2; recipe with drop-path 0.1 for
ViT-B), or of Derf's (arXiv 2512.10938 v2; every function there has a learnable shift, drop-path 0.15 for ViT-B).
"""

import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor


def dyt(z: Tensor) -> Tensor:
    """DyT: ViT-B 82.5, ViT-S 80.3; with a shift 82.6 (Derf's paper)."""
    return torch.tanh(z)


def dyt_by_sigmoid(z: Tensor) -> Tensor:
    """tanh(z), off by up to 2e-7 in float32, however small it is.

    Beyond 20 its slope is 0: it would soon make subnormal numbers, on which a processor is ten times as slow.
    """
    return 2 * torch.sigmoid(2 * z.clamp(-20, 20)) - 1


def hardtanh(z: Tensor) -> Tensor:
    """Clip to [-1, 1]: ViT-B 82.2, ViT-S 79.9 (DyT's paper); as `linear-clip`, with a shift, 82.3 (Derf's)."""
    return F.hardtanh(z)


def sigmoid(z: Tensor) -> Tensor:
    """1 / (1 + exp(-z)), not centred at zero: ViT-B 81.6, ViT-S 79.6 (DyT's paper)."""
    return torch.sigmoid(z)


def identity(z: Tensor) -> Tensor:
    """Return z; alpha stays: ViT-B 61.0 and ViT-S 58.5 before training diverges (DyT's paper)."""
    return z


def derf(z: Tensor) -> Tensor:
    """Error function, with a shift from 0: ViT-B 82.8, ViT-L 83.8; ViT-B without the shift 82.6 (Derf's paper)."""
    return torch.erf(z)


def satursin(z: Tensor) -> Tensor:
    """sin(z) within half a period, constant outside: ViT-B 82.6 (Derf's paper)."""
    return torch.sin(z.clamp(-math.pi / 2, math.pi / 2))


def arcsinh_clip(z: Tensor) -> Tensor:
    """Inverse hyperbolic sine, clipped to [-1, 1], as its name has it: ViT-B 82.5 (Derf's paper; not in its code)."""
    return torch.asinh(z).clamp(-1, 1)


def exproot(z: Tensor) -> Tensor:
    """sign(z) (1 - exp(-sqrt|z|)): ViT-B 82.4 (Derf's paper). Its slope grows without bound towards 0; at 0 it is 0."""
    # The root of |z| has no finite gradient at 0, and 0 * inf would make the whole layer's gradient NaN.
    root = torch.where(z == 0, 1, z.abs()).sqrt()
    return torch.sign(z) * -torch.expm1(-root)


def arctan(z: Tensor) -> Tensor:
    """2 / pi * arctan(z): ViT-B 82.4 (Derf's paper)."""
    return 2 / math.pi * torch.atan(z)


def smoothsign(z: Tensor) -> Tensor:
    """z / (1 + |z|): ViT-B 82.4 (Derf's paper)."""
    z = z.clamp(-1e30, 1e30)  # beyond, it is 1 to the last bit, and infinity over infinity would be no number
    return z / (1 + z.abs())


def isru(z: Tensor) -> Tensor:
    """z / sqrt(1 + z²), inverse square root unit: ViT-B 82.3 (Derf's paper)."""
    z = z.clamp(-1e9, 1e9)  # beyond, it is 1 to the last bit, and z² would overflow
    return z * torch.rsqrt(1 + z * z)


def expsign(z: Tensor) -> Tensor:
    """sign(z) (1 - exp(-|z|)): ViT-B 82.2 (Derf's paper)."""
    # In two halves, because the slope of sign(z) g(|z|) at 0 would come out as 0 instead of 1.
    return torch.expm1(torch.where(z < 0, z, 0)) - torch.expm1(-torch.where(z < 0, 0, z))


def cubsign(z: Tensor) -> Tensor:
    """z³ / (1 + |z|³), flat around 0: ViT-B 81.4 (Derf's paper)."""
    cube = z.abs().clamp(max=1e6) ** 3  # beyond, it is 1 to the last bit, and z³ would overflow
    return torch.sign(z) * cube / (1 + cube)


FUNCTIONS: dict[str, Callable[[Tensor], Tensor]] = {
    f.__name__: f
    for f in (
        dyt, derf, identity, hardtanh, sigmoid, satursin, arcsinh_clip, exproot, arctan, smoothsign, isru, expsign,
        cubsign,
    )
}  # fmt: skip
# DyISRU, sqrt(C) x / sqrt(beta + x²) (Stollenwerk, arXiv 2503.21708), is isru at alpha = 1 / sqrt(beta), times sqrt(C).
# Its author trains nothing, so there is no published figure.
FUNCTIONS["dyisru"] = isru
# (lowest, highest) of what each can return, up to its factor; identity has no bounds.
BOUNDS = {name: (0.0 if name == "sigmoid" else -1.0, 1.0) for name in FUNCTIONS if name != "identity"}
