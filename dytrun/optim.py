"""Parameter groups, optimizer and schedule. Epochs become steps here and nowhere else."""

import math
from dataclasses import dataclass
from fnmatch import fnmatchcase
from types import SimpleNamespace

import torch
from timm.models import group_parameters
from timm.optim._param_groups import auto_group_layers
from torch import nn

from dytrun.config import OptimConfig, RunConfig
from dytrun.errors import UserError
from dytrun.norm import GroupNorm, PointWise, RmsNorm

# The learning rate of the paper's ImageNet runs and the global batch that it belongs to (README of jiachenzhu/DyT).
PAPER_LR, PAPER_BATCH = 4e-3, 4096


@dataclass(frozen=True)
class Plan:
    """A run counted in optimizer steps and micro-batches."""

    steps_per_epoch: int
    total_steps: int
    warmup_steps: int
    batch_per_rank: int
    """Images, or windows, of a micro-batch on one rank."""
    accumulation: int
    """Micro-batches of an optimizer step on one rank."""


def plan_steps(config: RunConfig, num_train: int, world: int) -> Plan:
    """Count the steps of a run; as in the reference, images that do not fill a last global batch are left out.

    Raises:
        UserError: the data has less than one batch, or the batch cannot be split evenly over ranks and micro-batches.
    """
    batch, limit = config.global_batch, config.machine.max_batch_per_rank
    if num_train < batch:
        raise UserError(f"global_batch: {batch} is more than the {num_train} training {config.unit}; lower it")
    if batch % world:
        raise UserError(f"global_batch: {batch} cannot be split over {world} ranks; choose a multiple of {world}")
    share = batch // world
    accumulation = _accumulation(share, min(limit or share, share), config.augment.mixes)
    steps_per_epoch = num_train // batch
    return Plan(
        steps_per_epoch=steps_per_epoch,
        total_steps=config.epochs * steps_per_epoch,
        warmup_steps=int(config.optim.warmup_epochs * steps_per_epoch),
        batch_per_rank=share // accumulation,
        accumulation=accumulation,
    )


def _accumulation(share: int, limit: int, in_pairs: bool) -> int:
    """Return the fewest micro-batches of equal size, at most `limit`, that make a rank's share of the global batch."""
    sizes = [size for size in range(limit, 0, -1) if share % size == 0 and not (in_pairs and size % 2)]
    if not sizes:
        raise UserError(
            f"augment.mixup: images are mixed in pairs, and a rank's {share} images of the global batch are an odd "
            "number; change global_batch or the ranks, or set augment.mixup=0 augment.cutmix=0"
        )
    if 4 * sizes[0] < limit:
        raise UserError(
            f"machine.max_batch_per_rank: a rank's {share} of the global batch split into equal micro-batches "
            f"of {sizes[0]} at most, far below the limit of {limit}; change global_batch or the limit"
        )
    return share // sizes[0]


def lr_at(step: int, optim: OptimConfig, plan: Plan) -> float:
    """Learning rate of optimizer step `step` (from 0): linear warm-up from 0, then half a cosine down to min_lr.

    The warm-up is a closed interval, as the reference's (utils.cosine_scheduler): its last step and the first of
    the cosine both have the full rate.
    """
    if step < plan.warmup_steps:
        return optim.lr * step / (plan.warmup_steps - 1) if plan.warmup_steps > 1 else 0.0
    progress = (step - plan.warmup_steps) / (plan.total_steps - plan.warmup_steps)
    return optim.min_lr + 0.5 * (optim.lr - optim.min_lr) * (1 + math.cos(math.pi * progress))


def param_groups(model: nn.Module, optim: OptimConfig) -> list[dict]:
    """Split the parameters: no decay for those with one dimension, for biases, and for what the model names.

    So alpha, weight and bias of every norm are never decayed. With layer_decay below 1 each group carries the
    `lr_scale` of its layer, by timm's numbering of layers; an alpha belongs to the layer of its site.
    """
    no_decay = set(model.no_weight_decay()) if hasattr(model, "no_weight_decay") else set()  # pyright: ignore[reportCallIssue]
    layers = _layers(model) if optim.layer_decay < 1 else {}
    last = max(layers.values(), default=0)
    groups: dict[tuple[int, bool], list[nn.Parameter]] = {}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            is_named = any(fnmatchcase(name, pattern) for pattern in no_decay)  # XCiT names a glob
            is_plain = parameter.ndim <= 1 or name.endswith(".bias") or is_named
            groups.setdefault((layers.get(name, last), is_plain), []).append(parameter)
    return [
        {
            "params": parameters,
            "weight_decay": 0.0 if is_plain else optim.weight_decay,
            "lr_scale": optim.layer_decay ** (last - layer),
        }
        for (layer, is_plain), parameters in sorted(groups.items(), key=lambda item: item[0])
    ]


def _layers(model: nn.Module) -> dict[str, int]:
    """Number the layers that parameters belong to, as timm does, from the image up."""
    if hasattr(model, "group_matcher"):
        return group_parameters(model, model.group_matcher(coarse=False), reverse=True)  # pyright: ignore[reportCallIssue]
    # timm then counts parameters: those of the norms as they were, so that all arms have the same layers.
    names: list[str] = []
    sites: dict[str, int] = {}  # module → place in `names` of its first parameter, or of the one before it
    for name, module in model.named_modules():
        is_converted = isinstance(module, PointWise | RmsNorm | GroupNorm)
        own = module.replaced if is_converted else [part for part, _ in module.named_parameters(recurse=False)]
        sites[name] = max(0, len(names) - (0 if own else 1))
        names += [f"{name}.{part}" if name else part for part in own]
    counted = SimpleNamespace(named_parameters=lambda: [(name, None) for name in names])
    counted.pretrained_cfg = model.pretrained_cfg
    layers = auto_group_layers(counted)
    for name, _ in model.named_parameters():
        if name not in layers:
            layers[name] = layers[names[sites[name.rpartition(".")[0]]]]
    return layers


def build_optimizer(model: nn.Module, optim: OptimConfig) -> torch.optim.AdamW:
    """Make AdamW in its fused form, which can skip a step on the device, without the host looking."""
    groups = param_groups(model, optim)
    return torch.optim.AdamW(groups, lr=optim.lr, betas=optim.betas, eps=optim.eps, fused=True)


def set_lr(optimizer: torch.optim.Optimizer, lr: float) -> None:
    """Give every group its share of the learning rate."""
    for group in optimizer.param_groups:
        group["lr"] = lr * group["lr_scale"]
