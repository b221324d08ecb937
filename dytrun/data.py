"""Loaders: which image, in which order, on which rank.

Order and randomness are functions, not states. The order of an epoch is a permutation of (seed, epoch); the
augmentation of an image is keyed by (seed, epoch, index); mixing and drop-path by (seed, step, place in the global
batch). So two arms see the same pixels, a run is taken up again from its step number alone, and the number of
loader processes changes nothing.
"""

from collections.abc import Callable, Iterator
from typing import NamedTuple

import numpy as np
import torch
from jaxtyping import Float, Int
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from dytrun.augment import eval_transform, key, mixer, seeded, train_transform
from dytrun.config import DataConfig, RunConfig
from dytrun.errors import UserError
from dytrun.sources import Data, Split

# Streams of randomness: unrelated numbers for the same (seed, step).
INIT, _ORDER, _AUGMENT, _MIX = range(4)


class Batch(NamedTuple):
    """A micro-batch on the device."""

    images: Float[Tensor, "b c h w"]
    targets: Tensor
    """Labels (B,), or soft targets (B, K) where images are mixed."""
    indices: Int[Tensor, "b"]
    """Which images of the split."""


def train_batches(
    config: RunConfig, data: Data, rank_share: "RankShare", device: torch.device, workers: int
) -> Iterator[Batch]:
    """Yield this rank's micro-batches from `rank_share.first_step` on, on the device, mixed, without end of epoch.

    When a micro-batch is handed over, the global generators stand at (seed, step, place in the global batch): what
    the model draws in its forward pass (drop-path) is keyed by that too.
    """
    mix = mixer(config.augment, data.num_classes)
    loader = DataLoader(
        _TrainImages(data.train, train_transform(config.augment, config.data), config.seed),
        batch_sampler=_Order(len(data.train.labels), config.seed, rank_share),
        num_workers=workers,
        pin_memory=device.type == "cuda",
        worker_init_fn=_one_thread,
    )
    for count, (images, labels, indices) in enumerate(_readable(loader)):
        step, micro = divmod(count, rank_share.accumulation)
        images, labels = images.to(device, non_blocking=True), labels.to(device, non_blocking=True)
        seeded(config.seed, _MIX, rank_share.first_step + step, rank_share.offset(micro))
        targets = labels
        if mix is not None:
            images, targets = mix(images, labels)
        yield Batch(images, targets, indices)


class ValBatches:
    """This rank's share of the validation images, every one once over all ranks; can be gone through again."""

    def __init__(self, data: DataConfig, split: Split, batch: int, workers: int):
        self._images = _ValImages(split, eval_transform(data))
        self._batch = batch
        self._workers = workers
        self._loader: DataLoader | None = None

    def __call__(self, rank: int, world: int, device: torch.device) -> Iterator[Batch]:
        """Yield the batches of a rank, on the device; the last may be smaller, and there may be none."""
        positions = range(rank, len(self._images), world)
        if self._loader is None:
            self._loader = DataLoader(
                self._images,
                batch_sampler=[list(positions[i : i + self._batch]) for i in range(0, len(positions), self._batch)],
                num_workers=self._workers,
                persistent_workers=self._workers > 0,
                pin_memory=device.type == "cuda",
                worker_init_fn=_one_thread,
            )
        for images, labels, indices in _readable(self._loader):
            yield Batch(images.to(device, non_blocking=True), labels.to(device), indices.to(device))


class RankShare(NamedTuple):
    """Which part of which global batches is a rank's."""

    rank: int
    world: int
    batch_per_rank: int
    accumulation: int
    steps_per_epoch: int
    first_step: int
    total_steps: int

    def offset(self, micro: int) -> int:
        """Place of a micro-batch's first image in the global batch."""
        return (self.rank * self.accumulation + micro) * self.batch_per_rank


def epoch_order(num: int, seed: int, epoch: int) -> Int[np.ndarray, "n"]:
    """Return the order of an epoch's images: a permutation that depends on the seed and the epoch alone."""
    return np.random.Generator(np.random.Philox(key(seed, _ORDER, epoch))).permutation(num)


class _Order:
    """The lists of (epoch, index) that make a rank's micro-batches."""

    def __init__(self, num: int, seed: int, share: RankShare):
        self._num, self._seed, self._share = num, seed, share

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        share = self._share
        global_batch = share.batch_per_rank * share.accumulation * share.world
        epoch, order = -1, np.empty(0, dtype=np.int64)
        for step in range(share.first_step, share.total_steps):
            if epoch != step // share.steps_per_epoch:
                epoch = step // share.steps_per_epoch
                order = epoch_order(self._num, self._seed, epoch)
            start = step % share.steps_per_epoch * global_batch
            for micro in range(share.accumulation):
                first = start + share.offset(micro)
                yield [(epoch, int(i)) for i in order[first : first + share.batch_per_rank]]


class _TrainImages(Dataset):
    def __init__(self, split: Split, transform: Callable[[Image.Image], Tensor], seed: int):
        self._split, self._transform, self._seed = split, transform, seed

    def __getitem__(self, epoch_and_index: tuple[int, int]) -> tuple[Tensor, int, int]:
        epoch, index = epoch_and_index
        image = self._split.image(index)
        seeded(self._seed, _AUGMENT, epoch, index)
        return self._transform(image), int(self._split.labels[index]), index


class _ValImages(Dataset):
    def __init__(self, split: Split, transform: Callable[[Image.Image], Tensor]):
        self._split, self._transform = split, transform

    def __len__(self) -> int:
        return len(self._split.labels)

    def __getitem__(self, index: int) -> tuple[Tensor, int, int]:
        return self._transform(self._split.image(index)), int(self._split.labels[index]), index


def _one_thread(_: int) -> None:
    torch.set_num_threads(1)


def _readable(loader: DataLoader) -> Iterator[list[Tensor]]:
    """Go through a loader; a worker's UserError arrives wrapped in its traceback, so cut it out again."""
    try:
        yield from loader
    except UserError as error:
        raise UserError(str(error).strip().rpartition("UserError: ")[2]) from None
