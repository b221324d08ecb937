"""A configuration → the model of its arm: built, its norms converted, its weights drawn."""

from torch import nn

from dytrun import augment
from dytrun.config import NormConfig, PointWiseConfig, RunConfig, TextConfig
from dytrun.convert import Conversion, convert_norms
from dytrun.data import INIT
from dytrun.language import build_language_model
from dytrun.library import scale_embedding
from dytrun.model import build_model
from dytrun.sites import Site, norm_sites
from dytrun.subject_config import LlamaConfig


def build_arm(config: RunConfig, num_classes: int, device: str = "cpu") -> tuple[nn.Module, list[Site]]:
    """Build the model of a run and convert its norms; all arms of a pair start from bit-equal weights.

    Returns the model and the sites that were converted, or with norm=ln the LayerNorms that it has.

    Raises:
        UserError: the model cannot be built or converted.
    """
    model = build_plain(config, num_classes, device)
    if config.norm.name == "ln":
        return model, norm_sites(model)
    sites = convert_norms(model, conversion(config.norm))
    if isinstance(config.model, LlamaConfig) and is_scaled(config.model, config.norm):
        scale_embedding(model.get_input_embeddings())  # pyright: ignore[reportCallIssue]
    return model, sites


def is_scaled(model: LlamaConfig, norm: NormConfig) -> bool:
    """Say whether a learnable scalar follows the embedding."""
    return model.embedding_scale == "on" or (model.embedding_scale == "auto" and isinstance(norm, PointWiseConfig))


def build_plain(config: RunConfig, num_classes: int, device: str = "cpu") -> nn.Module:
    """Build the model of a run with the norms that timm, or Hugging Face, gives it."""
    augment.seeded(config.seed, INIT)
    if isinstance(config.model, LlamaConfig):
        assert isinstance(config.data, TextConfig)
        return build_language_model(config.model, num_classes, config.data.context, device)
    return build_model(config.model, num_classes, config.images.image_size, device)


def conversion(norm: NormConfig) -> Conversion:
    """Return what a configuration asks of the converter."""
    return Conversion(**norm.model_dump(exclude={"calibrate", "calibrate_images"}))
