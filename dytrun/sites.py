"""Which norms a model has, where they sit, and which of them a pattern means.

A site has a role, read off its neighbours in the module tree: `attention` (or what else mixes tokens) or `feed_forward`
(the norm of that sub-layer), `qk` (of queries or keys), `final` (after the last block), `other` (stem, …); and, inside
a block, the number of that block.
"""

import functools
import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase

from torch import nn

from dytrun import foreign
from dytrun.errors import UserError
from dytrun.foreign import Kind

# By exact class, never isinstance: timm's LayerNormAct is an nn.LayerNorm that also activates, and LayerNorm2dFp32 is
# channels-first without being a LayerNorm2d. By its full name, so that a model from elsewhere does not need timm here.
KINDS: dict[str, Kind] = {
    "torch.nn.modules.normalization.LayerNorm": Kind("layernorm", -1),
    "timm.layers.norm.LayerNorm": Kind("layernorm", -1),
    "timm.layers.norm.LayerNormFp32": Kind("layernorm", -1),
    "timm.layers.norm.LayerNorm2d": Kind("layernorm", 1),
    "timm.layers.norm.LayerNorm2dFp32": Kind("layernorm", 1),
    "timm.layers.norm.LayerNormExp2d": Kind("layernorm", 1),
    "timm.layers.norm_act.LayerNormAct": Kind("layernorm", -1),
    "timm.layers.norm_act.LayerNormActFp32": Kind("layernorm", -1),
    "timm.layers.norm_act.LayerNormAct2d": Kind("layernorm", 1),
    "timm.layers.norm_act.LayerNormAct2dFp32": Kind("layernorm", 1),
    "timm.models.metaformer.LayerNormNoBias": Kind("layernorm", -1),
    "timm.models.metaformer.LayerNorm2dNoBias": Kind("layernorm", 1),
    "torch.nn.modules.normalization.RMSNorm": Kind("rmsnorm", -1),
    "timm.layers.norm.RmsNorm": Kind("rmsnorm", -1),
    "timm.layers.norm.RmsNormFp32": Kind("rmsnorm", -1),
    "timm.layers.norm.RmsNorm2d": Kind("rmsnorm", 1),
    "timm.layers.norm.RmsNorm2dFp32": Kind("rmsnorm", 1),
    "timm.layers.norm_act.RmsNormAct": Kind("rmsnorm", -1),
    "timm.layers.norm_act.RmsNormActFp32": Kind("rmsnorm", -1),
    "timm.layers.norm_act.RmsNormAct2d": Kind("rmsnorm", 1),
    "timm.layers.norm_act.RmsNormAct2dFp32": Kind("rmsnorm", 1),
    "timm.layers.norm.SimpleNorm": Kind("simplenorm", -1),
    "timm.layers.norm.SimpleNormFp32": Kind("simplenorm", -1),
    "timm.layers.norm.SimpleNorm2d": Kind("simplenorm", 1),
    "timm.layers.norm.SimpleNorm2dFp32": Kind("simplenorm", 1),
    "timm.layers.norm.GroupNorm1": Kind("groupnorm1", 1),
    "timm.layers.norm_act.GroupNorm1Act": Kind("groupnorm1", 1),
    "timm.models.metaformer.GroupNorm1NoBias": Kind("groupnorm1", 1),
    "torch.nn.modules.normalization.GroupNorm": Kind("groupnorm1", 1),  # with one group; others are left
}
# What counts as a norm of a family, with all that derives from it; where a class is not known above, `foreign` is asked
# what it computes.
_FAMILIES: dict[str, tuple[str, ...]] = {
    "layernorm": ("torch.nn.modules.normalization.LayerNorm",),
    "rmsnorm": (
        "torch.nn.modules.normalization.RMSNorm", "timm.layers.norm.RmsNorm", "timm.layers.norm.RmsNormFp32",
        "timm.layers.norm.RmsNorm2d", "timm.layers.norm.RmsNorm2dFp32",
    ),
    "simplenorm": (
        "timm.layers.norm.SimpleNorm", "timm.layers.norm.SimpleNormFp32", "timm.layers.norm.SimpleNorm2d",
        "timm.layers.norm.SimpleNorm2dFp32",
    ),
    "groupnorm1": ("torch.nn.modules.normalization.GroupNorm",),
}  # fmt: skip
FAMILIES = tuple(_FAMILIES)
_OTHER_NORMS = ("torch.nn.modules.batchnorm._NormBase", "timm.layers.grn.GlobalResponseNorm")
ROLES = ("attention", "feed_forward", "qk", "final", "other")

_PATTERN = re.compile(r"([^@]+)(?:@(\d+)(?:-(\d+))?)?")
_QK = re.compile(r"(q|k|v|kv)(_a)?_?(layer_?)?(norm|ln)|(norm|ln)_?(added_)?(q|k|v|kv)")
_NO_LAYER = (nn.Identity, nn.Dropout)  # attn_drop is no attention
_HEAD = re.compile(r"head|pool|fc_norm")
_ATTENTION = re.compile(r"attn|attention|mixer|token|modulation", re.IGNORECASE)  # whatever mixes tokens
_FEED_FORWARD = re.compile(r"mlp|ffn|feed_?forward|intermediate|dense_?(relu|act|gated)", re.IGNORECASE)
# Hugging Face's blocks often register their norms after both sub-layers, so that only these names tell which is whose.
_NAMED = {
    "input_layernorm": "attention", "pre_attention_layernorm": "attention", "attention_layernorm": "attention",
    "pre_self_attn_layernorm": "attention", "post_self_attn_layernorm": "attention",
    "self_attn_layer_norm": "attention", "encoder_attn_layer_norm": "attention", "layernorm_before": "attention",
    "operator_norm": "attention",
    "pre_feedforward_layernorm": "feed_forward", "post_feedforward_layernorm": "feed_forward",
    "feedforward_layernorm": "feed_forward", "pre_mlp_layernorm": "feed_forward",
    "post_mlp_layernorm": "feed_forward", "pre_ff_layernorm": "feed_forward", "layernorm_after": "feed_forward",
    "ffn_norm": "feed_forward",
}  # fmt: skip
# What stands before the attention; where a block has none of these, its `post_attention_layernorm` is the attention's.
_BEFORE_ATTENTION = ("input_layernorm", "pre_attention_layernorm")


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


def norm_sites(model: nn.Module, types: Sequence[str | type[nn.Module]] = ("layernorm",)) -> list[Site]:
    """List every norm of these types in the order of the model's modules; a shared one once.

    A type is a family of FAMILIES or an exact class.
    """
    classes = tuple(one for one in types if isinstance(one, type))
    found = [(name, module, _family(module)) for name, module in model.named_modules()]
    # Places are told from all norms, so that they do not depend on which types are asked for.
    all_norms = [name for name, module, family in found if family is not None or type(module) in classes]
    places = _places(model, all_norms)
    return [
        _site(name, module, family or "layernorm", places[name])
        for name, module, family in found
        if (family is not None and family in types) or type(module) in classes
    ]


def _site(name: str, module: nn.Module, family: str, place: tuple[str, int | None]) -> Site:
    shape = _shape(module)
    kind = KINDS.get(full_name(type(module))) or foreign.kind_of(module)
    return Site(
        name=name,
        kind=type(module).__name__,
        family=family if kind is None else kind.family,
        num_channels=shape[-1] if shape else 0,
        channels_last=kind is None or kind.channel_axis == -1,
        role=place[0],
        block=place[1],
        has_twin=bool(name) and kind is not None and len(shape) == 1,
    )


def full_name(kind: type) -> str:
    """Return where a class is defined, and its name there."""
    return f"{kind.__module__}.{kind.__qualname__}"


def norms_left(model: nn.Module) -> dict[str, int]:
    """Count the norms that are still in a model, whatever their kind (BatchNorm and GRN too), by class name."""
    kinds = (*_OTHER_NORMS, *(kind for family in _FAMILIES.values() for kind in family))
    return dict(Counter(type(module).__name__ for module in model.modules()
                        if _is_a(type(module), kinds) or foreign.family_of(module) is not None))  # fmt: skip


def matches(pattern: str, site: Site) -> bool:
    """Say whether a pattern means a site.

    A pattern is a role, a class name (`LayerNorm2d`) or a glob over the dotted name (`blocks.*.norm1`); `@A-B` after it
    keeps blocks A to B, `@A` block A alone: `attention@0-5`, `*@11`.
    """
    parts = _PATTERN.fullmatch(pattern)
    if parts is None:
        return False
    what, first, last = parts.groups()
    if first and (site.block is None or not int(first) <= site.block <= int(last or first)):
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
    known = next((family for family, kinds in _FAMILIES.items() if _is_a(type(module), kinds)), None)
    return known or foreign.family_of(module)


@functools.cache
def _is_a(kind: type, names: tuple[str, ...]) -> bool:
    """Say whether a class is one of these, or derives from it."""
    return any(full_name(one) in names for one in kind.__mro__)


def _shape(module: nn.Module) -> tuple[int, ...]:
    if isinstance(module, nn.GroupNorm):
        return (module.num_channels,)
    return foreign.shape_of(module)


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
    if role := _role_by_name(modules[".".join(path)], path, own):
        return role
    for depth in range(len(path), 0, -1):
        container = modules[".".join(path[:depth])]
        child = name.split(".")[depth]
        if role := _role_among(container, child):
            return role
        if "block" not in path[depth - 1] and (role := _sublayer(path[depth - 1])):
            return role
    return "other"


def _role_by_name(container: nn.Module, path: Sequence[str], own: str) -> str | None:
    """Return the role that Hugging Face's name of a norm tells, in its container at `path`."""
    siblings = dict(container.named_children())
    if own == "post_attention_layernorm":  # before the feed-forward layer in LLaMA, after the attention in OLMo 2
        is_before = any(name in siblings for name in _BEFORE_ATTENTION) and "pre_feedforward_layernorm" not in siblings
        return "feed_forward" if is_before else "attention"
    if own == "final_layer_norm" and path[-1].isdigit():  # of a block, as fairseq names it
        return "feed_forward"
    return _NAMED.get(own)


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
    if "embed" in name.lower():  # token embeddings mix no tokens
        return None
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
    if [parts[index - 1] for index in numbers[-2:]] == ["block", "layer"]:  # T5 numbers the sub-layers of a block too
        numbers.pop()
    return ".".join(parts[: numbers[-1] + 1]) if numbers else None
