"""A configuration → the model of its arm: built, its norms converted, its weights drawn."""

from torch import nn

from dytrun import augment
from dytrun.config import NormConfig, RunConfig
from dytrun.convert import Conversion, convert_norms
from dytrun.data import INIT
from dytrun.model import build_model
from dytrun.sites import Site, norm_sites


def build_arm(config: RunConfig, num_classes: int, device: str = "cpu") -> tuple[nn.Module, list[Site]]:
    """Build the model of a run and convert its norms; all arms of a pair start from bit-equal weights.

    Returns the model and the sites that were converted, or with norm=ln the LayerNorms that it has.

    Raises:
        UserError: the model cannot be built or converted.
    """
    model = build_plain(config, num_classes, device)
    if config.norm.name == "ln":
        return model, norm_sites(model)
    return model, convert_norms(model, conversion(config.norm))


def build_plain(config: RunConfig, num_classes: int, device: str = "cpu") -> nn.Module:
    """Build the model of a run with the norms that timm gives it."""
    augment.seeded(config.seed, INIT)
    return build_model(config.model, num_classes, config.data.image_size, device)


def conversion(norm: NormConfig) -> Conversion:
    """Return what a configuration asks of the converter."""
    return Conversion(**norm.model_dump(exclude={"calibrate", "calibrate_images"}))
