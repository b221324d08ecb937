"""A timm name becomes a module, with the construction arguments of the paper."""

from typing import Literal

import timm
import torch
from timm.models import get_pretrained_cfg
from torch import nn

from dytrun.config import ModelConfig, near
from dytrun.errors import UserError


def build_model(model: ModelConfig, num_classes: int, image_size: int, device: str = "cpu") -> nn.Module:
    """Build the named timm model without pretrained weights, for square images of `image_size` pixels.

    `device="meta"` gives shapes without memory. Weights are drawn from torch's global generator.

    Raises:
        UserError: timm has no such model, the model does not take an argument, or its patches do not tile the image.
    """
    _check_name(model.name)
    kwargs = dict(model.kwargs)
    if model.drop_path is not None:
        kwargs["drop_path_rate"] = model.drop_path
    pretrained_cfg = get_pretrained_cfg(model.name)
    if kwargs.get("img_size", image_size) != image_size:
        raise UserError(
            f"model.kwargs.img_size: {kwargs['img_size']} differs from data.image_size={image_size}; "
            "set data.image_size alone"
        )
    if pretrained_cfg is not None and pretrained_cfg.fixed_input_size:
        kwargs["img_size"] = image_size
    try:
        with torch.device(device):
            module = timm.create_model(model.name, pretrained=False, num_classes=num_classes, **kwargs)
    except (TypeError, AssertionError, ValueError) as error:
        raise UserError(
            f"model: timm cannot build {model.name} with {kwargs} ({error}); mend model.kwargs or model.drop_path"
        ) from error
    _check_patches(module, model.name, image_size)
    return module


def compile_model(module: nn.Module, how: Literal["off", "blocks", "model"]) -> None:
    """Compile a model in place, whole or block by block.

    `blocks`: identical blocks share their compiled code, and the gradients of a block are ready when its backward
    ends, so that DDP can send them while the next one computes.

    Raises:
        UserError: the model has no `blocks`.
    """
    if how == "model":
        module.compile(dynamic=False)
    if how == "blocks":
        lists = [item for name, item in module.named_modules() if name.rpartition(".")[2] == "blocks"]
        blocks = [block for item in lists if isinstance(item, nn.Sequential | nn.ModuleList) for block in item]
        if not blocks:
            raise UserError(
                "machine.compile: this model has no blocks to compile one by one; say machine.compile=model"
            )
        for block in blocks:
            block.compile(dynamic=False)


def _check_name(name: str) -> None:
    names = timm.list_models()
    if name.partition(".")[0] not in names:
        raise UserError(f"model.name: timm {timm.__version__} has no model '{name}'{near(name, names)}")


def _check_patches(module: nn.Module, name: str, image_size: int) -> None:
    patch_size = getattr(getattr(module, "patch_embed", None), "patch_size", None)
    for side in patch_size or ():
        if image_size % side:
            raise UserError(
                f"data.image_size: {image_size} is no multiple of the patch size {side} of {name}; "
                f"set data.image_size or model.kwargs.patch_size"
            )
