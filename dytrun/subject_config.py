"""Types and bounds of what is trained, and on what: models of images on images, a language model on text; no value."""

from collections.abc import Mapping
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, BeforeValidator, Discriminator, Field, Tag, model_validator
from pydantic_core import PydanticCustomError

from dytrun.alphas import IMAGES, llama_alphas
from dytrun.norm_config import STRICT, Count, PointWiseConfig, Positive

Fraction = Annotated[float, Field(ge=0, le=1)]
Rgb = tuple[float, float, float]
# A slug is safe as a part of a path: the identity of a run is a directory name.
Slug = Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{0,79}$")]


def _fits(path: str) -> str:
    # Linux's NAME_MAX and PATH_MAX: past them every look at a file is an error.
    if len(path.encode()) > 4095 or any(len(part.encode()) > 255 for part in path.split("/")):
        raise PydanticCustomError("path_too_long", "longer than a path can be; give another")
    return path


# Of a file or a folder, and fit for a terminal.
FilePath = Annotated[str, Field(pattern=r"^[^\x00-\x1f\x7f]+$"), AfterValidator(_fits)]
# YAML 1.1 reads a bare `off` as false.
unbool = BeforeValidator(lambda value: {True: "on", False: "off"}[value] if isinstance(value, bool) else value)


class ModelConfig(BaseModel):
    """Which timm model, built how."""

    model_config = STRICT
    name: Slug
    """timm's name of an architecture, without weights."""
    drop_path: Fraction | None
    """Stochastic depth of the last block; null leaves it to the model."""
    kwargs: dict[str, Any]
    """The model's own construction arguments."""


class LlamaConfig(BaseModel):
    """Hugging Face's LlamaForCausalLM over bytes; as many keys as queries, and an output layer of its own."""

    model_config = STRICT
    name: Literal["llama"]
    width: Count
    """Of the hidden states."""
    depth: Count
    heads: Count
    hidden: Count
    """Width between the linear layers of a feed-forward block."""
    init_std: Literal["auto"] | Positive
    """Standard deviation of every weight matrix at the start; auto: the root of 1/width."""
    embedding_scale: Annotated[Literal["auto", "on", "off"], unbool]
    """Whether a learnable scalar, at first the root of the width, follows the embedding; auto: of point-wise norms."""

    @model_validator(mode="after")
    def _heads_fit(self) -> "LlamaConfig":
        if self.width % (2 * self.heads):
            raise ValueError(f"model.heads: {self.heads} heads cannot share a width of {self.width} in even parts; "
                             "choose others")  # fmt: skip
        return self


class DataConfig(BaseModel):
    """Which images, and how they are brought to the model's size."""

    model_config = STRICT
    name: Literal["imagenet", "folder", "imagenette", "cifar10", "cifar100", "fashion_mnist", "digits", "synthetic"]
    root: FilePath | None
    download: bool
    train_split: Slug
    val_split: Slug
    image_size: Annotated[int, Field(ge=4, le=4096)]
    """Side of the square image that the model sees, in pixels."""
    mean: Rgb
    std: tuple[Positive, Positive, Positive]
    crop_pct: Annotated[float, Field(gt=0, le=1)] | None
    """Share of the resized short side that the centre crop keeps in evaluation."""
    num_classes: Annotated[int, Field(ge=2)] | None
    num_train: Count | None
    """Training images, for plans made without the data; the data decides."""
    max_bad_fraction: Fraction
    """Share of the training images that may be unreadable and replaced by others of their class."""

    @model_validator(mode="after")
    def _lies_somewhere(self) -> "DataConfig":
        if self.root is not None and self.name in ("digits", "synthetic"):
            raise ValueError(f"data.root: {self.name} comes with dytrun, and {self.root} is not read; leave it null")
        return self


class TextConfig(BaseModel):
    """Which text, byte by byte."""

    model_config = STRICT
    name: Literal["text"]
    root: FilePath | None
    """A file or a tree of files; null: the docstrings of Python's standard library."""
    context: Annotated[int, Field(ge=2, le=65536, strict=True)]
    """Bytes that the model sees at once."""


def _kind(value: Any) -> str:
    name = value.get("name") if isinstance(value, Mapping) else getattr(value, "name", None)
    return "llama" if name == "llama" else "timm"


AnyModelConfig = Annotated[
    Annotated[ModelConfig, Tag("timm")] | Annotated[LlamaConfig, Tag("llama")], Discriminator(_kind)
]  # fmt: skip
AnyDataConfig = Annotated[DataConfig | TextConfig, Field(discriminator="name")]


def settled(values: Any) -> Any:
    """Replace what a norm leaves to the model (`auto`) by what the papers have for that model: types, alpha_init.

    A LLaMA's alpha before attention becomes the first of norm.rules, so that rules of the user's own count more. Text
    needs no loader processes, so that all cores compute.
    """
    if not isinstance(values, Mapping) or not all(isinstance(values.get(key), Mapping) for key in ("model", "norm")):
        return values  # validation will say so
    model, norm = values["model"], dict(values["norm"])
    is_llama = _kind(model) == "llama"
    if norm.get("types") == "auto":
        norm["types"] = ["rmsnorm" if is_llama else "layernorm"]
    if norm.get("alpha_init") == "auto":
        norm["alpha_init"] = IMAGES
        width = model.get("width")
        if is_llama and isinstance(width, int) and width > 0:
            attention, norm["alpha_init"] = llama_alphas(width)
            if attention != norm["alpha_init"] and isinstance(norm.get("rules"), Mapping):
                norm["rules"] = {"attention": attention} | norm["rules"]
    data, machine = values.get("data"), values.get("machine")
    is_text = isinstance(data, Mapping) and data.get("name") == "text"
    if is_text and isinstance(machine, Mapping) and machine.get("workers") == "auto":
        values = {**values, "machine": {**machine, "workers": 0}}
    return {**values, "norm": norm}


def text_problems(config: Any) -> list[str]:
    """Say which parts of a RunConfig do not fit together because one is of text and another of images."""
    is_llama, is_text = isinstance(config.model, LlamaConfig), isinstance(config.data, TextConfig)
    if is_llama != is_text:
        model = (
            "data=text takes a language model, say model=llama" if is_text else "model=llama reads text, say data=text"
        )
        return [f"model, data: {model}"]
    if not is_text:
        return []
    augment, problems = config.augment, []
    if config.norm.name == "ln":
        problems.append("norm: model=llama has no LayerNorm to keep; its baseline is norm=rms")
    if config.norm.name == "group":
        problems.append("norm: group takes its statistics over all bytes of a window, also those that are still to be "
                        "predicted; choose rms, or a point-wise norm")  # fmt: skip
    if (
        augment.scale
        or augment.rand_augment
        or augment.mixes
        or any((augment.hflip, augment.color_jitter, augment.erase_prob, augment.smoothing))
    ):
        problems.append("augment: text is not augmented; say augment=none")
    if config.machine.loader != "torch":
        problems.append(f"machine.loader: {config.machine.loader} decodes images, and data=text is in memory; "
                        "leave it torch")  # fmt: skip
    if config.machine.workers not in ("auto", 0):
        problems.append("machine.workers: data=text is in memory, and no process loads it; leave it auto")
    if config.optim.layer_decay < 1:
        problems.append("optim.layer_decay: layers of model=llama are not numbered; leave it 1.0")
    if isinstance(config.norm, PointWiseConfig) and config.norm.calibrate:
        problems.append("norm.calibrate: fits to LayerNorms of models of images; leave it false")
    return problems
