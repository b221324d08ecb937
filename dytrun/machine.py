"""Where a run runs: its devices, threads and loader processes, and what they are called in a result."""

import os
import platform
import subprocess
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path

import torch

import dytrun
from dytrun.config import MachineConfig
from dytrun.errors import UserError
from dytrun.launcher_config import PoolConfig

# On the CPU a rank is a process, for trying out; more of them than this on a core is a typing error.
_RANKS_PER_CORE = 4
# More loader processes for one GPU cost memory and start-up, and no model here trains so fast.
_MOST_WORKERS = 32


def num_gpus() -> int:
    """Number of CUDA devices that this process may use."""
    return torch.cuda.device_count() if torch.cuda.is_available() else 0


def resolve_devices(setting: str | int | list[int]) -> tuple[list[int] | None, int]:
    """Return (CUDA device numbers by local rank, None on the CPU; number of ranks).

    Raises:
        UserError: more devices are asked for than there are, or others than the launcher of this rank has planned.
    """
    world, local = int(os.environ.get("WORLD_SIZE", "0")), _local_world()
    here = num_gpus()
    asked = len(setting) if isinstance(setting, list) else local if setting == "auto" else int(setting)
    if world and asked != local:
        raise UserError(
            f"machine.devices: {setting}, but {local} rank(s) were started on this machine; leave it auto, and let "
            "the launcher say how many"
        )
    if here == 0:
        if isinstance(setting, list):
            raise UserError(
                f"machine.devices: {setting} names GPUs, but there is none here; say auto, or a number of ranks"
            )
        if asked > _RANKS_PER_CORE * cores():
            raise UserError(
                f"machine.devices: {asked} ranks are too many for the {cores()} core(s) here, and there is no GPU; "
                f"lower it to {_RANKS_PER_CORE * cores()} or less, or say auto"
            )
        return None, world or asked
    numbers = setting if isinstance(setting, list) else list(range(here if setting == "auto" else int(setting)))
    if any(number >= here for number in numbers):
        raise UserError(f"machine.devices: {setting} is more than the {here} GPU(s) here; lower it or say auto")
    # SLURM may show each rank all GPUs of its node, or its own alone.
    if world and local > len(numbers) and not (len(numbers) == 1 and "SLURM_LOCALID" in os.environ):
        raise UserError(f"machine.devices: {local} ranks share {len(numbers)} GPU(s); start one rank a GPU")
    return numbers, world or len(numbers)


@dataclass(frozen=True)
class Slot:
    """A part of this machine that one job of a pool has for itself."""

    cores: frozenset[int]
    gpus: tuple[str, ...]
    """As CUDA_VISIBLE_DEVICES names them; empty on the CPU."""

    def __str__(self) -> str:
        numbers = ",".join(self.gpus or map(str, sorted(self.cores)))
        return f"{'GPU' if self.gpus else 'core'} {numbers}"


def slots(pool: PoolConfig) -> list[Slot]:
    """Divide this machine's GPUs and cores among the jobs of a pool.

    Raises:
        UserError: the machine has less than is asked for.
    """
    mine = sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else list(range(cores()))
    shown = os.environ.get("CUDA_VISIBLE_DEVICES", "")
    names = [name.strip() for name in shown.split(",")][: num_gpus()] if shown else list(map(str, range(num_gpus())))
    by_gpu = len(names) // pool.gpus_per_job if names else len(mine)
    by_core = len(mine) // pool.cores_per_job if pool.cores_per_job != "auto" else len(mine)
    most = min(by_gpu, by_core)
    count = most if pool.jobs == "auto" else pool.jobs
    what = f"{len(names)} GPU(s) and {len(mine)} core(s)" if names else f"{len(mine)} core(s) and no GPU"
    if pool.gpus_per_job > 1 and not names:
        raise UserError(f"hydra.launcher.gpus_per_job: {pool.gpus_per_job}, but there is no GPU here; leave it out")
    if not 0 < count <= most:
        key = "jobs" if pool.jobs != "auto" else "gpus_per_job" if by_gpu == 0 else "cores_per_job"
        raise UserError(
            f"hydra.launcher.{key}: {max(count, 1)} job(s) at a time do not fit; here are {what}, and a job takes "
            f"{f'{pool.gpus_per_job} GPU(s) and ' if names else ''}"
            f"{1 if pool.cores_per_job == 'auto' else pool.cores_per_job} core(s) or more; lower one of them"
        )
    share = len(mine) // count if pool.cores_per_job == "auto" else pool.cores_per_job
    return [
        Slot(
            frozenset(mine[job * share : (job + 1) * share]),
            tuple(names[job * pool.gpus_per_job : (job + 1) * pool.gpus_per_job]),
        )
        for job in range(count)
    ]


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
        torch.set_num_threads(max(1, cores() // _local_world() - worker_count(machine.workers, device)))


def worker_count(setting: str | int, device: torch.device) -> int:
    """Return the number of loader processes for this rank, from its share of the machine's cores.

    Where a GPU computes, all but the one that the rank itself needs, and no more than 32; else a quarter of them. A
    rank that has one core, and computes on it, loads its images itself: a process would only take turns with it.
    """
    if setting != "auto":
        return int(setting)
    share = max(1, cores() // _local_world())
    if device.type == "cuda":
        return max(1, min(_MOST_WORKERS, share - 1))
    return 0 if share == 1 else max(1, share // 4)


def loader_name(loader: str) -> str:
    """Name what loads the images, DALI with its version.

    Raises:
        UserError: it is DALI, and that is not installed.
    """
    if loader == "torch":
        return loader
    found = [one.version for one in metadata.distributions() if (one.name or "").startswith("nvidia-dali-cuda")]
    if not found:
        raise UserError(
            "machine.loader: dali is not installed here; pip install 'dytrun[dali]', or say machine.loader=torch"
        )
    return f"{loader} {found[0]}"


def check_loader(loader: str, data: str, is_in_files: bool) -> None:
    """Refuse DALI where it is not installed, or the images of `data` are in memory.

    Raises:
        UserError: says which.
    """
    loader_name(loader)
    if loader != "torch" and not is_in_files:
        raise UserError(f"machine.loader: {loader} decodes JPEG files, and data={data} is in memory; leave it torch")


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


def cores() -> int:
    """Number of cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _local_world() -> int:
    return int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
