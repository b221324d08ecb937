"""LayerNorm → DyT and its family: the one place where a model's norms change.

Structure-preserving, and it draws no random number: a model converted to DyT differs from its LayerNorm twin by the
alphas alone. weight and bias are taken over from the norm they replace (SwinV2 starts them at 0), what is missing stays
missing, and a fused activation stays where it was.
"""

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TypedDict, Unpack

import torch
from torch import nn

from dytrun.errors import UserError
from dytrun.foreign import eps_of
from dytrun.functions import FUNCTIONS
from dytrun.norm import GroupNorm, PointWise, RmsNorm
from dytrun.sites import FAMILIES, Site, chosen_by, matches, norm_sites, norms_left


@dataclass(frozen=True)
class Conversion:
    """What takes the place of which norms; see `sites.matches` for the patterns."""

    name: str = "dyt"
    """A function of functions.FUNCTIONS, `rms` or `group`."""
    alpha_init: float = 0.5
    rules: Mapping[str, float] = field(default_factory=dict)
    """Pattern → alpha_init; where several match, the last one counts."""
    shift_init: float | None = None
    learn_alpha: bool = True
    per_channel_alpha: bool = False
    affine: bool = True
    """False leaves weight and bias out."""
    num_groups: int = 1
    """Of `group`."""
    types: Sequence[str | type[nn.Module]] = ("layernorm",)
    """Families of norms that are replaced (sites.FAMILIES), or exact classes."""
    include: Sequence[str] | None = None
    exclude: Sequence[str] = ()

    def __post_init__(self) -> None:
        """Raise UserError for what no model could be converted with."""
        if self.name not in (*FUNCTIONS, "rms", "group"):
            raise UserError(f"norm: there is no '{self.name}'; there are {', '.join(FUNCTIONS)}, rms and group")
        for key, starts in (("alpha_init", {"": self.alpha_init}), ("rules", self.rules)):
            if not isinstance(starts, Mapping):
                raise UserError(f"norm.{key}: {starts!r} does not map patterns to alphas; say {{'attention': 0.8}}")
            for pattern, start in starts.items():
                if isinstance(start, bool) or not isinstance(start, int | float) or not 0 < start < math.inf:
                    raise UserError(f"norm.{key}: {pattern and f'{pattern}: '}{start!r} is no alpha to start from; "
                                    "give a positive number")  # fmt: skip
        for key in ("types", "include", "exclude"):
            if isinstance(getattr(self, key), str | type):
                raise UserError(f"norm.{key}: {getattr(self, key)!r} is one, and a list is asked for; put it into [ ]")
        if unknown := [one for one in self.types if not isinstance(one, type) and one not in FAMILIES]:
            raise UserError(f"norm.types: there is no {unknown[0]!r}; there are {', '.join(FAMILIES)}, and classes")
        if not self.types:
            raise UserError(f"norm.types: is empty; name some of {', '.join(FAMILIES)}, or classes")
        if self.num_groups < 1:
            raise UserError(f"norm.num_groups: {self.num_groups} is no number of groups; give 1 or more")


class Options(TypedDict, total=False):
    """The fields of Conversion that `convert_norms` takes by name."""

    alpha_init: float
    rules: Mapping[str, float]
    shift_init: float | None
    learn_alpha: bool
    per_channel_alpha: bool
    affine: bool
    num_groups: int
    types: Sequence[str | type[nn.Module]]
    include: Sequence[str] | None
    exclude: Sequence[str]


def chosen_sites(model: nn.Module, how: Conversion) -> tuple[list[Site], list[Site]]:
    """Return the sites that a conversion replaces, each with its alpha_init, and those of its types that it leaves.

    Raises:
        UserError: there are none, a pattern matches none, one has no twin, or channels that groups cannot share.
    """
    sites = norm_sites(model, how.types)
    if not sites:
        left = ", ".join(f"{count} {kind}" for kind, count in norms_left(model).items())
        raise UserError(
            f"norm: this model has no {' or '.join(_titled(family) for family in how.types)} to convert"
            + (f" (it has {left})" if left else "")
            + "; choose another model, norm.types, or norm=ln"
        )
    kept = sites if how.include is None else chosen_by("norm.include", how.include, sites)
    left_out = chosen_by("norm.exclude", how.exclude, sites) if how.exclude else []
    chosen = [site for site in kept if site not in left_out]
    if not chosen:
        raise UserError(f"norm: norm.include and norm.exclude leave none of the {len(sites)} sites; loosen one of them")
    if refused := [site for site in chosen if not site.has_twin]:
        raise UserError(
            f"norm: {len(refused)} norms of this model are of a kind that cannot be converted, first "
            f"{refused[0].name or 'the model itself'} ({refused[0].kind}); leave them out with norm.exclude, choose "
            "another model, or norm=ln"
        )
    for site in chosen:
        if how.name == "group" and site.num_channels % how.num_groups:
            raise UserError(
                f"norm.num_groups: {how.num_groups} groups cannot share the {site.num_channels} channels of "
                f"{site.name}; choose a divisor"
            )
    # A rule may mean a site that is left out: where alpha starts before attention is said for every LLaMA.
    chosen_by("norm.rules", list(how.rules), sites)
    return (
        [replace(site, alpha_init=_alpha_init(site, how)) for site in chosen],
        [site for site in sites if site not in chosen],
    )


def convert_norms(model: nn.Module, norm: Conversion | str = "dyt", **options: Unpack[Options]) -> list[Site]:
    """Replace the chosen norms of `model`, in place, and say which: `convert_norms(model, "derf", alpha_init=0.3)`.

    `options` are fields of Conversion; Derf has its shift, from 0 on, unless `shift_init` says otherwise.
    Device, dtype, training flag and requires_grad stay as they were; hooks on a norm go with it. Run it before the
    optimizer, EMA and DDP.

    Raises:
        UserError: as `chosen_sites`; the model is then as it was.
    """
    if norm == "derf":
        options.setdefault("shift_init", 0.0)
    how = replace(norm, **options) if isinstance(norm, Conversion) else Conversion(norm, **options)
    sites, _ = chosen_sites(model, how)
    twins: dict[nn.Module, nn.Module] = {}
    for site in sites:
        old = model.get_submodule(site.name)
        like = next(old.parameters(recurse=False), next(model.parameters(), torch.empty(0)))
        twins[old] = _twin(old, site, how, like)
    for parent, child, module in _children(model):
        if module in twins:
            setattr(parent, child, twins[module])
    for module in model.modules():
        if isinstance(module, nn.TransformerEncoderLayer) and {module.norm1, module.norm2} & set(twins.values()):
            # In evaluation torch would hand weight, bias and eps to a fused kernel that computes LayerNorm.
            module.activation_relu_or_gelu = 0
    return sites


def _twin(norm: nn.Module, site: Site, how: Conversion, like: torch.Tensor) -> nn.Module:
    """Return what takes the place of `norm`, with its very weight and bias; what is new is as the parameter `like`."""
    eps = eps_of(norm)
    axis = -1 if site.channels_last else 1
    twin = _layer(site, how, axis, torch.finfo(torch.float32).eps if eps is None else eps)
    twin.to(like.device, like.dtype).train(norm.training)
    if any(not parameter.requires_grad for parameter in norm.parameters(recurse=False)):
        twin.requires_grad_(False)  # alpha and shift of a frozen norm are frozen too
    if isinstance(twin, PointWise) and not how.learn_alpha:
        twin.alpha.requires_grad_(False)
    twin.replaced = tuple(name for name, _ in norm.named_parameters(recurse=False))
    twin.weight = getattr(norm, "weight", None) if how.affine else None
    if isinstance(twin, PointWise | GroupNorm):
        twin.bias = getattr(norm, "bias", None) if how.affine else None
    for name in ("drop", "act"):
        fused = getattr(norm, name, None)
        if fused is not None and not isinstance(fused, nn.Identity):
            # Without an affine part, it would overwrite what the backward pass needs.
            if hasattr(fused, "inplace"):
                fused.inplace = False
            setattr(twin, name, fused)
    return twin


def _layer(site: Site, how: Conversion, axis: int, eps: float) -> PointWise | RmsNorm | GroupNorm:
    if how.name == "rms":
        return RmsNorm(site.num_channels, axis, eps)
    if how.name == "group":
        return GroupNorm(site.num_channels, how.num_groups, axis, eps)
    layer = PointWise(site.num_channels, how.name, site.alpha_init or how.alpha_init, how.shift_init, axis,
                      how.per_channel_alpha)  # fmt: skip
    layer.eps = eps
    return layer


def _alpha_init(site: Site, how: Conversion) -> float | None:
    if how.name in ("rms", "group"):
        return None
    return [how.alpha_init, *(value for pattern, value in how.rules.items() if matches(pattern, site))][-1]


def _children(model: nn.Module) -> Iterator[tuple[nn.Module, str, nn.Module]]:
    """Yield every (parent, name in the parent, module); a shared module once for each of its places."""
    for parent in list(model.modules()):
        for child, module in list(parent._modules.items()):
            if module is not None:
                yield parent, child, module


def _titled(kind: str | type[nn.Module]) -> str:
    if isinstance(kind, type):
        return kind.__name__
    titles = {"layernorm": "LayerNorm", "rmsnorm": "RMSNorm", "simplenorm": "SimpleNorm", "groupnorm1": "GroupNorm1"}
    return titles.get(kind, kind)
