"""Which norms a model has, where they sit, and which of them a pattern means.

A site has a role, read off its neighbours in the module tree: `attention` (or what else mixes tokens) or `feed_forward`
(the norm of that sub-layer), `qk` (of queries or keys), `final` (after the last block), `other` (stem, …); and, inside
a block, the number of that block.
"""

import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import NamedTuple

from timm.layers import norm as timm_norm
from timm.layers import norm_act
from timm.layers.grn import GlobalResponseNorm
from timm.models import metaformer
from torch import nn

from dytrun.errors import UserError


class Kind(NamedTuple):
    """What an exact class of norm is."""

    family: str
    channel_axis: int


# By exact type, never isinstance: timm's LayerNormAct is an nn.LayerNorm that also activates, and
# LayerNorm2dFp32 is channels-first without being a LayerNorm2d.
KINDS: dict[type[nn.Module], Kind] = {
    nn.LayerNorm: Kind("layernorm", -1),
    timm_norm.LayerNorm: Kind("layernorm", -1),
    timm_norm.LayerNormFp32: Kind("layernorm", -1),
    timm_norm.LayerNorm2d: Kind("layernorm", 1),
    timm_norm.LayerNorm2dFp32: Kind("layernorm", 1),
    timm_norm.LayerNormExp2d: Kind("layernorm", 1),
    norm_act.LayerNormAct: Kind("layernorm", -1),
    norm_act.LayerNormActFp32: Kind("layernorm", -1),
    norm_act.LayerNormAct2d: Kind("layernorm", 1),
    norm_act.LayerNormAct2dFp32: Kind("layernorm", 1),
    metaformer.LayerNormNoBias: Kind("layernorm", -1),
    metaformer.LayerNorm2dNoBias: Kind("layernorm", 1),
    nn.RMSNorm: Kind("rmsnorm", -1),
    timm_norm.RmsNorm: Kind("rmsnorm", -1),
    timm_norm.RmsNormFp32: Kind("rmsnorm", -1),
    timm_norm.RmsNorm2d: Kind("rmsnorm", 1),
    timm_norm.RmsNorm2dFp32: Kind("rmsnorm", 1),
    norm_act.RmsNormAct: Kind("rmsnorm", -1),
    norm_act.RmsNormActFp32: Kind("rmsnorm", -1),
    norm_act.RmsNormAct2d: Kind("rmsnorm", 1),
    norm_act.RmsNormAct2dFp32: Kind("rmsnorm", 1),
    timm_norm.SimpleNorm: Kind("simplenorm", -1),
    timm_norm.SimpleNormFp32: Kind("simplenorm", -1),
    timm_norm.SimpleNorm2d: Kind("simplenorm", 1),
    timm_norm.SimpleNorm2dFp32: Kind("simplenorm", 1),
    timm_norm.GroupNorm1: Kind("groupnorm1", 1),
    norm_act.GroupNorm1Act: Kind("groupnorm1", 1),
    metaformer.GroupNorm1NoBias: Kind("groupnorm1", 1),
    nn.GroupNorm: Kind("groupnorm1", 1),  # with one group; others are left
}
# What counts as a norm of a family; where its exact type is not known above, it has no twin.
_FAMILIES: dict[str, tuple[type[nn.Module], ...]] = {
    "layernorm": (nn.LayerNorm,),
    "rmsnorm": (nn.RMSNorm, timm_norm.RmsNorm, timm_norm.RmsNormFp32, timm_norm.RmsNorm2d, timm_norm.RmsNorm2dFp32),
    "simplenorm": (timm_norm.SimpleNorm, timm_norm.SimpleNormFp32, timm_norm.SimpleNorm2d, timm_norm.SimpleNorm2dFp32),
    "groupnorm1": (nn.GroupNorm,),
}
FAMILIES = tuple(_FAMILIES)
_OTHER_NORMS = (nn.modules.batchnorm._NormBase, GlobalResponseNorm)
ROLES = ("attention", "feed_forward", "qk", "final", "other")

_QK = re.compile(r"(q|k|v|kv)_?(norm|ln)|(norm|ln)_?(q|k|v|kv)")
_NO_LAYER = (nn.Identity, nn.Dropout)  # attn_drop is no attention
_HEAD = re.compile(r"head|pool|fc_norm")
_ATTENTION = re.compile(r"attn|attention|mixer|token|modulation", re.IGNORECASE)  # whatever mixes tokens
_FEED_FORWARD = re.compile(r"mlp|ffn|feed_?forward", re.IGNORECASE)


@dataclass(frozen=True)
class Site:
    """A norm of a model."""

    name: str
    kind: str
    """Name of its class."""
    family: str
    num_channels: int
    channels_last: bool
    role: str
    block: int | None
    """Number of the block that it belongs to, from 0 and over all stages; None outside blocks."""
    has_twin: bool
    """False for a class that is not known here, several normalized axes, or a norm that is the whole model."""
    alpha_init: float | None = None
    """Where its alpha starts, once it is a point-wise layer that has one."""


def norm_sites(model: nn.Module, families: Sequence[str] = ("layernorm",)) -> list[Site]:
    """List every norm of these families in the order of the model's modules; a shared one once."""
    found = [(name, module, _family(module)) for name, module in model.named_modules()]
    # Places are told from all norms, so that they do not depend on which families are asked for.
    places = _places(model, [name for name, _, family in found if family is not None])
    return [
        Site(
            name=name,
            kind=type(module).__name__,
            family=family,
            num_channels=_shape(module)[-1],
            channels_last=KINDS.get(type(module), Kind(family, -1)).channel_axis == -1,
            role=places[name][0],
            block=places[name][1],
            has_twin=bool(name) and type(module) in KINDS and len(_shape(module)) == 1,
        )
        for name, module, family in found
        if family is not None and family in families
    ]


def norms_left(model: nn.Module) -> dict[str, int]:
    """Count the norms that are still in a model, whatever their kind (BatchNorm and GRN too), by class name."""
    kinds = (*_OTHER_NORMS, *(kind for family in _FAMILIES.values() for kind in family))
    return dict(Counter(type(module).__name__ for module in model.modules() if isinstance(module, kinds)))


def matches(pattern: str, site: Site) -> bool:
    """Say whether a pattern means a site.

    A pattern is a role, a class name (`LayerNorm2d`) or a glob over the dotted name (`blocks.*.norm1`); `@A-B` after it
    keeps blocks A to B, `@A` block A alone: `attention@0-5`, `*@11`.
    """
    what, _, span = pattern.partition("@")
    if span:
        first, _, last = span.partition("-")
        if site.block is None or not int(first) <= site.block <= int(last or first):
            return False
    return what in (site.role, site.kind) or fnmatchcase(site.name, what)


def chosen_by(key: str, patterns: Sequence[str], sites: Sequence[Site]) -> list[Site]:
    """Return the sites that any of the patterns means; `key` is where they stand in the configuration.

    Raises:
        UserError: a pattern means none of them.
    """
    for pattern in patterns:
        if not any(matches(pattern, site) for site in sites):
            raise UserError(
                f"{key}: '{pattern}' matches no site of this model; a pattern is a role ({', '.join(ROLES)}), a class "
                f"name or a glob such as '{sites[0].name}', with @A-B for blocks; dry_run=true lists the sites"
            )
    return [site for site in sites if any(matches(pattern, site) for pattern in patterns)]


def _family(module: nn.Module) -> str | None:
    if getattr(module, "num_groups", 1) != 1:
        return None
    return next((family for family, kinds in _FAMILIES.items() if isinstance(module, kinds)), None)


def _shape(module: nn.Module) -> tuple[int, ...]:
    if isinstance(module, nn.GroupNorm):
        return (module.num_channels,)
    return tuple(module.normalized_shape)  # pyright: ignore[reportArgumentType]  every other family has it


def _places(model: nn.Module, names: Sequence[str]) -> dict[str, tuple[str, int | None]]:
    """Return the role and the block of each norm."""
    modules = dict(model.named_modules())
    roles = {name: _role_in_block(modules, name) for name in names}
    inside = [index for index, name in enumerate(names) if roles[name] != "other"]
    last = max(inside, default=len(names))
    blocks: dict[str, int] = {}
    places: dict[str, tuple[str, int | None]] = {}
    for index, name in enumerate(names):
        path = _block_path(name, roles[name])
        block = blocks.setdefault(path, len(blocks)) if path else None
        places[name] = ("final" if index > last else roles[name], block)
    return places


def _role_in_block(modules: dict[str, nn.Module], name: str) -> str:
    """Return the role of a norm by its own name, else by its nearest neighbours or container; `other` if none tells."""
    *path, own = name.split(".")
    if not path or _HEAD.search(path[0]):
        return "other"
    if _QK.fullmatch(own):
        return "qk"
    for depth in range(len(path), 0, -1):
        container = modules[".".join(path[:depth])]
        child = name.split(".")[depth]
        if role := _role_among(container, child):
            return role
        if "block" not in path[depth - 1] and (role := _sublayer(path[depth - 1])):
            return role
    return "other"


def _role_among(container: nn.Module, own: str) -> str | None:
    """Return the role of the sub-layer that belongs to the norm in child `own`, if the container has sub-layers.

    A block starts with a norm, whose sub-layer follows it, or with a sub-layer, which its norm follows.
    """
    order: list[tuple[str, str | None]] = []
    for name, child in container.named_children():
        is_norm = name == own or _family(child) is not None
        role = None if is_norm or isinstance(child, _NO_LAYER) else _sublayer(name) or _sublayer(type(child).__name__)
        if is_norm or role or any(_family(inner) is not None for inner in child.children()):
            order.append((name, role))
    place = [name for name, _ in order].index(own)
    neighbours = order[place:] if order[0][1] is None else order[place::-1]
    return next((role for _, role in neighbours if role), None)


def _sublayer(name: str) -> str | None:
    for pattern, role in ((_ATTENTION, "attention"), (_FEED_FORWARD, "feed_forward")):
        if pattern.search(name):
            return role
    return None


def _block_path(name: str, role: str) -> str | None:
    """Return the path of the block that a norm is in, down to its number; None outside blocks."""
    parts = name.split(".")[:-1]
    if role == "other":
        # A stem, a downsampling, a head: in a block only where something on the way is called one.
        named = [index for index, part in enumerate(parts[:-1]) if "block" in part and parts[index + 1].isdigit()]
        return ".".join(parts[: named[-1] + 2]) if named else None
    inner = [index for index, part in enumerate(parts) if "block" not in part and _sublayer(part)]
    parts = parts[: inner[0]] if inner else parts
    numbers = [index for index, part in enumerate(parts) if part.isdigit()]
    return ".".join(parts[: numbers[-1] + 1]) if numbers else None
