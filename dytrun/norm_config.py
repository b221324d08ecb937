"""Types and bounds of what can be configured of a norm; no value (those live in conf/norm/)."""

from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field

STRICT = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

Positive = Annotated[float, Field(gt=0)]
Count = Annotated[int, Field(ge=1, strict=True)]
# A role, a class name or a glob over the dotted name, and blocks: attention, LayerNorm2d, blocks.*.norm1@0-5.
SitePattern = Annotated[str, Field(pattern=r"^[^@\s]+(@\d+(-\d+)?)?$")]
NormTypes = Annotated[list[Literal["layernorm", "rmsnorm", "simplenorm", "groupnorm1"]], Field(min_length=1)]


class LayerNormConfig(BaseModel):
    """The model untouched."""

    model_config = STRICT
    name: Literal["ln"]


class PointWiseConfig(BaseModel):
    """weight * f(alpha * x [+ shift]) + bias in the place of norms; norm.py has the functions and their sources."""

    model_config = STRICT
    name: Literal[
        "dyt", "derf", "identity", "hardtanh", "sigmoid", "satursin", "arcsinh_clip", "exproot", "arctan", "smoothsign",
        "isru", "dyisru", "expsign", "cubsign",
    ]  # fmt: skip
    alpha_init: Positive
    rules: dict[SitePattern, Positive]
    """Site pattern → alpha_init; where several match, the last one counts."""
    shift_init: float | None
    learn_alpha: bool
    per_channel_alpha: bool
    affine: bool
    types: NormTypes
    include: list[SitePattern] | None
    exclude: list[SitePattern]
    calibrate: bool
    """Whether alpha, weight and bias of each site are fitted to the trained norm of `init_from`."""
    calibrate_images: Annotated[int, Field(ge=1, le=8192, strict=True)]
    """They are on the device all at once."""

    @property
    def fitted_parts(self) -> list[str]:
        """What calibration chooses; with no bend in the function, alpha and weight are one number."""
        learns_alpha = self.learn_alpha and self.name != "identity"
        return ["alpha"] * learns_alpha + ["weight", "bias"] * self.affine


class RmsNormConfig(BaseModel):
    """RMSNorm in the place of norms."""

    model_config = STRICT
    name: Literal["rms"]
    affine: bool
    types: NormTypes
    include: list[SitePattern] | None
    exclude: list[SitePattern]


class GroupNormConfig(BaseModel):
    """GroupNorm in the place of norms."""

    model_config = STRICT
    name: Literal["group"]
    num_groups: Count
    affine: bool
    types: NormTypes
    include: list[SitePattern] | None
    exclude: list[SitePattern]


NormConfig = Annotated[LayerNormConfig | PointWiseConfig | RmsNormConfig | GroupNormConfig, Field(discriminator="name")]
