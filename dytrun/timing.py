"""The stopwatch of the benchmarks: device time, launches, what is kept for the backward pass, memory.

On CUDA the device is kept busy first, so that the host is ahead of it and what is timed is the device, not Python; what
the host needs is measured apart. On a CPU there is one clock.
"""

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from itertools import pairwise
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks
from torch.utils._python_dispatch import TorchDispatchMode

# Of the clock that torch.cuda._sleep counts, in thousands a second: no GPU's is faster.
_CYCLES_PER_MS = 2_000_000
# Inputs rotate through so much memory that they are not in a cache when their turn comes; an H200's L2 has 60 MB.
_COLD_BYTES = {"cuda": 256 * 2**20, "cpu": 64 * 2**20}


def spans_ms(
    device: torch.device, parts: Callable[[Callable[[], None]], None], calls: int, lead_ms: float = 0.0
) -> np.ndarray:
    """Do something `calls` times and time its parts.

    Args:
        device: that it runs on.
        parts: does it once; it is given `mark`, and calls it at the start, between parts, and at the end.
        calls: how often.
        lead_ms: on CUDA, how long the device is kept from beginning; about what the host needs to issue all of it.

    Returns:
        Milliseconds, (calls, parts).
    """
    marks: list[list[Any]] = []
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        torch.cuda._sleep(int(lead_ms * _CYCLES_PER_MS))
    for _ in range(calls):
        marks.append([])
        parts(lambda: marks[-1].append(now(device)))
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        return np.array([[a.elapsed_time(b) for a, b in pairwise(row)] for row in marks])
    return np.diff(1e3 * np.array(marks, dtype=float), axis=1)


def now(device: torch.device) -> Any:
    """Return a point in time: an event on CUDA's stream, or seconds."""
    if device.type != "cuda":
        return time.perf_counter()
    event = torch.cuda.Event(enable_timing=True)
    event.record()
    return event


def host_ms(device: torch.device, call: Callable[[], object]) -> float:
    """Milliseconds that the host needs for a call, from an idle device on; it does not wait for the device's end."""
    settle(device)
    passed = wall_ms(call)
    settle(device)
    return passed


def wall_ms(call: Callable[[], object]) -> float:
    """Milliseconds of a call, on this process's clock."""
    start = time.perf_counter()
    call()
    return 1e3 * (time.perf_counter() - start)


def settle(device: torch.device) -> None:
    """Wait until a device has nothing left to do."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def cold_copies(nbytes: int, device: torch.device) -> int:
    """How many inputs of that size take turns, so that none is found in a cache."""
    return max(2, -(-_COLD_BYTES[device.type] // max(1, nbytes)))


@contextmanager
def _watched() -> Iterator[dict[int, int]]:
    """Collect {address: bytes} of the memory that autograd keeps for the backward pass."""
    kept: dict[int, int] = {}

    def note(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with saved_tensors_hooks(note, lambda tensor: tensor):
        yield kept


def saved_bytes(forward: Callable[[], object], besides: Sequence[Tensor]) -> int:
    """Bytes that a forward pass keeps for the backward pass, without those of `besides` (the parameters)."""
    with _watched() as kept:
        result = forward()
    own = {tensor.untyped_storage().data_ptr() for tensor in besides}
    del result
    return sum(size for address, size in kept.items() if address not in own)


class _Operators(TorchDispatchMode):
    """Counts the operators that read or write memory; views and allocations are none."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.overloadpacket.__name__
        self.count += not (func.is_view or name.startswith(("empty", "new_empty", "detach", "_unsafe_view")))
        return func(*args, **(kwargs or {}))


def launches(device: torch.device, call: Callable[[], object]) -> int:
    """Kernels that a call launches on CUDA; operators that it calls on a CPU, where a C++ op of ours is not one."""
    if device.type != "cuda":
        with _Operators() as seen:
            call()
        return seen.count
    from torch.profiler import ProfilerActivity, profile

    settle(device)
    with profile(activities=[ProfilerActivity.CUDA]) as seen:
        call()
        settle(device)
    return sum(1 for event in seen.events() or [] if event.device_type == torch.autograd.DeviceType.CUDA)
