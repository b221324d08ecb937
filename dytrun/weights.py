"""Weights from a file: read without running its code, matched by name, nothing filled in silently."""

import argparse
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy._core.multiarray import scalar as _numpy_scalar
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from dytrun.checkpoint import matches_manifest
from dytrun.errors import UserError
from dytrun.norm import GroupNorm, PointWise, RmsNorm

# Where training scripts put the model among other things: the reference's and timm's, in this order.
_PARTS = ("model", "state_dict", "module")
# Plain records and numbers, nothing that runs: the reference's checkpoints hold their command line, and its optimizer's
# rates are numbers of NumPy's (under the name that NumPy 1 gave them, too).
_RECORDS = [
    argparse.Namespace,
    np.dtype,
    np.dtypes.Float64DType,
    np.dtypes.Float32DType,
    np.dtypes.Int64DType,
    _numpy_scalar,
    (_numpy_scalar, "numpy.core.multiarray.scalar"),
]
# What wrappers put before every name: DDP, torch.compile.
_PREFIXES = ("module.", "_orig_mod.")


@dataclass(frozen=True)
class Loaded:
    """What became of the weights of a file."""

    copied: int
    new: list[str]
    """Of the model, not of the file: alphas and shifts, and a classifier of another size. They are as drawn."""
    unused: list[str]
    """Of the file, not of the model: the weight or bias of a norm whose replacement has none."""


def read_weights(path: Path, part: str | None = None) -> dict[str, Tensor]:
    """Read a state dict from a .safetensors file, or from a pickle (.pth, .pt, .bin) with weights alone.

    `part` names the state dict within a pickle, such as `model_ema`; without it the raw weights are looked for.

    Raises:
        UserError: the file is damaged, holds code, or holds no weights, or no such part.
    """
    if path.is_dir():
        found = sorted(path.glob("checkpoints/step-*/model.safetensors"))
        hint = f"a file, such as {found[-1]}" if found else "a file of weights"
        raise UserError(f"init_from: {path} is a directory; give {hint}")
    if not matches_manifest(path):
        raise UserError(f"init_from: {path} is damaged (it does not match the manifest beside it); give another file")
    try:
        if path.suffix == ".safetensors":
            values: Any = load_file(path)
        else:
            with torch.serialization.safe_globals(_RECORDS):
                values = torch.load(path, map_location="cpu", weights_only=True)
    except (SafetensorError, OSError, EOFError, ValueError, KeyError, RuntimeError) as error:
        raise UserError(
            f"init_from: {path} cannot be read as weights ({_first_line(error)}); give another file"
        ) from None
    except Exception as error:  # pickle.UnpicklingError and whatever a wrong pickle stumbles over
        name = re.search(r"GLOBAL ([\w.]+)", str(error))
        what = f"{name[1]}, which is code" if name else _first_line(error)
        raise UserError(
            f"init_from: {path} holds more than weights ({what}); nothing of it was run; save its state dict alone"
        ) from None
    if part is not None:
        parts = {str(key): value for key, value in values.items() if isinstance(value, Mapping)} \
            if isinstance(values, Mapping) else {}  # fmt: skip
        if part not in parts:
            raise UserError(f"init_part: {path} has no part '{part}'; it has {', '.join(parts) or 'none'}")
        values = parts[part]
    while isinstance(values, Mapping) and (inner := next((key for key in _PARTS if _is_part(values, key)), None)):
        values = values[inner]
    if not isinstance(values, Mapping) or not any(isinstance(value, Tensor) for value in values.values()):
        raise UserError(f"init_from: {path} holds no state dict; give a file of weights")
    weights = {str(name): value for name, value in values.items() if isinstance(value, Tensor)}
    for prefix in _PREFIXES:
        if all(name.startswith(prefix) for name in weights):
            weights = {name.removeprefix(prefix): value for name, value in weights.items()}
    return weights


def load_weights(model: nn.Module, weights: Mapping[str, Tensor], path: Path) -> Loaded:
    """Copy weights into a model by name, and say what was not copied; on an error the model is as it was.

    Raises:
        UserError: they are of another model: a name or a shape does not fit, and the difference is none of those that
            a converted norm or another number of classes makes.
    """
    own = model.state_dict()
    sites = {
        name: module for name, module in model.named_modules() if isinstance(module, PointWise | RmsNorm | GroupNorm)
    }
    may_be_new = {f"{name}.{part}" for name in sites for part in ("alpha", "shift")} - weights.keys()
    may_be_unused = {f"{name}.{part}" for name in sites for part in ("weight", "bias")} - own.keys()
    classifier = _classifier(model)
    resized = {name for name in classifier & weights.keys() & own.keys() if weights[name].shape != own[name].shape}
    missing = [name for name in own if name not in weights and name not in may_be_new]
    surplus = [name for name in weights if name not in own and name not in may_be_unused]
    other = [
        name for name in own.keys() & weights.keys() if own[name].shape != weights[name].shape and name not in resized
    ]
    if missing or surplus or other:
        raise UserError(f"init_from: {path} is of another model: {_mismatch(own, weights, missing, surplus, other)}")
    with torch.no_grad():
        fitting = [name for name in own if name in weights and name not in resized]
        for name in fitting:
            own[name].copy_(weights[name])
    return Loaded(
        copied=len(fitting),
        new=[name for name in own if name not in fitting],
        unused=[name for name in weights if name in may_be_unused],
    )


def has_alphas(weights: Mapping[str, Tensor]) -> bool:
    """Say whether a state dict is of a converted model."""
    return any(name.endswith(".alpha") for name in weights)


def _is_part(values: Mapping[str, Any], key: str) -> bool:
    return isinstance(values.get(key), Mapping) and not isinstance(values.get(key), Tensor)


def _classifier(model: nn.Module) -> set[str]:
    """Return the names of the parameters whose shape follows from the number of classes (timm's pretrained_cfg)."""
    named = (getattr(model, "pretrained_cfg", None) or {}).get("classifier") or ()
    heads = (named,) if isinstance(named, str) else named
    return {f"{head}.{part}" for head in heads for part in ("weight", "bias")}


def _mismatch(
    own: Mapping[str, Tensor], weights: Mapping[str, Tensor], missing: list[str], surplus: list[str], other: list[str]
) -> str:
    parts = []
    if missing:
        parts.append(f"it lacks {len(missing)} of {len(own)} tensors, first {missing[0]}")
    if surplus:
        parts.append(f"it has {len(surplus)} that the model has not, first {surplus[0]}")
    if other:
        name = min(other)
        parts.append(f"{name} is {tuple(weights[name].shape)} there and {tuple(own[name].shape)} here")
    if has_alphas(weights) and not has_alphas(own):
        hint = "it has point-wise norms: say norm=dyt, or whichever it was trained with"
    else:
        hint = "check model, model.kwargs, norm and data.image_size"
    return f"{'; '.join(parts)}; {hint}"


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
