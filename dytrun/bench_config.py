"""Types and bounds of what `dytrun bench` can be told; no value (those live in conf/bench/)."""

from typing import Annotated, Any, Literal, NamedTuple

from pydantic import AfterValidator, BaseModel, Field
from pydantic_core import PydanticCustomError

from dytrun.config import FilePath, RunConfig
from dytrun.norm_config import STRICT, Count, Positive


def _each_once(names: list[Any]) -> list[Any]:
    if len({*names}) < len(names):
        raise PydanticCustomError("twice", "each should be named once")
    return names


# Of two values nothing can be said; an interval of 0.99 needs eight.
_ROUNDS = Annotated[int, Field(ge=3, le=10_000, strict=True)]
_CONFIDENCE = Annotated[float, Field(gt=0.5, lt=1)]
_AutoCount = Literal["auto"] | Count
_Workers = Annotated[int, Field(ge=0, le=1024, strict=True)]
Shape = Annotated[str, Field(pattern=r"^[1-9]\d*(x[1-9]\d*)+$|^[1-9]\d*(x[1-9]\d*){3}:channels_(first|last)$")]
NormArm = Literal["ln", "dyt", "formula", "sigmoid", "plain", "native", "torch", "triton", "liger", "rms", "identity"]
ModelArm = Literal["ln", "dyt", "formula", "rms", "identity"]
StackArm = Literal["rms", "rms_fused", "plain", "dyt", "formula", "identity"]
Modes = Annotated[list[Literal["eager", "compiled"]], Field(min_length=1), AfterValidator(_each_once)]
Passes = Annotated[list[Literal["train", "infer"]], Field(min_length=1), AfterValidator(_each_once)]


class NormBench(BaseModel):
    """`bench=norm`: one layer."""

    model_config = STRICT
    name: Literal["norm"]
    shapes: Annotated[list[Shape], Field(min_length=1)] | None
    arms: Annotated[list[NormArm], Field(min_length=2)] | None
    modes: Modes
    rounds: _ROUNDS
    unit_ms: Positive
    confidence: _CONFIDENCE
    out: FilePath | None


class ModelBench(BaseModel):
    """`bench=model`: a whole model."""

    model_config = STRICT
    name: Literal["model"]
    arms: Annotated[list[ModelArm], Field(min_length=2)]
    modes: Modes
    passes: Passes
    batch: _AutoCount
    rounds: _ROUNDS
    steps: _AutoCount
    confidence: _CONFIDENCE
    out: FilePath | None


class TrainerBench(BaseModel):
    """`bench=trainer`: the loop of `dytrun train` against a bare one."""

    model_config = STRICT
    name: Literal["trainer"]
    batch: _AutoCount
    rounds: _ROUNDS
    steps: Count
    confidence: _CONFIDENCE
    out: FilePath | None


class StackBench(BaseModel):
    """`bench=llama`: blocks of a language model, as in the paper's table of efficiency."""

    model_config = STRICT
    name: Literal["llama"]
    arms: Annotated[list[StackArm], Field(min_length=2)]
    modes: Annotated[
        list[Literal["eager", "norms_compiled", "compiled"]], Field(min_length=1), AfterValidator(_each_once)
    ]
    passes: Passes
    size: Literal["auto", "small", "7b"]
    depth: _AutoCount
    length: _AutoCount
    rounds: _ROUNDS
    confidence: _CONFIDENCE
    out: FilePath | None


class DataBench(BaseModel):
    """`bench=data`: the loader, and whether it feeds the model."""

    model_config = STRICT
    name: Literal["data"]
    peer: Literal["timm"] | None
    peer_root: FilePath | None
    workers: Annotated[list[_Workers], Field(min_length=1), AfterValidator(_each_once)] | None
    batch: _AutoCount
    rounds: _ROUNDS
    unit_s: Positive
    device: bool
    confidence: _CONFIDENCE
    out: FilePath | None


class BenchOptions(BaseModel):
    """The group `bench`."""

    model_config = STRICT
    bench: Annotated[NormBench | ModelBench | TrainerBench | StackBench | DataBench, Field(discriminator="name")]


class BenchConfig(NamedTuple):
    """`dytrun bench`: what is measured, and the run whose model, precision and machine are meant."""

    bench: Any
    run: RunConfig
