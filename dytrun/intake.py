"""A directory as a user has it → its images, split by split: class folders, ImageNet's tars, or parquet files."""

import os
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np

from dytrun import archives, folders, parquet, terminal
from dytrun.errors import UserError, first_line
from dytrun.folders import Listing
from dytrun.images import ImageFiles, Unreadable
from dytrun.pack_config import PackConfig


class _Files:
    """(first, end) → the bytes of files."""

    def __init__(self, paths: Sequence[str]):
        self._files = ImageFiles(paths)

    def __call__(self, first: int, end: int) -> Iterator[bytes | Unreadable]:
        for index in range(first, end):
            try:
                yield self._files(index)
            except Unreadable as error:
                yield error


def found(config: PackConfig, source: Path) -> tuple[str, list[str], dict[str, Listing]]:
    """Find out what a source is and list its images; of several kinds the one that has both splits counts.

    Returns:
        Its kind, the names of the classes, and the images by split.

    Raises:
        UserError: there are none, or they cannot be read or trusted.
    """
    splits = (config.train_split, config.val_split)
    in_parquet = parquet.find_parquet(source, splits)
    kinds = {
        "folder": [split for split in splits if (source / split).is_dir()],
        "tar": archives.find_tars(source, splits),
        "parquet": list(in_parquet),
    }
    kind = max(kinds, key=lambda name: len(kinds[name]))
    if not kinds[kind]:
        raise UserError(
            f"source: {source} holds neither {splits[0]}/ nor {splits[1]}/, nor {archives.TRAIN_TAR} or "
            f"{archives.VAL_TAR}, nor {splits[0]}-….parquet; give one that does, or say train_split= and val_split="
        )
    if config.val_labels is not None and kind != "tar":
        raise UserError(f"val_labels: {source} is packed from its {kind}, which has labels; leave it out")
    for split in splits:
        if split not in kinds[kind]:
            terminal.line(f"{source} has no {split}: the pack will do for what needs {kinds[kind][0]} alone")
    terminal.line(f"{source}: listing {' and '.join(kinds[kind])}")
    if kind == "tar":
        return kind, *archives.list_tars(source, splits, config.val_labels)
    if kind == "parquet":
        return kind, *parquet.list_parquet(in_parquet)
    classes, listed = folders.listed(source, kinds[kind], "source")
    return kind, classes, {split: _of_folder(one) for split, one in zip(kinds[kind], listed, strict=True)}


def _of_folder(one: folders.Listed) -> Listing:
    start = len(one.folder) + 1
    try:
        sizes = np.array([os.stat(path).st_size for path in one.paths], dtype=np.int64)
    except OSError as error:
        raise UserError(
            f"source: {error.filename} cannot be read ({error.strerror or first_line(error)}); mend or remove it"
        ) from None
    names = [path[start:] for path in one.paths]
    return Listing(names, one.labels, sizes, True, np.arange(1, len(names) + 1), _Files(one.paths))
