"""Loaders: which image, in which order, on which rank.

Order and randomness are functions, not states. The order of an epoch is a permutation of (seed, epoch); the
augmentation of an image is keyed by (seed, epoch, index); mixing and drop-path by (seed, step, place in the global
batch). So two arms see the same pixels, a run is taken up again from its step number alone, and the number of
loader processes changes nothing. So is what stands in for a training image that cannot be read: an image of its class,
chosen by (seed, index).
"""

import functools
import sys
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import NamedTuple

import numpy as np
import torch
from jaxtyping import Int, UInt8
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, default_collate

from dytrun import jpeg, machine
from dytrun import pixels as ops
from dytrun.augment import (
    Deferred,
    Drawer,
    deferring,
    erased_box,
    eval_drawer,
    eval_resize,
    key,
    num_operations,
    seeded,
    train_drawer,
    transform,
)  # fmt: skip
from dytrun.batch import BadImage, Batch
from dytrun.config import DataConfig, RunConfig
from dytrun.errors import UserError
from dytrun.finish import Erased, Finish, Mixing, mixed_targets, mixing_drawer
from dytrun.images import MOST_PIXELS, Picture, Unreadable
from dytrun.processes import readable, start_worker
from dytrun.rand_augment import filling
from dytrun.sources import Data, Split

# Streams of randomness: unrelated numbers for the same (seed, step).
INIT, _ORDER, _AUGMENT, _MIX, _SUBSTITUTE, _ERASE, OFFSET = range(7)
# Evaluation batches for each loader process, below which the rank loads them itself.
_BATCHES_WORTH_A_PROCESS = 4
# Bytes of 8-bit images that the loader processes of a rank may hold ready, and batches for each of them.
_READY_BYTES, _FEWEST_READY, _MOST_READY = 256 * 2**20, 2, 8
_Made = Callable[[Drawer], Callable[[Picture], ops.Pixels | Deferred]]
# The same one for all loaders: torch keeps freed memory by stream, and one for each evaluation would keep it for ever.
_side_stream = functools.cache(torch.cuda.Stream)


class _Sample(NamedTuple):
    pixels: ops.Pixels | Deferred
    label: int
    number: int
    """Its index in the split."""
    erased: Erased = Erased()
    bad: BadImage | None = None
    """What was wrong with the image, if another one stands in for it."""


class _Loaded(NamedTuple):
    """A micro-batch as the loader processes hand it over."""

    images: UInt8[Tensor, "b h w 3"]
    labels: Int[Tensor, "b"]
    indices: Int[Tensor, "b"]
    erased: Int[Tensor, "b 5"]
    """Box and key of each image."""
    bad: dict[int, BadImage]
    """By index."""

    def tensors_to(self, device: torch.device) -> "_Loaded":
        images, labels, indices, erased = (tensor.to(device, non_blocking=True) for tensor in self[:4])
        return _Loaded(images, labels, indices, erased, self.bad)


def train_batches(
    config: RunConfig, data: Data, rank_share: "RankShare", device: torch.device, workers: int
) -> Iterator[Batch]:
    """Return this rank's micro-batches from `rank_share.first_step` on, on the device, mixed, without end of epoch.

    When a micro-batch is handed over, the global generators stand at (seed, step, place in the global batch): what
    the model draws in its forward pass (drop-path) is keyed by that too.

    The loader processes start at once, before the caller starts threads that a fork would tear. DALI has threads
    instead, as many.

    Raises:
        UserError: DALI is asked for and not there; no image of a class can be read (while the batches are gone
            through).
    """
    images = TrainImages(config, data.train)
    order = Order(len(data.train.labels), config.seed, rank_share)
    if config.machine.loader == "dali":
        both = TrainImages(config, data.train, deferring), images
        loader = _dali_loader(both, order, config.images, num_operations(config.augment), (device, workers))
    else:
        ready = _ready_batches(rank_share.batch_per_rank, config.images.image_size, workers)
        loader = _loader(images, order, device, workers, ready)
    return _finished(config, data.num_classes, rank_share, device, iter(loader))


class ValBatches:
    """This rank's share of the validation images, every one once over all ranks; can be gone through again."""

    def __init__(
        self,
        data: DataConfig,
        split: Split,
        batch: int,
        workers: int,
        place: tuple[int, int, torch.device],
        loader: str = "torch",
    ):
        """Take (rank, world, device) as `place`; the last batch may be smaller, and there may be none."""
        rank, world, self._device = place
        positions = range(rank, len(split.labels), world)
        batches = [list(positions[i : i + batch]) for i in range(0, len(positions), batch)]
        self._finish, images = Finish(data, "const", self._device), _ValImages(data, split)
        if loader == "dali":
            both = _ValImages(data, split, deferring), images
            self._loader = _dali_loader(both, batches, data, 0, (self._device, workers))
            return
        # A process that has only a few batches to load costs more than it brings.
        workers = workers if len(batches) >= _BATCHES_WORTH_A_PROCESS * workers else 0
        ready = _ready_batches(batch, data.image_size, workers)
        self._loader = _loader(images, batches, self._device, workers, ready)
        if workers:
            iter(self._loader)

    def __call__(self) -> Iterator[Batch]:
        """Yield the batches, on the device.

        Raises:
            UserError: an image cannot be read; there is no accuracy over the others.
        """
        for loaded in _on_device(readable(iter(self._loader)), self._device):
            yield Batch(self._finish(loaded.images), loaded.labels, loaded.indices)


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


class Order:
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


class TrainImages(Dataset):
    """(epoch, index) → an augmented training image, as a loader process makes it."""

    def __init__(self, config: RunConfig, split: Split, made: _Made = transform):
        self.split, self._seed, self._size = split, config.seed, config.images.image_size
        self._transform, self._erase_prob = made(train_drawer(config.augment, config.images)), config.augment.erase_prob
        # A random crop comes before its resizing, and makes no image larger than it is.
        self._resized = eval_resize(config.images) if config.augment.scale is None else None

    def __getitem__(self, epoch_and_index: tuple[int, int]) -> _Sample:
        """Draw and compute one image; another of its class stands in for one that cannot be read."""
        epoch, index = epoch_and_index
        bad = None
        try:
            pixels = self._augmented(index, epoch, index)
        except Unreadable as error:
            pixels, bad = self._substitute(epoch, index, error)
        box = erased_box(self._size, self._erase_prob)
        erased = Erased(box, key(self._seed, _ERASE, epoch, index) if box.height else 0)
        return _Sample(pixels, int(self.split.labels[index]), index, erased, bad)

    def _augmented(self, read: int, epoch: int, index: int) -> ops.Pixels | Deferred:
        """Read an image and augment it as `index` is in that epoch."""
        picture = _opened(self.split, read, self._resized)
        seeded(self._seed, _AUGMENT, epoch, index)
        return self._transform(picture)

    def _substitute(self, epoch: int, index: int, error: Unreadable) -> tuple[ops.Pixels | Deferred, BadImage]:
        """Take another image of the class: the first readable one of a permutation keyed by the seed and the index."""
        others = np.flatnonzero(self.split.labels == self.split.labels[index])
        order = np.random.Generator(np.random.Philox(key(self._seed, _SUBSTITUTE, index))).permutation(others)
        for other in map(int, order[order != index]):
            try:
                pixels = self._augmented(other, epoch, index)
            except Unreadable:
                continue
            return pixels, BadImage(error.path, error.why, self.split.paths[other])
        raise UserError(
            f"{self.split.class_folder(index)}: no image of this class can be read, {error.path} for one "
            f"({error.why}); mend them"
        )


class _ValImages(Dataset):
    def __init__(self, data: DataConfig, split: Split, made: _Made = transform):
        self.split, self._transform, self._resized = split, made(eval_drawer(data)), eval_resize(data)

    def __len__(self) -> int:
        return len(self.split.labels)

    def __getitem__(self, index: int) -> _Sample:
        try:
            pixels = self._transform(_opened(self.split, index, self._resized))
        except Unreadable as error:
            raise UserError(str(error)) from None
        return _Sample(pixels, int(self.split.labels[index]), index)


def _opened(split: Split, index: int, resized: int | None) -> Picture:
    """Open an image; refuse one so long that bringing its short side to `resized` pixels would make a bomb of it."""
    picture = split.picture(index)
    sides = picture.height, picture.width
    if resized is not None and resized**2 * max(sides) > MOST_PIXELS * min(sides):
        raise Unreadable(split.paths[index], f"{picture.width}×{picture.height} pixels are too long to be resized")
    return picture


def _collate(samples: list[_Sample], made: UInt8[Tensor, "b h w 3"] | None = None) -> _Loaded:
    images = made
    if images is None:  # in a loader process this stacks them in memory that it shares with the rank
        images = default_collate([torch.from_numpy(sample.pixels) for sample in samples])
    labels, indices = (torch.tensor(numbers) for numbers in zip(*(sample[1:3] for sample in samples), strict=True))
    erased = torch.tensor([(*sample.erased.box, sample.erased.key) for sample in samples])
    return _Loaded(images, labels, indices, erased, {one.number: one.bad for one in samples if one.bad is not None})


def _ready_batches(batch: int, size: int, workers: int) -> int:
    """Return how many batches each loader process prepares ahead, by the bytes that they take."""
    return max(_FEWEST_READY, min(_MOST_READY, _READY_BYTES // (batch * size * size * 3 * max(1, workers))))


def _dali_loader(
    images: tuple["TrainImages | _ValImages", Dataset],
    batches: Iterable[Sequence[object]],
    data: DataConfig,
    operations: int,
    place: tuple[torch.device, int],
) -> Iterable[_Loaded]:
    machine.check_loader("dali", data.name, bool(images[0].split.paths))
    from dytrun.dali import DaliLoader
    from dytrun.dali_graph import Look

    return DaliLoader(images, batches, _collate, Look(data.image_size, operations, filling(data.mean)), place)


def _loader(
    images: Dataset, batches: Iterable[Sequence[object]], device: torch.device, workers: int, ready: int
) -> DataLoader:
    # Compiled here once, and not by each of the processes.
    ops.implementation()
    jpeg.described()
    # More processes than cores are what the user asked for.
    warnings.filterwarnings("ignore", message="This DataLoader will create")
    return DataLoader(
        images,
        batch_sampler=batches,  # pyright: ignore[reportArgumentType]  any iterable of lists of keys will do
        collate_fn=_collate,
        num_workers=workers,
        prefetch_factor=ready if workers else None,
        persistent_workers=workers > 0,
        pin_memory=device.type == "cuda",
        worker_init_fn=start_worker,
        # A rank is itself a child of a fork server, and would start one of its own: ten seconds of imports, and
        # processes that outlive a rank that is killed.
        multiprocessing_context="fork" if workers and sys.platform == "linux" else None,
    )


def _finished(
    config: RunConfig, num_classes: int, share: RankShare, device: torch.device, loaded: Iterator[_Loaded]
) -> Iterator[Batch]:
    finish, augment = Finish(config.images, config.augment.erase_mode, device), config.augment
    draw = mixing_drawer(augment, num_classes, config.images.image_size)
    for count, (images, labels, indices, erased, bad) in enumerate(_on_device(readable(loaded), device)):
        step, micro = divmod(count, share.accumulation)
        seeded(config.seed, _MIX, share.first_step + step, share.offset(micro))
        mixing, targets = Mixing(), labels
        if draw is not None:
            mixing = draw()
            targets = mixed_targets(labels, mixing, num_classes, augment.smoothing)
        yield Batch(finish(images, erased, mixing), targets, indices, bad)


def _on_device(loaded: Iterator[_Loaded], device: torch.device) -> Iterator[_Loaded]:
    """Copy batches to a GPU on a stream of their own, one ahead of the one that is handed over."""
    if device.type != "cuda":
        yield from loaded
        return
    side = _side_stream(device)

    def copied(batch: _Loaded) -> tuple[_Loaded, torch.cuda.Event]:
        is_there = torch.cuda.Event()
        # The memory that it goes to may be another batch's, still being read.
        side.wait_stream(torch.cuda.current_stream(device))
        with torch.cuda.stream(side):
            there = batch.tensors_to(device)
        is_there.record(side)
        return there, is_there

    def handed(batch: _Loaded, event: torch.cuda.Event) -> _Loaded:
        torch.cuda.current_stream(device).wait_event(event)
        for tensor in batch[:4]:
            tensor.record_stream(torch.cuda.current_stream(device))
        return batch

    ahead = None
    for batch in loaded:
        ahead, current = copied(batch), ahead
        if current is not None:
            yield handed(*current)
    if ahead is not None:
        yield handed(*ahead)
