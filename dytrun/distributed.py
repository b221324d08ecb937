"""Rank, world, device and reductions; without a process group it is world 1, rank 0."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta

import torch
import torch.distributed as dist
from torch import Tensor, nn


@dataclass(frozen=True)
class Place:
    """Where this process stands."""

    rank: int
    world: int
    device: torch.device

    @property
    def is_first(self) -> bool:
        """Whether this is the rank that writes."""
        return self.rank == 0


def joined() -> bool:
    """Whether a launcher (ours, torchrun, SLURM's srun with torchrun's variables) has given this process a rank."""
    return "RANK" in os.environ and "WORLD_SIZE" in os.environ


def first_here() -> bool:
    """Whether this process is rank 0 by its environment; true where there is no launcher."""
    return os.environ.get("RANK", "0") == "0"


@contextmanager
def session(devices: list[int] | None, timeout_s: int) -> Iterator[Place]:
    """Join the process group that the environment names, if it names more than one rank, and leave it at the end.

    Args:
        devices: CUDA devices of this machine by local rank; None for the CPU.
        timeout_s: seconds after which a collective without an answer is an error.
    """
    rank, world = int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))
    local_rank = int(os.environ.get("LOCAL_RANK", "0"))
    device = torch.device("cpu") if devices is None else torch.device("cuda", devices[local_rank % len(devices)])
    if device.type == "cuda":
        torch.cuda.set_device(device)
    if world > 1:
        backend = "nccl" if device.type == "cuda" else "gloo"
        device_id = device if device.type == "cuda" else None
        dist.init_process_group(backend, timeout=timedelta(seconds=timeout_s), device_id=device_id)
    yield Place(rank, world, device)
    # Not after an error: to close its connections would make the other ranks fail, and hide the one that did.
    if dist.is_initialized():
        dist.destroy_process_group()


def world_size() -> int:
    """Number of ranks."""
    return dist.get_world_size() if dist.is_initialized() else 1


def all_sum(values: Tensor) -> Tensor:
    """Add `values` over all ranks, in place, and return them."""
    if world_size() > 1:
        dist.all_reduce(values)
    return values


def average_buffers(model: nn.Module) -> None:
    """Make the floating-point buffers of a model (BatchNorm's statistics) their mean over all ranks, in place."""
    if world_size() > 1:
        for buffer in model.buffers():
            if buffer.is_floating_point():
                buffer.copy_(all_sum(buffer.clone()) / world_size())


def broadcast_weights(model: nn.Module) -> None:
    """Give every rank the first one's parameters and buffers, in place."""
    if world_size() > 1:
        for value in model.state_dict().values():
            dist.broadcast(value, 0)


def barrier() -> None:
    """Wait until every rank is here."""
    if world_size() > 1:
        dist.barrier()
