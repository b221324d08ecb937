"""Where a run runs: its devices, threads and loader processes, and what they are called in a result."""

import os
import platform
import subprocess
from pathlib import Path

import torch

import dytrun
from dytrun.config import MachineConfig
from dytrun.errors import UserError


def resolve_devices(setting: str | int | list[int]) -> tuple[list[int] | None, int]:
    """Return (CUDA device numbers by local rank, None on the CPU; number of ranks).

    Raises:
        UserError: more devices are asked for than there are.
    """
    world = int(os.environ.get("WORLD_SIZE", "0"))
    here = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if here == 0:
        if isinstance(setting, list):
            raise UserError(
                f"machine.devices: {setting} names GPUs, but there is none here; say auto, or a number of ranks"
            )
        return None, world or (1 if setting == "auto" else int(setting))
    numbers = list(range(here)) if setting == "auto" else list(range(setting)) if isinstance(setting, int) else setting
    if any(number >= here for number in numbers):  # pyright: ignore[reportOperatorIssue]
        raise UserError(f"machine.devices: {setting} is more than the {here} GPU(s) here; lower it or say auto")
    return numbers, world or len(numbers)  # pyright: ignore[reportReturnType]


def prepare_torch(machine: MachineConfig, device: torch.device) -> None:
    """Set what torch keeps for a process: precision of float32 products, threads, determinism."""
    # The reference trains its float32 in TF32 (main.py); on the CPU this changes nothing.
    torch.set_float32_matmul_precision("high")
    torch.backends.cudnn.benchmark = not machine.deterministic
    if machine.deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # else cuBLAS refuses to be deterministic
    torch.use_deterministic_algorithms(machine.deterministic)
    if device.type == "cpu" and "OMP_NUM_THREADS" not in os.environ:
        # A thread too many costs more than it brings: it waits for the core that a loader process is on.
        torch.set_num_threads(max(1, _cores() // _local_world() - worker_count(machine.workers, device)))


def worker_count(setting: str | int, device: torch.device) -> int:
    """Return the number of loader processes for this rank: all cores where a GPU computes, else a quarter of them."""
    if setting != "auto":
        return int(setting)
    cores = _cores() // _local_world()
    return max(1, min(16, cores) if device.type == "cuda" else cores // 4)


def device_name(device: torch.device) -> str:
    """Name the GPU, or the processor and the threads in use."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    model = platform.processor() or platform.machine()
    if Path("/proc/cpuinfo").is_file():
        names = [row for row in Path("/proc/cpuinfo").read_text().splitlines() if row.startswith("model name")]
        model = names[0].partition(": ")[2] if names else model
    return f"CPU {model}, {torch.get_num_threads()} thread(s)"


def commit() -> tuple[str | None, bool | None]:
    """Return (commit, dirty) of dytrun's own checkout; nothing for an installed package."""
    root = Path(dytrun.__file__).parents[1]
    if not (root / "pyproject.toml").is_file():
        return None, None
    try:
        head, status = (
            subprocess.run(
                ["git", "-C", str(root), *args], capture_output=True, text=True, check=True, timeout=10
            ).stdout
            for args in (["rev-parse", "HEAD"], ["status", "--porcelain"])
        )
    except (OSError, subprocess.SubprocessError):
        return None, None
    return head.strip(), bool(status.strip())


def _cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _local_world() -> int:
    return int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
