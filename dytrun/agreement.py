"""What all ranks know together of each step: its loss, whether it may change the weights, who wants to stop or to save.

One all-reduce a step carries it. On the CPU it is read at once, before the optimizer's step. On CUDA it is read two
steps later, on every rank for the same step, so that the host runs ahead of the device; until then the device itself
holds the weights: from a bad step on, no optimizer step changes anything.
"""

import collections
import math
from statistics import median
from typing import NamedTuple

import torch
from torch import Tensor

from dytrun.distributed import all_sum

# Steps between the issue of a step on CUDA and the reading of its numbers.
LAG = 2
# A loss this many robust standard deviations above the median of the last ones is a spike.
SPIKE_Z, _HISTORY, _ENOUGH = 10.0, 128, 32
# A median's own uncertainty, in shares of it: a very even loss has hardly any deviation.
_LEAST_SIGMA = 0.01


class Diverged(Exception):
    """A loss or a gradient was not finite, or a spike at which to stop; the weights are those before that step."""

    def __init__(self, message: str, step: int, samples: list[list[int]], numbers: dict[str, float]):
        """Take the bad step, this rank's image indices of each micro-batch, and its loss and gradient norm."""
        super().__init__(message)
        self.step, self.samples, self.numbers = step, samples, numbers


class Interrupted(Exception):
    """Told to stop by a signal to any rank, on every rank alike; says where the run can be taken up again."""


class Wishes(NamedTuple):
    """What one rank brings into a step besides its loss."""

    stop: bool
    save: bool
    substituted: int
    """Training images of this step that could not be read."""
    unknown: int
    """Of those, the ones that this rank did not know of."""


class Verdict(NamedTuple):
    """A step, the same on every rank."""

    step: int
    loss: float
    grad_norm: float
    is_good: bool
    """False where the loss or a gradient is not finite, or the loss is a spike at which to stop."""
    is_spike: bool
    stop: bool
    save: bool
    substituted: int
    unknown: int


class Agreement:
    """Judges the steps of one rank, together with the other ranks."""

    def __init__(self, device: torch.device, lag: int, losses: list[float]):
        """Take the losses of the last steps as `history` gives them; `lag` is 0 where the host may wait."""
        self._lag = lag
        self._losses = collections.deque(losses, maxlen=_HISTORY + LAG)
        self._waiting: collections.deque[tuple[int, Tensor, torch.cuda.Event | None, float]] = collections.deque()
        self.is_bad = torch.zeros((), device=device)
        """1 on the device from the first bad step on."""

    @property
    def history(self) -> list[float]:
        """The last losses, for a checkpoint; complete after `take(everything=True)`."""
        return list(self._losses)

    def agree(self, loss: Tensor, wishes: Wishes) -> Tensor:
        """Return (loss summed over the ranks, number of ranks that wish to stop, …) on the device: one all-reduce."""
        mine = torch.zeros(1 + len(wishes), device=loss.device)
        mine[0] = loss
        for place, wish in enumerate(wishes, 1):
            if wish:
                mine[place].fill_(float(wish))  # from the host without waiting for the device
        return all_sum(mine)

    def put(self, step: int, loss: Tensor, counts: Tensor, norms: tuple[Tensor, bool], stop_at_spike: bool) -> None:
        """Judge a step on the device.

        Args:
            step: its number, from 0.
            loss: mean over the ranks.
            counts: the rest of what `agree` returned.
            norms: gradient norm, and whether it must be finite.
            stop_at_spike: whether a spike is bad.
        """
        grad_norm, must_be_finite = norms
        limit = self._limit()
        is_good = torch.isfinite(loss)
        if must_be_finite:
            is_good = is_good & torch.isfinite(grad_norm)
        if stop_at_spike:
            is_good = is_good & (loss <= limit)
        self.is_bad = torch.where(is_good, self.is_bad, 1.0)
        numbers = torch.cat([loss.reshape(1), grad_norm.reshape(1).float(), is_good.reshape(1).float(), counts])
        event = None
        if numbers.device.type == "cuda":
            pinned = torch.empty(numbers.shape, dtype=numbers.dtype, pin_memory=True)
            numbers = pinned.copy_(numbers, non_blocking=True)
            event = torch.cuda.Event()
            event.record()
        self._waiting.append((step, numbers, event, limit))

    def take(self, everything: bool = False) -> list[Verdict]:
        """Return the steps that are due to be read, in order; `everything` waits for the device."""
        found = []
        while len(self._waiting) > (0 if everything else self._lag):
            step, numbers, event, limit = self._waiting.popleft()
            if event is not None:
                event.synchronize()
            loss, grad_norm, is_good, stop, save, substituted, unknown = numbers.tolist()
            self._losses.append(loss)
            found.append(Verdict(step, loss, grad_norm, bool(is_good), loss > limit, stop > 0, save > 0,
                                 int(substituted), int(unknown)))  # fmt: skip
        return found

    def _limit(self) -> float:
        """Return the loss above which the coming step is a spike: from losses that are known at any lag."""
        known = list(self._losses)
        # The newest ones may be known or not, on CUDA; to be the same when taken up again they are left out.
        known = known[: len(known) - max(0, self._lag - len(self._waiting))][-_HISTORY:]
        known = [loss for loss in known if math.isfinite(loss)]
        if len(known) < _ENOUGH:
            return math.inf
        middle = median(known)  # of so few numbers in a tenth of NumPy's time
        sigma = 1.4826 * median([abs(loss - middle) for loss in known])
        return middle + SPIKE_Z * max(sigma, _LEAST_SIGMA * abs(middle))
