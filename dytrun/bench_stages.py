"""What each stage of a training image takes on one core, and all of it as a loader process does it.

Image by image in this process, each stage after the other, so that whatever slows the machine slows all of them.
"""

from collections.abc import Callable

import numpy as np
import torch

from dytrun import jpeg, pixels, timing
from dytrun.augment import random_box, seeded, train_transform
from dytrun.config import RunConfig
from dytrun.data import TrainImages
from dytrun.errors import UserError
from dytrun.images import Picture, Unreadable
from dytrun.records import Found, Table
from dytrun.sources import Split

_READ, _DECODE, _CROP, _AUGMENT, _SEED, _WHOLE = STAGES = (
    "read", "decode", "crop and resize", "augment", "seed", "all of it",
)  # fmt: skip
# Images of a round, evenly spread over the split.
_IMAGES = 64


def measure(run: RunConfig, split: Split, rounds: int) -> Found:
    """Time every stage of some training images, each in every round as in another epoch.

    Raises:
        UserError: none of the images can be read.
    """
    chosen = _readable(split)
    found = np.array([_times(run, split, chosen, epoch).mean(axis=0) for epoch in range(rounds)])
    in_memory = not split.paths
    native = pixels.implementation()
    by = {_DECODE: "in memory" if in_memory else jpeg.described(), _CROP: native, _AUGMENT: native}
    rows = [[name, by.get(name, ""), f"{ms:.3f}", f"{1e3 / ms:,.0f}" if ms > 0 else "-"]
            for name, ms in zip(STAGES, np.median(found, axis=0).tolist(), strict=True)]  # fmt: skip
    if in_memory:
        rows[STAGES.index(_DECODE)][2:] = ["-", "-"]
    notes = [
        f"{len(chosen)} images, read before (so from memory, not from a disk); median of {rounds} rounds of their mean",
        "decode: what a random crop keeps; crop and resize: of an image that is decoded already; augment: flip and "
        "colours, the difference of that with and without them, same draws; all of it: as a loader process does it",
    ]
    values = {
        "decoder": None if in_memory else jpeg.described(),
        "pixels": native,
        "stage_images": len(chosen),
        "stages_ms": dict(zip(STAGES, found.T.tolist(), strict=True)),
    }
    return Found([Table("one image on one core", ("stage", "by", "ms", "images/s"), rows, notes)], values)


def _times(run: RunConfig, split: Split, chosen: list[int], epoch: int) -> np.ndarray:
    """Return milliseconds of each image and stage, (images, stages)."""
    whole, augmented = TrainImages(run, split), train_transform(run.augment, run.images)
    nothing_else = run.augment.model_copy(update={"hflip": 0.0, "rand_augment": None, "color_jitter": 0.0})
    cropped = train_transform(nothing_else, run.images)
    indices = iter(chosen)

    def parts(mark: Callable[[], None]) -> None:
        index = next(indices)
        path = split.paths[index] if split.paths else ""
        seeded(run.seed, epoch, index)
        mark()
        content = split.read(index)
        mark()
        picture = Picture(content, path)
        if run.augment.scale is None:
            picture.pixels()
        else:
            picture.part(*random_box(picture.height, picture.width, run.augment.scale, run.augment.ratio))
        mark()
        decoded = Picture(content, path).pixels()
        mark()
        cropped(Picture(decoded, path))
        mark()
        seeded(run.seed, epoch, index)
        mark()
        augmented(Picture(decoded, path))
        mark()
        whole[epoch, index]
        mark()

    read, decode, _, crop, seed, crop_and_augment, all_of_it = timing.spans_ms(
        torch.device("cpu"), parts, len(chosen)
    ).T
    return np.stack([read, decode, crop, crop_and_augment - crop, seed, all_of_it], axis=1)


def _readable(split: Split) -> list[int]:
    """Choose images, and read each once, so that it is memory that they are read from afterwards.

    Raises:
        UserError: none can be read.
    """
    num, found, problem = len(split.labels), [], ""
    wanted = min(num, _IMAGES)
    for place in range(wanted):
        index = place * num // wanted
        try:
            split.picture(index).pixels()
            found.append(index)
        except Unreadable as error:
            problem = str(error)
    if not found:
        raise UserError(problem)
    return found
