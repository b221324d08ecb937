"""Rank, world, device and reductions; without a process group it is world 1, rank 0."""

import hashlib
import os
import socket
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn

from dytrun.errors import UserError, first_line

Result = TypeVar("Result")


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


@contextmanager
def session(devices: list[int] | None, timeout_s: int) -> Iterator[Place]:
    """Join the process group that the environment names, if it names more than one rank, and leave it at the end.

    Args:
        devices: CUDA devices of this machine by local rank; None for the CPU.
        timeout_s: seconds after which a collective without an answer is an error.
    """
    rank, world = int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))
    device = own_device(devices)
    if device.type == "cuda":
        torch.cuda.set_device(device)
    if world > 1:
        backend = "nccl" if device.type == "cuda" else "gloo"
        device_id = device if device.type == "cuda" else None
        timeout = timedelta(seconds=timeout_s)
        try:
            if "DYTRUN_RENDEZVOUS" in os.environ:
                store = _meet(Path(os.environ["DYTRUN_RENDEZVOUS"]), rank, world, timeout)
                dist.init_process_group(backend, None, timeout, world, rank, store, device_id=device_id)
            else:
                dist.init_process_group(backend, timeout=timeout, device_id=device_id)
        except dist.DistNetworkError as error:
            if "EADDRINUSE" not in str(error):
                raise
            where = f"{os.environ.get('MASTER_ADDR')}:{os.environ.get('MASTER_PORT')}"
            raise UserError(f"MASTER_PORT: {where} is in use by another process; choose another port") from None
        except ValueError as error:
            raise UserError(f"RANK is set, but the rest is not as torchrun sets it ({first_line(error)}); unset RANK, "
                            "or set what is missing") from None  # fmt: skip
    yield Place(rank, world, device)
    # Not after an error: to close its connections would make the other ranks fail, and hide the one that did.
    if dist.is_initialized():
        dist.destroy_process_group()


def own_device(devices: list[int] | None) -> torch.device:
    """Return the device of this rank, of the CUDA devices of this machine by local rank; None: the CPU.

    A rank that is shown no GPU but its own has number 0, whatever its local rank.
    """
    if devices is None:
        return torch.device("cpu")
    return torch.device("cuda", devices[int(os.environ.get("LOCAL_RANK", "0")) % len(devices)])


def world_size() -> int:
    """Number of ranks."""
    return dist.get_world_size() if dist.is_initialized() else 1


def is_first() -> bool:
    """Whether this is the rank that speaks."""
    return world_size() == 1 or dist.get_rank() == 0


def all_sum(values: Tensor) -> Tensor:
    """Add `values` over all ranks, in place, and return them."""
    if world_size() > 1:
        dist.all_reduce(values)
    return values


def average_buffers(model: nn.Module) -> None:
    """Make the floating-point buffers of a model (BatchNorm's statistics) their mean over all ranks, in place.

    Those that no state dict has are constants, and a mean of three equal numbers may be another number.
    """
    if world_size() > 1:
        kept = model.state_dict().keys()
        for buffer in (buffer for name, buffer in model.named_buffers() if name in kept):
            if buffer.is_floating_point():
                buffer.copy_(all_sum(buffer.clone()) / world_size())


def gather(value: Result) -> list[Result]:
    """Return every rank's value, on every rank."""
    if world_size() == 1:
        return [value]
    found: list[Result] = [value] * world_size()
    dist.all_gather_object(found, value)
    return found


def gather_buffers(parts: Mapping[str, nn.Module]) -> dict[str, Tensor]:
    """Return {"<world>.<rank>.<part>.<name>": buffer} of every rank's own buffers, on every rank; {} for one rank."""
    own = {f"{part}.{name}": value.cpu() for part, model in parts.items() for name, value in model.named_buffers()
           if name in model.state_dict()}  # fmt: skip
    if world_size() == 1 or not own:
        return {}
    found = gather(own)
    return {f"{len(found)}.{rank}.{name}": value for rank, one in enumerate(found) for name, value in one.items()}


def from_first(function: Callable[[], Result]) -> Result:
    """Call `function` on the first rank, and return on every rank what it returned.

    Raises:
        UserError: the function raised one; on the other ranks it holds no lines, because the first one says them.
    """
    if world_size() == 1:
        return function()
    answer, error = None, None
    if dist.get_rank() == 0:
        try:
            answer = function()
        except UserError as raised:
            error = raised
    box = [answer, error is not None]
    dist.broadcast_object_list(box, 0)
    if error is not None:
        raise error
    if box[1]:
        raise UserError()
    return box[0]  # pyright: ignore[reportReturnType]


def broadcast_tensors(tensors: Mapping[str, Tensor] | None, device: torch.device) -> dict[str, Tensor]:
    """Give every rank the first one's tensors, on the CPU; the others pass None.

    One by one through `device`, so that no rank holds more than one of them twice.
    """
    shapes = from_first(lambda: {name: (value.shape, value.dtype) for name, value in (tensors or {}).items()})
    if world_size() == 1:
        return dict(tensors or {})
    found = {}
    for name, (shape, dtype) in shapes.items():
        here = torch.empty(shape, dtype=dtype, device=device) if tensors is None else tensors[name].to(device)
        dist.broadcast(here, 0)
        found[name] = here.cpu()
    return found


def same_weights(model: nn.Module, when: str, in_epoch: bool = False) -> str:
    """Return the SHA-256 of a model's state, after checking that every rank has the same.

    Within an epoch the statistics of a BatchNorm are each rank's own: then only the parameters are looked at.

    Raises:
        RuntimeError: replicas have drifted apart; names the ranks that differ from the first.
    """
    digest = hashlib.sha256()
    for name, value in (dict(model.named_parameters()) if in_epoch else model.state_dict()).items():
        digest.update(name.encode())
        digest.update(value.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
    digests = gather(digest.hexdigest())
    if strays := [rank for rank, other in enumerate(digests) if other != digests[0]]:
        raise RuntimeError(f"the weights of rank {', '.join(map(str, strays))} are not those of rank 0 {when}")
    return digest.hexdigest()


def broadcast_weights(model: nn.Module) -> None:
    """Give every rank the first one's parameters and buffers, in place."""
    if world_size() > 1:
        for value in model.state_dict().values():
            dist.broadcast(value, 0)


def barrier() -> None:
    """Wait until every rank is here."""
    if world_size() > 1:
        dist.barrier()


def _meet(path: Path, rank: int, world: int, timeout: timedelta) -> dist.Store:
    """Bring the ranks of a job together by a file that all of them see: the first one writes host and port there.

    The port is one that the system gave, and held from then on: no two jobs on a node can get the same.
    """
    if rank == 0:
        store = dist.TCPStore("localhost", 0, world, True, timeout, wait_for_workers=False)
        partial = path.with_name(f".{path.name}.partial")
        partial.write_text(f"{_own_name()} {store.port}")
        partial.replace(path)
        return store
    until = time.monotonic() + timeout.total_seconds()
    while not path.is_file():
        if time.monotonic() > until:
            raise TimeoutError(f"rank {rank} waited {timeout.total_seconds():.0f} s for rank 0 to write {path}")
        time.sleep(0.2)
        os.listdir(path.parent)  # NFS looks again for a file that was not there
    host, port = path.read_text().split()
    return dist.TCPStore(host, int(port), world, False, timeout)


def _own_name() -> str:
    """Return a name of this machine that others can look up: SLURM's, if it has an address, else the system's."""
    name = os.environ.get("SLURMD_NODENAME", "")
    try:
        socket.getaddrinfo(name or None, 0)
    except OSError:
        name = ""
    return name or socket.gethostname()
