"""A timm name becomes a module, with the construction arguments of the paper."""

from typing import Any, Literal

import timm
import torch
import torch._dynamo
from timm.models import get_pretrained_cfg
from torch import nn

from dytrun.config import RunConfig
from dytrun.errors import UserError, first_line
from dytrun.subject_config import ModelConfig
from dytrun.validation import near


def build_model(model: ModelConfig, num_classes: int, image_size: int, device: str = "cpu") -> nn.Module:
    """Build the named timm model without pretrained weights, for square images of `image_size` pixels.

    `device="meta"` gives shapes without memory. Weights are drawn from torch's global generator.

    Raises:
        UserError: timm has no such model, the model does not take an argument, or its patches do not tile the image.
    """
    _check_name(model.name)
    kwargs = dict(model.kwargs)
    if model.drop_path is not None and "drop_path_rate" in kwargs:
        raise UserError("model.kwargs.drop_path_rate: say model.drop_path instead; it is set too")
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
    except Exception as error:  # what a model raises for an argument that it cannot use is anything
        raise UserError(
            f"model: timm cannot build {model.name} with {kwargs} ({type(error).__name__}: {first_line(error)}); "
            "mend model.kwargs or model.drop_path"
        ) from error
    _check_patches(module, model.name, image_size)
    return module


def trainable(module: nn.Module) -> int:
    """Count the parameters that training changes: an alpha that is not learned is none."""
    return sum(parameter.numel() for parameter in module.parameters() if parameter.requires_grad)


def check_forward(module: nn.Module, name: str, num_classes: int, image_size: int) -> None:
    """Send an empty batch through a model on the meta device.

    Raises:
        UserError: it does not turn RGB images of that size into one number a class.
    """
    try:
        shape = getattr(module(torch.empty(2, 3, image_size, image_size, device="meta")), "shape", None)
    except Exception as error:
        if "meta" in str(error):
            return  # a model that reads values on its way; it will say itself what it cannot do
        raise UserError(
            f"model: {name} cannot take RGB images of {image_size} px ({type(error).__name__}: {first_line(error)}); "
            "mend model.kwargs or data.image_size"
        ) from error
    if shape != (2, num_classes):
        raise UserError(f"model: {name} does not give {num_classes} numbers an image; mend model.kwargs")


def put_on(module: nn.Module, config: RunConfig, device: torch.device) -> nn.Module:
    """Bring a model to its device, in the memory format that the configuration wants there."""
    chosen = config.machine.channels_last
    if chosen == "auto":
        chosen = device.type == "cuda" and "convnext" in config.model.name
    module = module.to(device)
    return module.to(memory_format=torch.channels_last) if chosen else module  # pyright: ignore[reportCallIssue]


# Inductor writes a value down that is used more than once if it takes more than 4 reads or 30 operations to make. The
# gradient of a point-wise norm takes more where a shift is learned, or a residual is recomputed on the way; in float32,
# that is two more passes over the activations. Counted for an H200 (tests/traffic.py); LayerNorm's kernels stay as they
# are.
INDUCTOR: dict[str, Any] = {"realize_reads_threshold": 8, "realize_opcount_threshold": 60}


def compile_model(module: nn.Module, how: Literal["off", "blocks", "model"]) -> None:
    """Compile a model in place, whole or block by block.

    `blocks`: blocks that are alike in all but weights share their compiled code, and the gradients of a block are
    ready when its backward ends, so that DDP can send them while the next one computes.

    Raises:
        UserError: as `blocks_of`.
    """
    if how == "model":
        module.compile(dynamic=False, options=INDUCTOR)
    if how == "blocks":
        blocks = blocks_of(module)
        # Blocks with drop-path rates of their own, and training and evaluation, are compiled apart; past the limit
        # torch would run the rest uncompiled.
        torch._dynamo.config.recompile_limit = max(torch._dynamo.config.recompile_limit, 4 * len(blocks))
        # Else DDP's buckets would cut the blocks once more, and one rank would run other code than several.
        torch._dynamo.config.optimize_ddp = False
        for block in blocks:
            block.compile(dynamic=False, options=INDUCTOR)


def blocks_of(module: nn.Module) -> list[nn.Module]:
    """Return what machine.compile=blocks compiles one by one: timm has it in `blocks`, Hugging Face in `layers`.

    Raises:
        UserError: the model has neither.
    """
    named = [(name.rpartition(".")[2], item) for name, item in module.named_modules()]
    wanted = "blocks" if any(name == "blocks" for name, _ in named) else "layers"
    lists = [item for name, item in named if name == wanted]
    blocks = [block for item in lists if isinstance(item, nn.Sequential | nn.ModuleList) for block in item]
    if not blocks:
        raise UserError("machine.compile: this model has no blocks to compile one by one; say machine.compile=model")
    return blocks


def _check_name(name: str) -> None:
    names = timm.list_models()
    if name not in names:
        raise UserError(f"model.name: timm {timm.__version__} has no model '{name}'{near(name, names)}")


def _check_patches(module: nn.Module, name: str, image_size: int) -> None:
    patch_size = getattr(getattr(module, "patch_embed", None), "patch_size", None) or ()
    for side in (patch_size,) if isinstance(patch_size, int) else patch_size:
        if image_size % side:
            raise UserError(
                f"data.image_size: {image_size} is no multiple of the patch size {side} of {name}; "
                f"set data.image_size or model.kwargs.patch_size"
            )
