"""torch.compile for an H200 that is only described: what it writes, and what that would launch.

Dynamo, AOTAutograd, inductor's scheduler and its Triton code generation run for real, on fake tensors; no kernel is
compiled or started, and no driver is asked. A GPU of this machine is hidden.
"""

import contextlib
import heapq
import itertools
import os
import re
import types
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from typing import Any, ClassVar, NamedTuple
from unittest import mock

import torch
from torch import Tensor
from torch._dynamo.device_interface import CudaInterface
from torch._inductor import config
from torch._inductor.async_compile import AsyncCompile
from torch._inductor.fx_passes.joint_graph import UniformValueConstantFolder
from torch._inductor.graph import GraphLowering
from torch._inductor.scheduler import ExternKernelSchedulerNode
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from triton.backends.compiler import GPUTarget
from triton.runtime.driver import driver

DEVICE = "cuda:0"
H200 = types.SimpleNamespace(
    name="NVIDIA H200", major=9, minor=0, multi_processor_count=132, warp_size=32, regs_per_multiprocessor=65536,
    max_threads_per_multi_processor=2048, max_threads_per_block=1024, total_memory=150 * 10**9,
    shared_memory_per_block=48 * 2**10, shared_memory_per_block_optin=227 * 2**10,
    shared_memory_per_multiprocessor=228 * 2**10, L2_cache_size=60 * 2**20,
)  # fmt: skip


class Launch(NamedTuple):
    """One kernel that a wrapper would have started, with the tensors that it reads and writes."""

    name: str
    reads: tuple[Tensor, ...]
    writes: tuple[Tensor, ...]


class Graph(NamedTuple):
    """What inductor made of one graph."""

    wrapper: str
    counted: int
    """Bytes by inductor's accounting, matrix products left out."""
    launches: list[Launch]
    """Empty until the wrapper has run."""


@contextlib.contextmanager
def described(graphs: list[Graph]) -> Iterator[None]:
    """Let torch.compile write code for the H200 described above; what it makes of each graph goes to `graphs`.

    Inside, tensors are fake. torch's own CUDA state is left alone: it keeps saying that there is no GPU, since it would
    ask the driver for streams and generators; dynamo's and inductor's view of CUDA is what is replaced.
    """
    os.environ["CUDA_VISIBLE_DEVICES"] = ""
    assert not torch.cuda.is_available(), "CUDA was initialized before the GPU could be hidden"
    driver.set_active(types.SimpleNamespace(get_current_target=lambda: GPUTarget("cuda", 90, 32)))
    load, deduce = GraphLowering._compile_to_module_lines, UniformValueConstantFolder._deduce_value
    with contextlib.ExitStack() as stack:
        for owner, name, value in [
            *((CudaInterface, name, staticmethod(value)) for name, value in _interface().items()),
            *((torch.cuda, name, _interface()[name]) for name in _IN_TORCH_CUDA),
            (CudaInterface.Worker, "get_device_properties", staticmethod(_interface()["get_device_properties"])),
            (torch._C, "_cuda_getCurrentRawStream", _zero()),
            (torch._C._dynamo.guards, "_empty_strided_cuda", _empty),
            (torch._C._dynamo.guards, "_reinterpret_tensor", torch.as_strided),
            (torch.cuda, "_exchange_device", _zero()),
            (torch.cuda, "_maybe_exchange_device", _zero()),
            (torch.autograd, "grad", gradients),
            (AsyncCompile, "triton", _Kernel),
            (AsyncCompile, "wait", _zero()),
            (GraphLowering, "_compile_to_module_lines", lambda *args: _watched(load, graphs, *args)),
            (UniformValueConstantFolder, "_deduce_value", lambda *args: _on_cpu(deduce, *args)),
        ]:
            stack.enter_context(mock.patch.object(owner, name, value))
        stack.enter_context(config.patch(force_disable_caches=True, compile_threads=1))
        stack.enter_context(warnings.catch_warnings())
        warnings.filterwarnings("ignore", message="Accessing the data pointer of FakeTensor")
        warnings.filterwarnings("ignore", message="dynamo_pgo force disabled")
        stack.enter_context(FakeTensorMode())
        yield


_IN_TORCH_CUDA = ("get_device_properties", "current_device", "set_device")


def _interface() -> dict[str, Callable[..., Any]]:
    """Answer what is asked about a GPU; a new function for each question, which dynamo tells apart by identity."""
    return {
        "is_available": lambda: True,
        "is_bf16_supported": lambda including_emulation=False: True,
        "get_device_properties": lambda device=None: H200,
        "get_compute_capability": lambda device=None: 90,
        "device_count": lambda: 1,
        **{name: _zero() for name in ("current_device", "set_device", "synchronize", "get_raw_stream",
                                      "exchange_device", "maybe_exchange_device")},
    }  # fmt: skip


def _zero() -> Callable[..., int]:
    return lambda *_: 0


def _empty(size: tuple[int, ...], stride: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    return torch.empty_strided(size, stride, dtype=dtype, device=DEVICE)


def _on_cpu(deduce: Callable[..., Any], folder: Any, node: torch.fx.Node) -> Any:
    """Learn the value of a constant as inductor does, from a real tensor of one element, but where there is memory."""
    kwargs = node.kwargs
    if "device" in kwargs:
        node.kwargs = {**kwargs, "device": torch.device("cpu")}
    try:
        return deduce(folder, node)
    finally:
        node.kwargs = kwargs


def _watched(load: Callable[..., Any], graphs: list[Graph], lowering: Any, code: Any) -> Any:
    """Load a wrapper as inductor does; when it runs, its launches are written down."""
    nodes = [node for node in lowering.scheduler.nodes if not isinstance(node, ExternKernelSchedulerNode)]
    graph = Graph(code.value, sum(node.get_read_write_buffers_sizes() for node in nodes), [])
    graphs.append(graph)
    module = load(lowering, code)
    run = module.call

    def call(args: list[Any]) -> Any:
        with _Record(graph.launches):
            return run(args)

    module.call = call
    return module


class _Record(TorchDispatchMode):
    """Writes down the ATen kernels that a wrapper calls, and takes the Triton ones from `_Kernel`."""

    current: ClassVar[list[Launch]] = []
    """Of the wrapper that runs."""

    def __init__(self, launches: list[Launch]):
        super().__init__()
        self.launches = launches

    def __enter__(self) -> "_Record":
        _Record.current = self.launches
        return super().__enter__()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        name = func.overloadpacket.__name__
        written = tuple(leaf for leaf in tree_leaves(result) if isinstance(leaf, Tensor))
        if written and not func.is_view and not name.startswith("empty"):
            read = tuple(leaf for leaf in tree_leaves(args) if isinstance(leaf, Tensor))
            self.launches.append(Launch(name, read, written))
        return result


class _Kernel:
    """Stands in for a Triton kernel; the names of its pointers say what it reads and what it writes."""

    def __init__(self, name: str, source: str, device_str: str = "cuda"):
        self.name = name
        declared = re.search(rf"^def {name}\((.*)\):$", source, re.MULTILINE)
        assert declared is not None
        self.pointers = [parameter.split(":")[0].strip() for parameter in declared[1].split(",")]

    def run(self, *args: Any, stream: int) -> None:
        tensors = [(name, t) for name, t in zip(self.pointers, args, strict=False) if isinstance(t, Tensor)]
        assert all(name.startswith(("in_ptr", "out_ptr", "in_out_ptr", "ws_ptr")) for name, _ in tensors), tensors
        reads = tuple(t for name, t in tensors if name.startswith("in_"))
        writes = tuple(t for name, t in tensors if not name.startswith("in_ptr"))
        _Record.current.append(Launch(self.name, reads, writes))


def gradients(outputs: Any, inputs: Any, grad_outputs: Any = None, **_: Any) -> tuple[Tensor | None, ...]:
    """Do what torch.autograd.grad does, without its engine, which asks the driver for streams where there is none.

    Nodes run in the engine's order, the youngest that is ready first; gradients are summed over broadcast axes and cast
    to what a node has given out, as the engine does.
    """
    ends = [torch.autograd.graph.get_gradient_edge(output) for output in outputs]
    wanted = [torch.autograd.graph.get_gradient_edge(given) for given in inputs]
    waiting = _users([end.node for end in ends])
    arrived: dict[Any, dict[int, Tensor]] = {}

    def give(node: Any, slot: int, gradient: Tensor) -> None:
        meta = node._input_metadata[slot]
        if gradient.shape != meta.shape:
            gradient = gradient.sum_to_size(meta.shape)
        gradient = gradient.to(meta.dtype)
        slots = arrived.setdefault(node, {})
        slots[slot] = slots[slot] + gradient if slot in slots else gradient

    for end, gradient in zip(ends, grad_outputs, strict=True):
        give(end.node, end.output_nr, gradient)
    order = itertools.count()
    starts = dict.fromkeys(end.node for end in ends)
    ready = [(-node._sequence_nr(), next(order), node) for node in starts if not waiting[node]]
    heapq.heapify(ready)
    with torch.no_grad():
        while ready:
            node = heapq.heappop(ready)[2]
            for (user, slot), gradient in zip(node.next_functions, _run(node, arrived.get(node)), strict=True):
                if user is None:
                    continue
                if gradient is not None:
                    give(user, slot, gradient)
                waiting[user] -= 1
                if not waiting[user]:
                    heapq.heappush(ready, (-user._sequence_nr(), next(order), user))
    return tuple(arrived.get(edge.node, {}).get(edge.output_nr) for edge in wanted)


def _users(starts: list[Any]) -> Counter[Any]:
    """Count, for each node of a graph, the edges that lead to it."""
    found, stack, seen = Counter(), list(starts), set()
    while stack:
        node = stack.pop()
        if node in seen:
            continue
        seen.add(node)
        following = [user for user, _ in node.next_functions if user is not None]
        found.update(following)
        stack.extend(following)
    return found


def _run(node: Any, slots: dict[int, Tensor] | None) -> tuple[Tensor | None, ...]:
    if not slots or not node.next_functions:
        return (None,) * len(node.next_functions)
    given = [slots.get(slot) for slot in range(len(node._input_metadata))]
    result = node.apply(*given) if isinstance(node, torch.autograd.function.BackwardCFunction) else node(*given)
    return result if isinstance(result, tuple) else (result,)
