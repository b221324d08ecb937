"""What a run is fed with, images or text: which there are, and the batches of a rank."""

from collections.abc import Callable, Iterator

import torch

from dytrun.batch import Batch
from dytrun.config import RunConfig, TextConfig
from dytrun.data import RankShare, ValBatches, train_batches
from dytrun.sources import Data, load_data
from dytrun.text import TextData, ValWindows, load_text, train_windows

AnyData = Data | TextData


def load(config: RunConfig) -> AnyData:
    """Find the images or read the text of a run.

    Raises:
        UserError: as `load_data` and `load_text`.
    """
    return load_text(config.data) if isinstance(config.data, TextConfig) else load_data(config.data)


def train_feed(
    config: RunConfig, data: AnyData, share: RankShare, device: torch.device, workers: int
) -> Iterator[Batch]:
    """Return this rank's micro-batches from `share.first_step` on; see `train_batches` and `train_windows`."""
    if isinstance(data, TextData):
        return train_windows(config, data.train, share, device)
    return train_batches(config, data, share, device, workers)


def val_feed(
    config: RunConfig, data: AnyData, batch: int, workers: int, place: tuple[int, int, torch.device]
) -> Callable[[], Iterator[Batch]]:
    """Return what gives this rank's share of the validation split, as often as it is called.

    `place` is (rank, world, device).
    """
    if isinstance(data, TextData):
        return ValWindows(data.val, batch, place)
    return ValBatches(config.images, data.val, batch, workers, place, config.machine.loader)
