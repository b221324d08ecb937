"""Types and bounds of what a sweep is launched with: `hydra/launcher=local_pool` and `hydra/launcher=slurm`.

A line break in a field of SLURM's would end its `#SBATCH` line and begin a command, because submitit 1.5 only quotes
values, and keys not at all: so every field that reaches the batch script is held to plain characters.
"""

from collections.abc import Mapping
from typing import Annotated, Any, Literal, TypeVar

from pydantic import BaseModel, Field, create_model, model_validator

from dytrun.norm_config import STRICT, Count
from dytrun.validation import validate

Settings = TypeVar("Settings", bound=BaseModel)

# What names of partitions, nodes, constraints, resources and mail addresses are made of; nothing that a shell reads.
PLAIN = r"^[A-Za-z0-9_.,:=+@%/&|!()\[\]* -]{1,200}$"
Plain = Annotated[str, Field(pattern=PLAIN)]
# A line of shell, by its purpose; what it may not be is two.
ShellLine = Annotated[str, Field(pattern=r"^[^\x00-\x1f\x7f]+$")]
FlagName = Annotated[str, Field(pattern=r"^[A-Za-z0-9-]+$")]

# sbatch flags that dytrun or submitit sets, or that have a field of their own.
_OWN_FLAGS = (
    "account", "array", "chdir", "comment", "constraint", "cpus-per-gpu", "cpus-per-task", "error", "exclude", "gpus",
    "gpus-per-node", "gpus-per-task", "gres", "job-name", "mem", "mem-per-cpu", "mem-per-gpu", "no-requeue", "nodes",
    "ntasks", "ntasks-per-node", "open-mode", "output", "partition", "qos", "requeue", "signal", "time", "wrap",
)  # fmt: skip


class PoolConfig(BaseModel):
    """`hydra/launcher=local_pool`."""

    model_config = STRICT
    jobs: Literal["auto"] | Count
    """Runs at a time."""
    gpus_per_job: Count
    """Where there are GPUs."""
    cores_per_job: Literal["auto"] | Count


class SlurmConfig(BaseModel):
    """`hydra/launcher=slurm`: what submitit's SLURM launcher takes, and a bound on starts after a crash."""

    model_config = STRICT
    name: Plain
    partition: Plain | None
    account: Plain | None
    qos: Plain | None
    constraint: Plain | None
    exclude: Plain | None
    gres: Plain | None
    comment: Plain | None
    timeout_min: Count
    """Wall time of a job, minutes."""
    nodes: Count
    tasks_per_node: Count | None
    """Ranks on a node; null: one a GPU, or one."""
    gpus_per_node: Count | None
    gpus_per_task: Count | None
    cpus_per_task: Count | None
    cpus_per_gpu: Count | None
    mem_gb: Count | None
    mem_per_gpu: Plain | None
    mem_per_cpu: Plain | None
    array_parallelism: Count
    signal_delay_s: Count
    """Seconds between SLURM's warning and the end of the wall time."""
    max_num_timeout: Annotated[int, Field(ge=0)]
    """Starts after the wall time ended one."""
    max_restarts: Annotated[int, Field(ge=0, le=100)]
    """Starts after a crash."""
    stderr_to_stdout: bool
    setup: list[ShellLine]
    """Lines of shell before the ranks start."""
    additional_parameters: dict[FlagName, Plain | bool | int | float]
    """More flags of sbatch, without their dashes."""

    @property
    def ranks_per_node(self) -> int:
        """Number of tasks on a node."""
        return self.tasks_per_node or (1 if self.gpus_per_task else self.gpus_per_node) or 1

    @model_validator(mode="after")
    def _parts_fit(self) -> "SlurmConfig":
        problems = []
        if 60 * self.timeout_min <= self.signal_delay_s:
            problems.append(
                f"hydra.launcher.signal_delay_s: the warning {self.signal_delay_s} s before the end of a job of "
                f"{self.timeout_min} min would come at its start; raise timeout_min or lower signal_delay_s"
            )
        if self.gpus_per_task is not None and self.gpus_per_node is not None:
            problems.append("hydra.launcher.gpus_per_task: gpus_per_node says it already; give one of them")
        if self.gpus_per_task not in (None, 1):
            problems.append(
                f"hydra.launcher.gpus_per_task: {self.gpus_per_task}, but a rank uses one GPU; say tasks_per_node"
            )
        if self.gpus_per_node is not None and self.ranks_per_node != self.gpus_per_node:
            problems.append(
                f"hydra.launcher.tasks_per_node: {self.ranks_per_node} ranks for {self.gpus_per_node} GPUs on a node; "
                "a rank uses one GPU, so leave it null or make them equal"
            )
        if self.gres is not None and "gpu" in self.gres and not (self.gpus_per_node or self.tasks_per_node):
            problems.append(
                f"hydra.launcher.gres: {self.gres} does not say how many ranks; ask for GPUs by gpus_per_node, or set "
                "tasks_per_node"
            )
        for name in self.additional_parameters:
            # sbatch takes a flag for any that begins so.
            if taken := [flag for flag in _OWN_FLAGS if flag.startswith(name.lower())]:
                problems.append(
                    f"hydra.launcher.additional_parameters: {name} would be {taken[0]}, which is set by dytrun or "
                    "has a field of its own; leave it out"
                )
        if problems:
            raise ValueError("\n".join(problems))
        return self


def checked(schema: type[Settings], values: Mapping[str, Any]) -> Settings:
    """Turn the settings of hydra.launcher into a typed configuration.

    Raises:
        UserError: all that is wrong at once, each problem with its dotted path.
    """
    inner = create_model("Hydra", launcher=(schema, ...))
    outer: Any = create_model("CommandLine", hydra=(inner, ...))
    return validate(outer, {"hydra": {"launcher": values}}).hydra.launcher
