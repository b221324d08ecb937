"""Images in parquet files, as Hugging Face's `datasets` writes them: image {bytes, path} and label.

`imagenet-1k` has its images as `n01440764_10026_n01440764.JPEG`, the class once more behind the name (its
`imagenet-1k.py` makes the label of that): they are given the names that ImageNet's own files have, so that the pack is
that of the class folders. Rows lie in no order of classes, so they are read row group by row group.
"""

import json
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from dytrun.errors import UserError, first_line
from dytrun.folders import Listing, shortened
from dytrun.images import Unreadable

_BYTES, _PATH, _LABEL = "image.bytes", "image.path", "label"
# Where no names of classes are noted, they are numbered up to the largest label: one of nonsense would make a billion.
_MOST_CLASSES = 1_000_000
_IMAGENET = re.compile(r"(.+)_(n\d{8})(\.\w+)")


class _Group(NamedTuple):
    """A row group and its place in the split."""

    file: Path
    number: int
    first: int
    end: int


class _Columns(NamedTuple):
    """What is known of a split without its images."""

    paths: list[str]
    labels: np.ndarray
    groups: list[_Group]
    classes: list[str] | None
    """Their names, where `datasets` has noted them."""


class _Groups:
    """(first, end) → the bytes of these rows; a row group at a time is in memory."""

    def __init__(self, groups: Sequence[_Group]):
        self._groups = groups

    def __call__(self, first: int, end: int) -> Iterator[bytes | Unreadable]:
        for group in self._groups:
            if group.first < end and group.end > first:
                rows = range(max(first, group.first), min(end, group.end))
                for row, data in zip(rows, _bytes(group, rows), strict=True):
                    where = f"{group.file}: row {row - group.first} of row group {group.number}"
                    yield Unreadable(where, "it has no bytes") if not isinstance(data, bytes) else data


def find_parquet(root: Path, splits: Sequence[str]) -> dict[str, list[Path]]:
    """Return the files of the splits (train, val) that there are, in `root` or its data/; `validation` is val's too."""
    found = {}
    paths = sorted([*root.glob("*.parquet"), *root.glob("data/*.parquet")])
    for split, names in zip(splits, ([splits[0]], [splits[1], "validation"]), strict=True):
        pattern = re.compile(rf"({'|'.join(map(re.escape, names))})(-.*)?\.parquet")
        if files := [path for path in paths if pattern.fullmatch(path.name)]:
            found[split] = files
    return found


def list_parquet(found: Mapping[str, Sequence[Path]]) -> tuple[list[str], dict[str, Listing]]:
    """List the class names, in the order of their numbers, and the images of each split.

    Raises:
        UserError: pyarrow is not here; a file cannot be read, or has not these columns; a label that no class has.
    """
    try:
        import pyarrow.parquet  # noqa: F401
    except ImportError:
        raise UserError("source: parquet files want pyarrow; it is missing; pip install 'dytrun[parquet]'") from None
    columns = {split: _columns(files) for split, files in found.items()}
    classes = next((one.classes for one in columns.values() if one.classes), None)
    num = len(classes) if classes else 1 + max(int(one.labels.max(initial=0)) for one in columns.values())
    if not classes and num > _MOST_CLASSES:
        raise UserError(f"source: a label of {num - 1:,}, and no names of classes; number the classes from 0")
    for split, one in columns.items():
        if len(one.labels) == 0 or one.labels.min() < 0 or one.labels.max() >= num:
            raise UserError(f"source: {split} has a label that is no class (or no row); there are {num} classes")
    classes = classes or [f"{place:0{len(str(num - 1))}d}" for place in range(num)]
    classes = [name.replace("/", "_").replace("\0", "_") for name in classes]
    if len(set(classes)) < num or not all(name.strip(".") for name in classes):
        raise UserError(f"source: class names that are the same, or empty ({shortened(sorted(classes))}); mend them")
    if wnids := _imagenet_classes(columns.values(), num):
        classes = wnids
        columns = {split: one._replace(paths=[_IMAGENET.sub(r"\1\3", path) for path in one.paths])
                   for split, one in columns.items()}  # fmt: skip
    return classes, {split: _listing(one, classes) for split, one in columns.items()}


def _imagenet_classes(splits: Iterable[_Columns], num: int) -> list[str] | None:
    """Return the classes' names if every path ends in its own, and their order is that of the labels."""
    of_label: dict[int, str] = {}
    for one in splits:
        for path, label in zip(one.paths, one.labels.tolist(), strict=True):
            match = _IMAGENET.fullmatch(path)
            if match is None or of_label.setdefault(label, match[2]) != match[2]:
                return None
    found = [of_label.get(label, "") for label in range(num)]
    return found if all(found) and found == sorted(set(found)) else None


def _listing(one: _Columns, classes: Sequence[str]) -> Listing:
    labels, groups = one.labels, one.groups
    names = [f"{classes[label]}/{path}" for path, label in zip(one.paths, labels.tolist(), strict=True)]
    sizes = np.zeros(len(names), dtype=np.int64)
    for group in groups:
        sizes[group.first : group.end] = _group_bytes(group) // max(1, group.end - group.first)
    cuts = np.array([group.end for group in groups], dtype=np.int64)
    return Listing(names, labels, sizes, False, cuts, _Groups(groups))


def _columns(files: Sequence[Path]) -> _Columns:
    """Read names, labels, row groups and the names of the classes; nothing of the images."""
    import pyarrow
    from pyarrow import parquet

    paths: list[str | None] = []
    labels: list[int | None] = []
    groups: list[_Group] = []
    names = None
    for path in files:
        try:
            with parquet.ParquetFile(path) as file:
                schema = {column.path for column in map(file.schema.column, range(len(file.schema)))}
                if missing := {_BYTES, _PATH, _LABEL} - schema:
                    raise UserError(f"{path}: has no column {shortened(sorted(missing))}; image {{bytes, path}} and "
                                    "label are wanted, as in imagenet-1k")  # fmt: skip
                names = names or _class_names(file.schema_arrow.metadata or {})
                table = file.read(columns=[_PATH, _LABEL], use_threads=False)
                for chunk in table.column("image").chunks:
                    paths += chunk.field("path").to_pylist()
                labels += table.column("label").to_pylist()
                for number in range(file.num_row_groups):
                    first = groups[-1].end if groups else 0
                    groups.append(_Group(path, number, first, first + file.metadata.row_group(number).num_rows))
        except (pyarrow.ArrowException, OSError, ValueError) as error:
            raise UserError(f"{path}: cannot be read as parquet ({first_line(error)}); fetch it again") from None
    if not all(isinstance(label, int) and abs(label) < 1 << 63 for label in labels):
        raise UserError(f"{files[0].parent}: has rows whose label is missing or no number; mend them")
    if not all(path is None or isinstance(path, str) for path in paths):
        raise UserError(f"{files[0].parent}: has rows whose path is no text; mend them")
    digits = len(str(len(paths)))
    told = [_file_name(path) or f"{row:0{digits}d}" for row, path in enumerate(paths)]
    return _Columns(told, np.array(labels, dtype=np.int64), [one for one in groups if one.end > one.first], names)


def _file_name(path: str | None) -> str:
    return (path or "").replace("\0", "_").rpartition("/")[2]


def _class_names(metadata: Mapping[bytes, bytes]) -> list[str] | None:
    """Return what `datasets` has noted of the classes; None where it has not."""
    try:
        names = json.loads(metadata[b"huggingface"])["info"]["features"]["label"]["names"]
    except (KeyError, TypeError, ValueError, RecursionError):
        return None
    if not (isinstance(names, list) and names and all(isinstance(name, str) for name in names)):
        return None
    return [name.encode(errors="replace").decode() for name in names]  # JSON may hold what no UTF-8 has


def _group_bytes(group: _Group) -> int:
    from pyarrow import parquet

    with parquet.ParquetFile(group.file) as file:
        row_group = file.metadata.row_group(group.number)
        columns = map(row_group.column, range(row_group.num_columns))
        return sum(column.total_uncompressed_size for column in columns if column.path_in_schema == _BYTES)


def _bytes(group: _Group, rows: range) -> Iterator[Any]:
    import pyarrow
    from pyarrow import parquet

    try:
        with parquet.ParquetFile(group.file) as file:
            table = file.read_row_group(group.number, columns=[_BYTES], use_threads=False)
        column = pyarrow.chunked_array([chunk.field("bytes") for chunk in table.column("image").chunks])
    except (pyarrow.ArrowException, OSError, ValueError) as error:
        raise UserError(f"{group.file}: cannot be read as parquet ({first_line(error)}); fetch it again") from None
    for row in rows:
        yield column[row - group.first].as_py()
