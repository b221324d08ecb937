"""A pack: the images of a data set in a few files, read by memory map, each image checked whenever it is read.

    pack.json          what is in it and what it was made from; SHA-256 and size of each file, and its own digest
    train.index        a record for each image, in the order of the class folders, and then their names
    train-00000.shard  the bytes of images, one after another, and nothing else

pack.json is written last: a directory without one is no pack yet. Integers are little-endian. The check of an image is
its XXH3 of 64 bits (xxhash.com), the length included; that of a whole file, for `verify`, is SHA-256.
"""

import hashlib
import mmap
import os
import stat
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
import xxhash
from pydantic import BaseModel, Field, ValidationError

from dytrun.config import Slug
from dytrun.errors import UserError, first_line
from dytrun.folders import names_digest
from dytrun.norm_config import STRICT, Count
from dytrun.seal import unsealed

FORMAT = 1
MANIFEST, UNFINISHED, SHARD = "pack.json", ".packing", ".shard"
RECORD = np.dtype([("check", "<u8"), ("offset", "<u8"), ("length", "<u4"), ("shard", "<u4"), ("label", "<u4")])
# A pack.json of 512 shards has some hundred thousand bytes.
_MOST_MANIFEST = 1 << 26

_Size = Annotated[int, Field(ge=0, lt=1 << 63, strict=True)]
_Sha = Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]


class PackFile(BaseModel):
    """A file of a pack."""

    model_config = STRICT
    bytes: _Size
    sha256: _Sha


class PackedSplit(BaseModel):
    """A split in a pack."""

    model_config = STRICT
    num: Count
    index: PackFile
    shards: list[PackFile]
    unreadable: list[str]
    """Names of images that could not be decoded, and were packed as they are."""


class SplitSource(BaseModel):
    """What a split was made from."""

    model_config = STRICT
    num: Count
    listing: _Sha
    """Of names, labels and sizes."""


class MadeFrom(BaseModel):
    """What a pack was made from, and how; the same of both makes the same bytes."""

    model_config = STRICT
    kind: Literal["folder", "tar", "parquet"]
    name: str
    """Of the directory."""
    splits: dict[Slug, SplitSource]
    short_side: Count | None
    """Pixels to which larger images were shrunk; null: bytes are as they were."""
    quality: Count | None
    encoder: str | None
    """What decoded, shrunk and encoded."""
    shard_bytes: Count
    """Bytes of the source's images, after which a new shard begins."""

    def __str__(self) -> str:
        kind = {"folder": "class folders", "tar": "tar files", "parquet": "parquet files"}[self.kind]
        return f"{self.how}, from the {kind} of {self.name}"

    @property
    def how(self) -> str:
        """What was done to the images, in words."""
        if self.short_side is None:
            return "bytes untouched"
        return f"short side at most {self.short_side} px, JPEG quality {self.quality}"


class Manifest(BaseModel):
    """pack.json."""

    model_config = STRICT
    format: Literal[1]
    made_from: MadeFrom
    source_id: Annotated[str, Field(pattern=r"^[0-9a-f]{12}$")]
    """Digest of the names, labels and sizes of the images that it was made from."""
    classes: list[str]
    splits: dict[Slug, PackedSplit]


class _Names(Sequence[str]):
    """Paths of the images as if they were files, made when they are asked for."""

    def __init__(self, folder: str, raw: bytes):
        self._folder, self._raw = folder, raw
        self._ends = np.flatnonzero(np.frombuffer(raw, dtype=np.uint8) == 0)

    def __len__(self) -> int:
        return len(self._ends)

    def __getitem__(self, index: int) -> str:  # pyright: ignore[reportIncompatibleMethodOverride]  nobody slices it
        index = range(len(self))[index]
        start = 0 if index == 0 else int(self._ends[index - 1]) + 1
        return f"{self._folder}/{os.fsdecode(self._raw[start : int(self._ends[index])])}"


class PackedImages:
    """Index → the bytes of an image of a split; may be handed to other processes, each of which maps the files."""

    def __init__(self, pack: Path, split: str, manifest: Manifest):
        """Read the index.

        Raises:
            UserError: the pack has no such split, or it is damaged.
        """
        if split not in manifest.splits:
            raise UserError(f"{pack}: a pack of {' and '.join(manifest.splits)} alone, without {split}; pack a source "
                            "that has it")  # fmt: skip
        entry = manifest.splits[split]
        self._pack, self._split, self._num = pack, split, len(entry.shards)
        raw = _checked(pack / f"{split}.index", entry.index)
        size = entry.num * RECORD.itemsize
        if len(raw) < size:
            raise UserError(f"{pack / split}.index: too short for {entry.num} images; it is not of this pack")
        self._records = np.frombuffer(raw, RECORD, entry.num)
        self._raw_names = raw[size:]
        self.folder = str(pack / split)
        """Where the images would lie if they were files."""
        self.paths = _Names(self.folder, self._raw_names)
        self.labels = self._records["label"].astype(np.int64)
        self._check_bounds(entry, len(manifest.classes))
        for number, shard in enumerate(entry.shards):
            _check_size(self._shard(number), shard.bytes)
        self._maps: dict[int, mmap.mmap] = {}

    def __call__(self, index: int) -> bytes:
        """Read an image.

        Raises:
            UserError: it is not as it was packed.
        """
        check, offset, length, shard, _ = self._records[index].item()
        if length == 0:  # and its shard perhaps empty, which cannot be mapped
            return b""
        mapped = self._mapped(shard)
        if mapped.size() < offset + length:  # to touch what has been cut off would end the process
            raise UserError(f"{self._shard(shard)}: too short; {self._advice}")
        start = offset // mmap.PAGESIZE * mmap.PAGESIZE
        if hasattr(mmap, "MADV_WILLNEED"):  # one request to the disk, and not one a page
            mapped.madvise(mmap.MADV_WILLNEED, start, offset + length - start)
        data = mapped[offset : offset + length]
        if xxhash.xxh3_64_intdigest(data) != check:
            raise UserError(f"{self._shard(shard)}: {self.paths[index]} (image {index}) is not as it was packed; "
                            f"{self._advice}")  # fmt: skip
        return data

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_maps": {}}

    def names_digest(self) -> str:
        """Return the digest of labels and names, equal to that of the same images in class folders."""
        return names_digest(self.labels, self._raw_names[:-1].replace(b"\0", b"\n"))

    def size(self, index: int) -> int:
        """Return the bytes of an image."""
        return int(self._records["length"][index])

    def check_all(self, number: int, sha256: str, report: Callable[[int, int, bool], None]) -> Iterator[str]:
        """Read a shard from end to end, once, and yield what is wrong with its images, or else with itself.

        Args:
            number, sha256: of the shard.
            report: is told of images and bytes that were read.
        """
        here = np.flatnonzero(self._records["shard"] == number)
        here = here[np.argsort(self._records["offset"][here], kind="stable")]
        end, digest, is_same = 0, hashlib.sha256(), True
        with self._shard(number).open("rb") as file:
            for index in map(int, here):
                check, offset, length, _, _ = self._records[index].item()
                if offset != end:
                    yield f"{self._shard(number)}: {self.paths[index]} does not begin where the one before it ends"
                    return
                data = file.read(length)
                digest.update(data)
                end += length
                if len(data) != length or xxhash.xxh3_64_intdigest(data) != check:
                    is_same = False
                    yield f"{self._shard(number)}: {self.paths[index]} (image {index}) is not as it was packed"
                report(1, length, True)
            if is_same and (file.read(1) or digest.hexdigest() != sha256):
                yield f"{self._shard(number)}: does not have its SHA-256"

    @property
    def _advice(self) -> str:
        return f"dytrun data verify {self._pack} says what else is damaged; pack it again"

    def _shard(self, number: int) -> Path:
        return shard_path(self._pack, self._split, number)

    def _mapped(self, number: int) -> mmap.mmap:
        if number not in self._maps:
            path = self._shard(number)
            try:
                with path.open("rb") as file:
                    mapped = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
            except (OSError, ValueError) as error:  # ValueError: the file is empty
                raise UserError(f"{path}: cannot be read ({_reason(error)}); {self._advice}") from None
            if hasattr(mmap, "MADV_RANDOM"):
                mapped.madvise(mmap.MADV_RANDOM)
            self._maps[number] = mapped
        return self._maps[number]

    def _check_bounds(self, entry: PackedSplit, num_classes: int) -> None:
        """Check every integer before any is used."""
        records = self._records
        sizes = np.array([shard.bytes for shard in entry.shards], dtype=np.uint64)
        is_whole = len(self.paths) == entry.num and self._raw_names.endswith(b"\0") and len(sizes) > 0
        if is_whole and records["shard"].max() < len(sizes) and records["label"].max() < num_classes:
            room = sizes[records["shard"]]
            if bool(((records["offset"] <= room) & (records["length"] <= room - records["offset"])).all()):
                return
        raise UserError(f"{self._pack / self._split}.index: names images that no shard has; it is not of this pack")


def is_pack(path: Path) -> bool:
    """Say whether a directory is a pack, or was to become one."""
    return any(os.path.exists(path / name) for name in (MANIFEST, UNFINISHED)) or any(path.glob(f"*{SHARD}"))


def open_pack(path: Path) -> Manifest:
    """Read what is in a pack.

    Raises:
        UserError: it is unfinished, damaged, or of another version.
    """
    manifest = path / MANIFEST
    try:
        if manifest.exists() and not manifest.is_file():
            raise ValueError("it is no file")
        with manifest.open("rb") as file:
            values = unsealed(file.read(_MOST_MANIFEST + 1))
    except FileNotFoundError:
        if is_pack(path):
            raise UserError(f"{path}: is not a whole pack, it has no {MANIFEST}; type dytrun data pack … again, and it "
                            "goes on where it was") from None  # fmt: skip
        raise UserError(f"{path}: is no pack; give a directory that dytrun data pack has made") from None
    except OSError as error:
        raise UserError(f"{manifest}: cannot be read ({_reason(error)}); mend that") from None
    except ValueError as error:
        raise UserError(f"{manifest}: {error}; pack it again") from None
    if values.get("format") != FORMAT:
        raise UserError(f"{manifest}: format {values.get('format')!r}, and this dytrun reads {FORMAT}; take the "
                        "version that has made it, or pack it again")  # fmt: skip
    try:
        return Manifest.model_validate(values)
    except ValidationError as error:
        where = ".".join(map(str, error.errors()[0]["loc"]))
        raise UserError(f"{manifest}: {where} is not as it should be; pack it again") from None


def verify(path: Path, manifest: Manifest, report: Callable[[int, int, bool], None]) -> list[str]:
    """Read every byte of a pack and say what is damaged, a line each; nothing where nothing is.

    Args:
        path: of the pack.
        manifest: its pack.json, as `open_pack` gives it.
        report: is told of images and bytes that were read.
    """
    problems: list[str] = []
    for split, entry in manifest.splits.items():
        try:
            images = PackedImages(path, split, manifest)
        except UserError as error:
            problems += error.problems
            problems += [said for number, shard in enumerate(entry.shards)
                         if (said := _file_fault(shard_path(path, split, number), shard))]  # fmt: skip
            continue
        for number, shard in enumerate(entry.shards):
            file = shard_path(path, split, number)
            try:
                found = list(images.check_all(number, shard.sha256, report))
            except OSError as error:
                found = [f"{file}: cannot be read ({_reason(error)})"]
            problems += found
    known = {MANIFEST, *(f"{split}.index" for split in manifest.splits)}
    known |= {shard_path(path, split, number).name for split, entry in manifest.splits.items()
              for number in range(len(entry.shards))}  # fmt: skip
    strange = sorted(one.name for one in path.iterdir() if one.name not in known and not one.name.startswith("."))
    return list(dict.fromkeys(problems)) + [f"{path / name}: is no part of the pack" for name in strange]


def shard_path(pack: Path, split: str, number: int) -> Path:
    """Return where a shard lies."""
    return pack / f"{split}-{number:05d}{SHARD}"


def _checked(path: Path, entry: PackFile) -> bytes:
    """Read a file that is as pack.json says."""
    _check_size(path, entry.bytes)
    try:
        raw = path.read_bytes()
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({_reason(error)}); pack it again") from None
    if hashlib.sha256(raw).hexdigest() != entry.sha256:
        raise UserError(f"{path}: does not have its SHA-256: it is damaged, or of another pack; pack it again")
    return raw


def _check_size(path: Path, size: int) -> None:
    try:
        facts = path.stat()
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({_reason(error)}); pack it again") from None
    if not stat.S_ISREG(facts.st_mode):  # to open a named pipe may take forever
        raise UserError(f"{path}: is no regular file; pack it again")
    if facts.st_size != size:
        raise UserError(f"{path}: has {facts.st_size:,} bytes instead of {size:,}; pack it again")


def _file_fault(path: Path, entry: PackFile) -> str | None:
    try:
        _check_size(path, entry.bytes)
        with path.open("rb") as file:
            is_same = hashlib.file_digest(file, "sha256").hexdigest() == entry.sha256
    except UserError as error:
        return str(error)
    except OSError as error:
        return f"{path}: cannot be read ({_reason(error)})"
    return None if is_same else f"{path}: does not have its SHA-256"


def _reason(error: Exception) -> str:
    return (error.strerror if isinstance(error, OSError) else None) or first_line(error)
