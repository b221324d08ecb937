"""timm's own loader with the recipe of a run: what `dytrun bench=data bench.peer=timm` measures beside ours.

Its defaults, as its train.py uses it: 8-bit images from the loader processes, normalised and erased on the device
(`use_prefetcher`), processes kept from epoch to epoch. Mixup is on the device, in the rank: timm's other way, in the
loader processes (`collate_mixup`), is left out.
"""

import functools
import io
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from timm.data import Mixup, auto_augment, create_dataset, create_loader
from torch.utils.data import Dataset

from dytrun.config import RunConfig
from dytrun.errors import UserError
from dytrun.processes import start_worker
from dytrun.sources import Split

# The list of images is repeated up to here, so that no epoch ends while timm is measured: at the end of each its
# processes run empty, which on a small data set would be most of what is seen.
_ENDLESS = 2**20


class _SameBytes(Dataset):
    """What our loader reads, for timm's transforms: decoded by Pillow, as timm does."""

    def __init__(self, split: Split):
        self._split, self._num = split, len(split.labels)
        self.transform: Callable[[Image.Image], Any] | None = None

    def __len__(self) -> int:
        return max(_ENDLESS, self._num)

    def __getitem__(self, place: int) -> tuple[Any, int]:
        index = place % self._num
        content = self._split.read(index)
        try:
            image = Image.fromarray(content) if isinstance(content, np.ndarray) else Image.open(io.BytesIO(content))
            image = image.convert("RGB")
        except OSError:  # timm's own Dataset, too, takes the next one then
            return self[place + 1]
        assert self.transform is not None
        return self.transform(image), int(self._split.labels[index])


class Files:
    """The images that timm reads, and who reads them."""

    def __init__(self, run: RunConfig, split: Split, num_classes: int, root: str | None):
        """Take the class folders in `root`, or those of `split`, or where it has none whatever it reads.

        Raises:
            UserError: `root` holds no images.
        """
        folder = _folder(run, split, root)
        if folder is None:
            self.dataset: Any = _SameBytes(split)
            self.num, self.num_classes = len(split.labels), num_classes
            self.reads = "what dytrun reads, bytes or pixels, through a Dataset that hands it to Pillow"
            return
        try:
            self.dataset = create_dataset("", root=str(folder), search_split=False)
        except RuntimeError as error:
            raise UserError(f"bench.peer: timm finds no images in {folder} ({error})") from None
        reader = self.dataset.reader
        self.num, self.num_classes = len(reader.samples), max(num_classes, len(reader.class_to_idx))
        reader.samples = reader.samples * -(-_ENDLESS // self.num)
        self.reads = f"files of {folder}"

    def batches(self, run: RunConfig, batch: int, workers: int, device: torch.device) -> Iterator[Any]:
        """Yield finished batches with the recipe of the run, mixed, without end; the first one starts the processes."""
        augment = run.augment
        mix = None
        if augment.mixes:
            mix = Mixup(
                mixup_alpha=augment.mixup, cutmix_alpha=augment.cutmix, prob=augment.mix_prob,
                switch_prob=augment.mix_switch_prob, label_smoothing=augment.smoothing, num_classes=self.num_classes,
            )  # fmt: skip
        loader = self._loader(run, batch, workers, device)
        while True:
            for images, targets in loader:
                yield (images, targets) if mix is None else mix(images, targets)

    def _loader(self, run: RunConfig, batch: int, workers: int, device: torch.device) -> Any:
        augment, data = run.augment, run.images
        # More processes than cores are what the user asked for.
        warnings.filterwarnings("ignore", message="This DataLoader will create")
        with _posterize_of_no_bits():
            loader: Any = create_loader(
                self.dataset, (3, data.image_size, data.image_size), batch, is_training=True,
                re_prob=augment.erase_prob, re_mode=augment.erase_mode, re_count=1, scale=augment.scale,
                ratio=augment.ratio, hflip=augment.hflip, color_jitter=augment.color_jitter,
                auto_augment=augment.rand_augment, interpolation=augment.interpolation, mean=data.mean, std=data.std,
                num_workers=workers, device=device,
            )  # fmt: skip
        # They heed no signal and end with the rank, as ours.
        loader.loader.worker_init_fn = functools.partial(_start, loader.loader.worker_init_fn)
        return loader

    @property
    def transform(self) -> str:
        """What timm does to an image, in its own words; known once it has begun."""
        return str(self.dataset.transform)


def check(run: RunConfig, batch: int) -> None:
    """Refuse a recipe that timm's loader does not have.

    Raises:
        UserError: no random crop, or an odd batch that is to be mixed.
    """
    if run.augment.scale is None:
        raise UserError("bench.peer: timm's loader trains on random crops alone; say augment=paper or augment=light")
    if run.augment.mixes and batch % 2:
        raise UserError(f"bench.batch: timm mixes the images of an even batch alone; {batch} is odd")


def _folder(run: RunConfig, split: Split, root: str | None) -> Path | None:
    if root is not None:
        for folder in (Path(root) / run.images.train_split, Path(root)):
            if folder.is_dir():
                return folder
        raise UserError(f"bench.peer_root: {root} is no folder; give the one that the pack was made from")
    # A pack's images have paths too, but there are no such files.
    return Path(split.folder) if split.folder and Path(split.paths[0]).is_file() else None


def _start(of_timm: Callable[[int], None], worker: int) -> None:
    of_timm(worker)
    start_worker(worker)


@contextmanager
def _posterize_of_no_bits() -> Iterator[None]:
    """Let the policies that timm builds know what no bits are: RandAugment asks for them, and Pillow 13 refuses."""
    before = dict(auto_augment.NAME_TO_OP)
    try:
        for name, operation in before.items():
            if operation is auto_augment.posterize:
                auto_augment.NAME_TO_OP[name] = _posterize
        yield
    finally:
        auto_augment.NAME_TO_OP.update(before)


def _posterize(image: Image.Image, bits: int, **_: Any) -> Image.Image:
    """As timm's; no bits are black, as in Pillow before 13."""
    return Image.new(image.mode, image.size) if bits < 1 else auto_augment.posterize(image, bits)
