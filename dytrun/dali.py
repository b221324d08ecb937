"""NVIDIA DALI in the place of the loader processes: it decodes, crops, resizes and augments; dytrun draws.

The same numbers are drawn as for the loader processes (`augment.train_drawer`), in the same order of images; DALI is
handed the bytes of each JPEG and what is to be done to it. What differs is how pixels are resampled and rounded. Where
the device of the rank is a GPU, that decodes and augments too; elsewhere DALI's threads do.

What DALI cannot decode, or could decode otherwise (no JPEG, CMYK), dytrun makes itself, and both are put together.
"""

from collections import deque
from collections.abc import Callable, Hashable, Iterable, Iterator, Sequence
from typing import Any, NamedTuple, Protocol

import torch
from jaxtyping import UInt8
from torch import Tensor

from dytrun.augment import Drawer
from dytrun.dali_graph import Deferred, Look, Pipeline
from dytrun.errors import first_line
from dytrun.images import Picture
from dytrun.pixels import Pixels

# Batches that are under way while one is handed over.
_AHEAD = 2


class Sample(Protocol):
    """What a data set returns for a key."""

    @property
    def pixels(self) -> Pixels | Deferred:
        """The image, or what makes it."""
        ...


class Source(NamedTuple):
    """A data set, twice: with its JPEGs left to DALI, and with every image made by dytrun."""

    deferring: Callable[[Any], Sample]
    making: Callable[[Any], Sample]
    batches: Iterable[Sequence[Hashable]]
    """The keys of each batch."""


def deferring(draw: Drawer, transform: Callable[[Picture], Pixels]) -> Callable[[Picture], Pixels | Deferred]:
    """Make the function that draws what becomes of a JPEG, and has `transform` make of another picture what it would.

    Both draw the same numbers.
    """

    def deferred(picture: Picture) -> Pixels | Deferred:
        if picture.jpeg is None:
            return transform(picture)
        return Deferred(picture.jpeg, draw(picture.height, picture.width))

    return deferred


class DaliLoader:
    """Batches of samples and their images, in order; can be gone through again."""

    def __init__(self, source: Source, look: Look, device: torch.device, threads: int):
        """Build the pipeline, whose `threads` end with the process."""
        self._source, self._look, self._device, self._threads = source, look, device, max(1, threads)
        self._pipeline = self._built()
        self._waiting: deque[tuple[Sequence[Hashable], list[Sample]]] = deque()

    def __iter__(self) -> Iterator[tuple[list[Sample], UInt8[Tensor, "b h w 3"]]]:
        if self._waiting:  # somebody has left in the middle
            self._waiting.clear()
            self._pipeline = self._built()
        for keys in self._source.batches:
            samples = [self._source.deferring(key) for key in keys]
            self._pipeline.begin(_left_to_dali(samples))
            self._waiting.append((keys, samples))
            if len(self._waiting) > _AHEAD:
                yield self._next()
        while self._waiting:
            yield self._next()

    def _built(self) -> "Pipeline":
        return Pipeline(self._look, self._device, self._threads)

    def _next(self) -> tuple[list[Sample], Tensor]:
        keys, samples = self._waiting.popleft()
        try:
            made = self._pipeline.finished()
        except RuntimeError as error:
            samples, made = self._mended(keys, samples, error)
        images = torch.empty((len(samples), self._look.size, self._look.size, 3), dtype=torch.uint8)
        images = images.to(self._device)
        rows = [row for row, sample in enumerate(samples) if isinstance(sample.pixels, Deferred)]
        if made is not None:
            images[rows] = made
        for row in set(range(len(samples))) - set(rows):
            images[row] = torch.from_numpy(samples[row].pixels).to(self._device)
        return samples, images

    def _mended(
        self, keys: Sequence[Hashable], samples: list[Sample], error: RuntimeError
    ) -> tuple[list[Sample], Tensor | None]:
        """Find the images of a batch that DALI cannot decode, one by one, and make them without it."""
        alone = Pipeline(self._look._replace(batch=1), self._device, 1)
        mended = []
        for key, sample in zip(keys, samples, strict=True):
            try:
                alone.begin(_left_to_dali([sample]))
                alone.finished()
            except RuntimeError:
                alone = Pipeline(self._look._replace(batch=1), self._device, 1)
                sample = self._source.making(key)
            mended.append(sample)
        if all(one is other for one, other in zip(mended, samples, strict=True)):
            raise RuntimeError(f"DALI failed, on no image alone: {first_line(error)}") from error
        # A pipeline that has failed does nothing more.
        self._pipeline = self._built()
        for batch in [mended, *(later for _, later in self._waiting)]:
            self._pipeline.begin(_left_to_dali(batch))
        return mended, self._pipeline.finished()


def _left_to_dali(samples: Sequence[Sample]) -> list[Deferred]:
    return [sample.pixels for sample in samples if isinstance(sample.pixels, Deferred)]
