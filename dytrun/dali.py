"""NVIDIA DALI in the place of the loader processes: it decodes, crops, resizes and augments; dytrun draws.

The same numbers are drawn as for the loader processes (`augment.train_drawer`), in the same order of images; DALI is
handed the bytes of each JPEG and what is to be done to it. What differs is how pixels are resampled and rounded. Where
the device of the rank is a GPU, that decodes and augments too; elsewhere DALI's threads do.

What DALI cannot decode, or could decode otherwise (no JPEG, CMYK), dytrun makes itself, and both are put together.
"""

from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from dytrun.augment import Deferred
from dytrun.dali_graph import Look, Pipeline

# Batches that are under way while one is handed over.
_AHEAD = 2


class DaliLoader:
    """Keys of batches → batches, in order; can be gone through again."""

    def __init__(
        self,
        images: tuple[Any, Any],
        batches: Iterable[Sequence[Any]],
        collate: Callable[[list, Tensor], Any],
        look: Look,
        place: tuple[torch.device, int],
    ):
        """Take what makes, or draws, the images.

        Args:
            images: two data sets, key → sample, whose `pixels` is `Deferred` or an image in one, an image in the other.
            batches: the keys of each.
            collate: makes a batch of its samples and their images (B, H, W, 3), in 8 bits on the device.
            look: of the images.
            place: device, and DALI's threads.
        """
        self._deferring, self._making = images
        self._batches, self._collate, self._look, self._place = batches, collate, look, place
        self._largest = 0
        self._pipeline: Pipeline | None = None
        self._waiting: deque[tuple[Sequence[Any], list]] = deque()

    def __iter__(self) -> Iterator[Any]:
        if self._waiting:  # somebody has left in the middle
            self._waiting.clear()
            self._pipeline = None
        for keys in self._batches:
            samples = [self._deferring[key] for key in keys]
            self._begin(samples)
            self._waiting.append((keys, samples))
            if len(self._waiting) > _AHEAD:
                yield self._next()
        while self._waiting:
            yield self._next()

    def _begin(self, samples: list) -> None:
        """Begin a batch; the first one is the largest."""
        if self._pipeline is None:
            self._largest = max(self._largest, len(samples))
            self._pipeline = Pipeline(self._look, self._largest, _AHEAD + 1, self._place)
        self._pipeline.begin([sample.pixels for sample in samples if isinstance(sample.pixels, Deferred)])

    def _next(self) -> Any:
        assert self._pipeline is not None
        try:
            made = self._pipeline.finished()
        except RuntimeError as error:
            made = self._mended(error)
        _, samples = self._waiting.popleft()
        if made is not None and len(made) == len(samples):
            return self._collate(samples, made)
        size, device = self._look.size, self._place[0]
        images = torch.empty((len(samples), size, size, 3), dtype=torch.uint8, device=device)
        is_left = torch.tensor([isinstance(sample.pixels, Deferred) for sample in samples], device=device)
        if made is not None:
            images[is_left] = made
        for row, sample in enumerate(samples):
            if not isinstance(sample.pixels, Deferred):
                images[row] = torch.from_numpy(sample.pixels).to(device)
        return self._collate(samples, images)

    def _mended(self, error: RuntimeError) -> Tensor | None:
        """Find the images that DALI cannot decode, one by one, make them without it, and begin anew.

        DALI does not say of which batch they are, and a pipeline that has failed does nothing more.
        """
        self._pipeline, num_bad = None, 0
        for keys, samples in self._waiting:
            for row, key in enumerate(keys):
                if not self._can_be_made(samples[row]):
                    samples[row] = self._making[key]
                    num_bad += 1
        if num_bad == 0:
            raise RuntimeError(f"DALI failed, though on none of the images alone: {error}") from error
        for _, samples in self._waiting:
            self._begin(samples)
        assert self._pipeline is not None
        return self._pipeline.finished()

    def _can_be_made(self, sample: Any) -> bool:
        if not isinstance(sample.pixels, Deferred):
            return True
        alone = Pipeline(self._look, 1, 1, (self._place[0], 1))
        alone.begin([sample.pixels])
        try:
            alone.finished()
        except RuntimeError:
            return False
        return True
