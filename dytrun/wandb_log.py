"""W&B's transaction log, the file that an offline run is: how many rows of history it holds."""

import struct
from collections.abc import Iterator
from pathlib import Path

# W&B's transaction log is a LevelDB log: blocks, in which every piece has a checksum, a length and a kind.
_BLOCK, _PIECE = 32 * 1024, struct.Struct("<IHB")
_WHOLE, _LAST = 1, 4


def log_of(part: Path, run_id: str, marker: str = "") -> Path:
    """Return the transaction log of a run in an offline part, or a file that stands beside it."""
    return part / f"run-{run_id}.wandb{marker}"


def rows_in(log: Path) -> int:
    """Return the number after the last history step in a transaction log of W&B."""
    from wandb.proto import wandb_internal_pb2

    last = -1
    for data in _entries(log.read_bytes()):
        entry = wandb_internal_pb2.Record()  # pyright: ignore[reportAttributeAccessIssue]: made at import
        entry.ParseFromString(data)
        if entry.WhichOneof("record_type") == "history":
            last = max(last, entry.history.step.num)
    return last + 1


def _entries(data: bytes) -> Iterator[bytes]:
    place, entry = 7, b""  # after W&B's header
    while place + _PIECE.size <= len(data):
        rest = _BLOCK - place % _BLOCK
        if rest < _PIECE.size:
            place += rest
            continue
        _, size, kind = _PIECE.unpack_from(data, place)
        place += _PIECE.size + size
        if kind == 0 or place > len(data):
            return  # a block that was not written to its end
        entry += data[place - size : place]
        if kind in (_WHOLE, _LAST):
            yield entry
            entry = b""
