"""Norms that other libraries and users have written themselves: found by how they look, known by what they compute.

Hugging Face writes RMSNorm anew for nearly every model. No list of names would be whole, and a name proves nothing
(Gemma's RMSNorm weighs by 1 + weight). So a module that may be a norm is tried on a few numbers: only one that computes
LayerNorm or RMSNorm, weight and bias included, has a point-wise layer as its twin.
"""

import copy
import re
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

_NAME = re.compile(r"(rms|layer)_?norm", re.IGNORECASE)
# What these libraries have is listed in sites.py, or is no plain norm.
_LISTED = ("torch.", "timm.", "dytrun.")
_EPS = ("eps", "variance_epsilon", "epsilon")


class Kind(NamedTuple):
    """What a norm computes, and over which axis."""

    family: str
    channel_axis: int


def family_of(module: nn.Module) -> str | None:
    """Return the family that a norm of another library belongs to by its looks, or None if it looks like no norm."""
    kind = type(module)
    found = _NAME.search(kind.__name__)
    if found is None or kind.__module__.startswith(_LISTED) or len(list(module.children())) or not shape_of(module):
        return None
    return "rmsnorm" if found[1].lower() == "rms" else "layernorm"


def shape_of(module: nn.Module) -> tuple[int, ...]:
    """Return the shape that a norm is over; empty where it does not say."""
    shape = getattr(module, "normalized_shape", None) or getattr(getattr(module, "weight", None), "shape", ())
    return (shape,) if isinstance(shape, int) else tuple(shape)


def eps_of(module: nn.Module) -> float | None:
    """Return what a norm adds to the mean square before it divides by its root."""
    found = (getattr(module, name, None) for name in _EPS)
    return next((float(eps) for eps in found if isinstance(eps, int | float)), None)


@torch.no_grad()
def kind_of(module: nn.Module) -> Kind | None:
    """Return what a module computes, if that is LayerNorm or RMSNorm over one axis; None if it is anything else.

    The module stays as it is, and no random number is drawn. It is tried on the CPU, whatever device new tensors go to.
    """
    with torch.device("cpu"):
        return _tried(module)


def _tried(module: nn.Module) -> Kind | None:
    shape, parameters = shape_of(module), dict(module.named_parameters(recurse=False))
    if len(shape) != 1 or not parameters.keys() <= {"weight", "bias"} or len(list(module.children())):
        return None
    twin = copy.deepcopy(module).to_empty(device="cpu", recurse=False).float().eval()
    for name, start in (("weight", 0.5), ("bias", -0.7)):
        if name in parameters:
            getattr(twin, name).copy_(torch.linspace(start, start + 1.3, shape[0]))
    weight, bias = (getattr(twin, name, None) for name in ("weight", "bias"))
    eps = eps_of(module)
    x = torch.sin(torch.arange(2 * shape[0] * 6, dtype=torch.float32)).view(2, 6, shape[0]) * 3 + 0.4
    for axis, given in ((-1, x), (1, x.movedim(-1, 1).unflatten(-1, (2, 3)))):
        try:
            found = twin.forward(given)  # without the hooks that came along
        except Exception:  # whatever it says, it does not take such an input
            continue
        if not isinstance(found, Tensor) or found.shape != given.shape:
            continue
        found = found.movedim(axis, -1).reshape(x.shape)
        if bias is None and _is_close(found, F.rms_norm(x, shape, weight, eps)):
            return Kind("rmsnorm", axis)
        if _is_close(found, F.layer_norm(x, shape, weight, bias, 1e-5 if eps is None else eps)):
            return Kind("layernorm", axis)
    return None


def _is_close(one: Tensor, other: Tensor) -> bool:
    return bool(torch.allclose(one.float(), other, rtol=1e-3, atol=1e-4))
