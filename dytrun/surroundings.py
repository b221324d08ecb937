"""What a run is given to train with."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

from dytrun.batch import Batch
from dytrun.checkpoint import Store
from dytrun.distributed import Place
from dytrun.optim import Plan
from dytrun.throughput import Clock


@dataclass(frozen=True)
class Surroundings:
    """What a run is given: its plan, its place, its images, its checkpoints."""

    plan: Plan
    place: Place
    clock: Clock
    train: Iterator[Batch]
    val: Callable[[], Iterator[Batch]]
    num_val: int
    store: Store
    sites: list[str]
    """Names of the norms, which probes look at."""
    stopped_by: Callable[[], str] = lambda: ""
    """The signal that has told this rank to stop; empty as long as none has."""
    beat: Callable[[int, str], None] = lambda step, what: None
    """Told at every part of a step, so that a run that hangs can be told from one that works."""
    num_train: int = 0
    facts: dict[str, Any] = field(default_factory=dict)
    """What every checkpoint holds besides: data and build, to compare when the run is taken up again."""
