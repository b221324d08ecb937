"""Windows of text, byte by byte: which in which order, on which rank.

Axes: B window, T byte. As with images, order is a function, not a state: an epoch's windows lie side by side from an
offset on that (seed, epoch) gives, and are taken in a permutation of (seed, epoch). In evaluation they lie side by side
from the start, and the last one is as long as there are bytes: every byte but the first is predicted exactly once.
"""

from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
import torch
from jaxtyping import Int, UInt8

from dytrun.augment import key
from dytrun.batch import NO_TARGET, Batch
from dytrun.config import RunConfig, TextConfig
from dytrun.corpus import read_corpus
from dytrun.data import OFFSET, Order, RankShare
from dytrun.errors import UserError
from dytrun.folders import digest

NUM_BYTES = 256


class Text(NamedTuple):
    """One side of a text, and into how many windows it is cut."""

    content: UInt8[np.ndarray, "n"]
    context: int
    num: int


class TextData(NamedTuple):
    """Both sides; the fields are those of `sources.Data`."""

    train: Text
    val: Text
    num_classes: int
    fingerprint: str
    facts: dict[str, int | str]
    pack: str = ""


def load_text(data: TextConfig) -> TextData:
    """Read the text that a configuration names.

    Raises:
        UserError: there is none, it cannot be read, or it is shorter than a window.
    """
    corpus = read_corpus(data.root)
    train, val = (np.frombuffer(side, dtype=np.uint8) for side in corpus)
    # So many whole windows, and the byte behind the last one, are there wherever the first one begins.
    num_train, num_val = len(train) // data.context - 1, -(-(len(val) - 1) // data.context)
    if num_train < 1 or num_val < 1:
        raise UserError(f"data.context: {len(train)} training and {len(val)} validation bytes hold no window of "
                        f"{data.context}; lower it, or give more text with data.root")  # fmt: skip
    facts: dict[str, int | str] = {
        "num_train_bytes": len(train), "num_val_bytes": len(val), "train_contents": digest(corpus.train),
        "val_contents": digest(corpus.val),
    }  # fmt: skip
    fingerprint = digest(b"text", repr(sorted(facts.items())).encode())
    sides = Text(train, data.context, num_train), Text(val, data.context, num_val)
    return TextData(*sides, NUM_BYTES, fingerprint, facts)


def epoch_offset(context: int, seed: int, epoch: int) -> int:
    """Return where an epoch's first window begins: a byte before `context`."""
    return key(seed, OFFSET, epoch) % context


def train_windows(config: RunConfig, text: Text, share: RankShare, device: torch.device) -> Iterator[Batch]:
    """Yield this rank's micro-batches from `share.first_step` on, on the device, without end of epoch."""
    for windows in Order(text.num, config.seed, share):
        starts = [epoch_offset(text.context, config.seed, epoch) + index * text.context for epoch, index in windows]
        yield _batch(text, np.array(starts), [index for _, index in windows], device)


class ValWindows:
    """This rank's share of the validation windows, every one once over all ranks; can be gone through again."""

    def __init__(self, text: Text, batch: int, place: tuple[int, int, torch.device]):
        """Take (rank, world, device) as `place`; the last batch may be smaller, and there may be none."""
        rank, world, self._device = place
        self._text, self._batch, self._windows = text, batch, range(rank, text.num, world)

    def __call__(self) -> Iterator[Batch]:
        """Yield the batches, on the device."""
        for first in range(0, len(self._windows), self._batch):
            windows = list(self._windows[first : first + self._batch])
            yield _batch(self._text, np.array(windows) * self._text.context, windows, self._device)


def _batch(text: Text, starts: Int[np.ndarray, "b"], windows: list[int], device: torch.device) -> Batch:
    """Cut windows out; what is behind the end of the text is no target."""
    places = starts[:, None] + np.arange(text.context + 1)
    is_there = places < len(text.content)
    found = np.where(is_there, text.content[np.minimum(places, len(text.content) - 1)], 0).astype(np.int64)
    targets = np.where(is_there[:, 1:], found[:, 1:], NO_TARGET)
    inputs, labels = (torch.from_numpy(np.ascontiguousarray(one)) for one in (found[:, :-1], targets))
    return Batch(inputs.to(device), labels.to(device), torch.tensor(windows, device=device))
