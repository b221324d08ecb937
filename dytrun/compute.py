"""What a step computes: its precision, its loss, its exchange of gradients."""

import inspect
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from dytrun.batch import Batch, aligned
from dytrun.config import RunConfig, TextConfig
from dytrun.distributed import Place

# torch 2.14 has renamed DDP's argument, and 2.11 knows only the old name.
_SYNC_BUFFERS = (
    "forward_sync_buffers"
    if "forward_sync_buffers" in inspect.signature(DistributedDataParallel).parameters
    else "broadcast_buffers"
)


def autocast(config: RunConfig, device: torch.device) -> torch.autocast:
    """Return the context of a run's precision."""
    dtype = {"bf16": torch.bfloat16, "fp16": torch.float16}.get(config.precision)
    return torch.autocast(device.type, dtype=dtype, enabled=dtype is not None)


def train_loss(net: nn.Module, batch: Batch, config: RunConfig) -> Tensor:
    """Return the mean training loss of a micro-batch; soft targets were smoothed when they were mixed."""
    smoothing = 0.0 if batch.targets.is_floating_point() else config.augment.smoothing
    with autocast(config, batch.images.device):
        logits = net(batch.images)
    return F.cross_entropy(*aligned(logits, batch.targets), label_smoothing=smoothing)


def distribute(model: nn.Module, place: Place, accumulation: int) -> nn.Module:
    """Wrap a model in DDP where there is more than one rank; the model itself stays usable."""
    if place.world == 1:
        return model
    # A hint about speed for 1×1 convolutions, whose gradients come in another order than their buckets.
    warnings.filterwarnings("ignore", message="Grad strides do not match bucket view strides")
    ids = [place.device.index] if place.device.type == "cuda" else None
    # DDP learns a static graph in its first backward pass, which may then not be one that sends no gradients: torch
    # 2.14 fails an assertion there (pytorch issue 143580). To send them in that one alone would be right up to
    # rounding, but a run that was interrupted would no longer end bit-equal to one that was not.
    options: dict[str, Any] = {_SYNC_BUFFERS: False, "static_graph": accumulation == 1}
    # DDP gives every rank the first one's buffers; within an epoch a BatchNorm's statistics are each rank's own.
    with _same_buffers(model):
        return DistributedDataParallel(model, ids, gradient_as_bucket_view=True, **options)


def settle(net: nn.Module, config: RunConfig, batch: int, device: torch.device) -> None:
    """Let DDP put its buckets of gradients into their final order before the first step instead of after it.

    The order in which three or more ranks are summed up depends on where in a bucket a gradient lies. A run that is
    taken up again would do its first step with other buckets than one that was never interrupted, and end with other
    bits. So every start begins with two backward passes whose gradients are thrown away: torch 2.14 orders the buckets
    after the first one, and those of a static graph after the second.

    Args:
        net: as `distribute` returns it.
        config: of the run.
        batch: images, or windows, of a micro-batch.
        device: of the model.
    """
    if not isinstance(net, DistributedDataParallel):
        return
    with _same_buffers(net.module):
        for _ in range(2):
            with autocast(config, device):
                logits = net(_blank(config, batch, device))
            logits.float().square().mean().backward()
            net.zero_grad(set_to_none=True)


def _blank(config: RunConfig, batch: int, device: torch.device) -> Tensor:
    if isinstance(config.data, TextConfig):
        return torch.zeros(batch, config.data.context, dtype=torch.int64, device=device)
    return torch.zeros(batch, 3, config.data.image_size, config.data.image_size, device=device)


@contextmanager
def _same_buffers(model: nn.Module) -> Iterator[None]:
    """Give a model's buffers back as they were."""
    before = [buffer.clone() for buffer in model.buffers()]
    yield
    for buffer, value in zip(model.buffers(), before, strict=True):
        buffer.copy_(value)
