"""Weights from a file: read without running its code, matched by name, nothing filled in silently."""

import argparse
import pickle
import re
import warnings
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
from dytrun.errors import UserError, first_line
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
    """Of the model, not of the file, and as drawn: a classifier of another size, first, then alphas and shifts."""
    unused: list[str]
    """Of the file, not of the model: the weight or bias of a norm whose replacement has none."""


def read_weights(path: Path, part: str | None = None) -> dict[str, Tensor]:
    """Read a state dict from a .safetensors file, or from a pickle (.pth, .pt, .bin) with weights alone.

    `part` names the state dict within a pickle, such as `model_ema`; without it the raw weights are looked for.

    Raises:
        UserError: the file is damaged, holds code, or holds no weights, or no such part.
    """
    if not matches_manifest(path):
        raise UserError(f"init_from: {path} is damaged (it does not match the manifest beside it); give another file")
    values = _state_dict(_load(path), part, path)
    if not isinstance(values, Mapping) or not any(isinstance(value, Tensor) for value in values.values()):
        raise UserError(f"init_from: {path} holds no state dict; give a file of weights")
    weights = {str(name): value for name, value in values.items() if isinstance(value, Tensor)}
    bad = [name for name, value in weights.items() if value.is_floating_point() and not bool(value.isfinite().all())]
    if bad:
        raise UserError(f"init_from: {path} has values that are not finite, first in {bad[0]}; give another file")
    while common := [prefix for prefix in _PREFIXES if all(name.startswith(prefix) for name in weights)]:
        weights = {name.removeprefix(common[0]): value for name, value in weights.items()}
    return weights


def load_weights(model: nn.Module, weights: Mapping[str, Tensor], path: Path) -> Loaded:
    """Copy weights into a model by name, and say what was not copied; on an error the model is as it was.

    Raises:
        UserError: they are of another model: a name or a shape does not fit, and the difference is none of those that
            a converted norm or another number of classes makes.
    """
    own = model.state_dict()
    sites = [name for name, module in model.named_modules() if isinstance(module, PointWise | RmsNorm | GroupNorm)]
    may_be_new = {f"{name}.{part}" for name in sites for part in ("alpha", "shift")} - weights.keys()
    may_be_unused = {f"{name}.{part}" for name in sites for part in ("weight", "bias")} - own.keys()
    classifier = classifier_names(model)
    resized = {name for name in classifier & weights.keys() & own.keys() if weights[name].shape != own[name].shape}
    missing = [name for name in own if name not in weights and name not in may_be_new]
    surplus = [name for name in weights if name not in own and name not in may_be_unused]
    common = own.keys() & weights.keys() - resized
    other = [name for name in common if _differs(own[name], weights[name])]
    if missing or surplus or other:
        raise UserError(f"init_from: {path} is of another model: {_mismatch(own, weights, missing, surplus, other)}")
    with torch.no_grad():
        fitting = [name for name in own if name in weights and name not in resized]
        for name in fitting:
            own[name].copy_(weights[name])
    return Loaded(
        copied=len(fitting),
        new=sorted((name for name in own if name not in fitting), key=lambda name: name not in classifier),
        unused=[name for name in weights if name in may_be_unused],
    )


def brings_alphas(model: nn.Module, weights: Mapping[str, Tensor]) -> bool:
    """Say whether a state dict has an alpha for any point-wise layer of `model`.

    By site, because a model can have an alpha of its own (timm's EfficientViM).
    """
    return any(f"{name}.alpha" in weights for name, module in model.named_modules() if isinstance(module, PointWise))


def classifier_names(model: nn.Module) -> set[str]:
    """Return the names of the parameters whose shape follows from the number of classes (timm's pretrained_cfg)."""
    named = (getattr(model, "pretrained_cfg", None) or {}).get("classifier") or ()
    heads = (named,) if isinstance(named, str) else named
    return {f"{head}.{part}" for head in heads for part in ("weight", "bias")}


def _load(path: Path) -> Any:
    """Read what a file holds, weights or a mapping around them, running nothing."""
    try:
        if _is_safetensors(path):
            return load_file(path)
        with torch.serialization.safe_globals(_RECORDS), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of pickles that torch did not write
            return torch.load(path, map_location="cpu", weights_only=True)
    except (SafetensorError, OSError) as error:
        raise UserError(f"init_from: {path} cannot be read ({first_line(error)}); give another file") from None
    except (pickle.UnpicklingError, EOFError, ValueError, KeyError, IndexError, RuntimeError) as error:
        if (name := re.search(r"GLOBAL ([\w.]+)", str(error))) is not None:
            raise UserError(
                f"init_from: {path} holds more than weights ({name[1]}, which is code); nothing of it was run; save "
                "its state dict alone"
            ) from None
        raise UserError(
            f"init_from: {path} is damaged, or no file of weights that can be read without running code; nothing of it "
            "was run; give a state dict, as .safetensors or from torch.save"
        ) from None


def _state_dict(values: Any, part: str | None, path: Path) -> Any:
    """Return the named part of what a file holds; without a name, the raw weights wherever scripts put them."""
    items = values.items() if isinstance(values, Mapping) else ()
    parts = {str(key): value for key, value in items if isinstance(value, Mapping)}
    if part is None:
        part = next((name for name in _PARTS if name in parts), None)
        return values if part is None else _state_dict(parts[part], None, path)
    if part not in parts:
        raise UserError(f"init_part: {path} has no part '{part}'; it has {', '.join(parts) or 'none'}")
    return _state_dict(parts[part], None, path)


def _is_safetensors(path: Path) -> bool:
    """Tell by the name, else by the content: eight bytes of length, then JSON."""
    with path.open("rb") as file:
        return path.suffix == ".safetensors" or file.read(9)[8:] == b"{"


def _differs(one: Tensor, other: Tensor) -> bool:
    return one.shape != other.shape or one.is_floating_point() != other.is_floating_point()


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
        there, here = (f"{tuple(value.shape)} {str(value.dtype).removeprefix('torch.')}"
                       for value in (weights[name], own[name]))  # fmt: skip
        parts.append(f"{name} is {there} there and {here} here")
    if any(name.endswith(".alpha") for name in surplus):
        hint = "it has point-wise norms: say norm=dyt, or whichever it was trained with"
    elif any(name.endswith("embed_tokens.scale") for name in missing):
        hint = "its embedding is not scaled: say model.embedding_scale=off"
    else:
        hint = "check model, model.kwargs, norm and data.image_size"
    return f"{'; '.join(parts)}; {hint}"
