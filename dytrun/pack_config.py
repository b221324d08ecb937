"""Types and bounds of what `dytrun data pack` and `dytrun data verify` are told; no value (those live in conf/)."""

from typing import Annotated, Literal

from pydantic import BaseModel, Field, model_validator

from dytrun.config import FilePath, Slug
from dytrun.norm_config import STRICT, Count, Positive


class PackConfig(BaseModel):
    """`dytrun data pack SRC`."""

    model_config = STRICT
    source: FilePath
    out: FilePath
    short_side: Annotated[int, Field(ge=16, le=8192, strict=True)] | None
    """Pixels."""
    quality: Literal["auto"] | Annotated[int, Field(ge=1, le=100, strict=True)]
    keep_unreadable: bool
    train_split: Slug
    val_split: Slug
    val_labels: FilePath | None
    workers: Literal["auto"] | Count
    shard_mib: Literal["auto"] | Positive

    @model_validator(mode="after")
    def _parts_fit(self) -> "PackConfig":
        problems = []
        if self.short_side is None and self.quality != "auto":
            problems.append(f"quality: {self.quality}, but without short_side=N nothing is encoded; say that too")
        if self.short_side is None and self.keep_unreadable:
            problems.append("keep_unreadable: without short_side=N nothing is decoded; leave it out")
        if self.train_split == self.val_split:
            problems.append(f"val_split: {self.val_split} is train_split too; name another")
        if problems:
            raise ValueError("\n".join(problems))
        return self


class VerifyConfig(BaseModel):
    """`dytrun data verify DIR`."""

    model_config = STRICT
    dir: FilePath
