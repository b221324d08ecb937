"""What other programs may import: the layers, the converter, and what language models need besides.

Needs torch and jaxtyping: neither Hydra, W&B nor timm. What is here keeps its meaning within a major version.
"""

import math

import torch
from torch import Tensor, nn

from dytrun.alphas import llama_alphas
from dytrun.convert import convert_norms
from dytrun.errors import UserError
from dytrun.norm import PointWise
from dytrun.sites import Site

__all__ = [
    "Derf", "DynamicTanh", "PointWise", "Site", "UserError", "convert_norms", "end_zero_init", "llama_rules",
    "scale_embedding",
]  # fmt: skip


def DynamicTanh(  # noqa: N802  stands where a class of norms stands
    num_channels: int,
    alpha_init: float = 0.5,
    bias: bool = True,
    channels_first: bool = False,
    device: torch.device | str | None = None,
    dtype: torch.dtype | None = None,
) -> PointWise:
    """Build a DyT layer, weight * tanh(alpha * x) + bias (arXiv 2503.10622): (..., C) to the same shape.

    Args:
        num_channels: C.
        alpha_init: of the one learnable scalar.
        bias: False leaves it out, as in a language model.
        channels_first: for (B, C, H, W).
        device: of the parameters.
        dtype: of the parameters; the maths is float32 at least.
    """
    return _layer(PointWise(num_channels, "dyt", alpha_init, None, 1 if channels_first else -1), bias, device, dtype)


def Derf(  # noqa: N802
    num_channels: int,
    alpha_init: float = 0.5,
    bias: bool = True,
    channels_first: bool = False,
    device: torch.device | str | None = None,
    dtype: torch.dtype | None = None,
) -> PointWise:
    """Build a Derf layer, weight * erf(alpha * x + shift) + bias (arXiv 2512.10938); arguments as `DynamicTanh`'s."""
    return _layer(PointWise(num_channels, "derf", alpha_init, 0.0, 1 if channels_first else -1), bias, device, dtype)


def llama_rules(width: int) -> dict[str, float]:
    """Return the rules for `convert_norms` with which the paper trains a LLaMA of this width: alpha before attention.

    Between two widths of its table both alphas are interpolated on a log-log scale, which is our choice; below 1024 and
    above 8192 they are those of the nearest width.

    Raises:
        UserError: the width is no positive number.
    """
    if not isinstance(width, int) or width < 1:
        raise UserError(f"llama_rules: {width!r} is no width of hidden states")
    attention, other = llama_alphas(width)
    return {"*": other, "attention": attention}


def scale_embedding(embedding: nn.Embedding) -> nn.Parameter:
    """Multiply what an embedding gives by a learnable scalar that starts at the root of its width; return the scalar.

    Without it a LLaMA with DyT hardly learns (arXiv 2503.10622 v2, section 7). The weight stays as it is, also where an
    output layer shares it; the state dict gets `scale`, of shape (1,).

    Raises:
        UserError: it is no embedding, or has such a scalar already.
    """
    if not isinstance(embedding, nn.Embedding):
        raise UserError(f"scale_embedding: a {type(embedding).__name__} is no nn.Embedding; say "
                        "model.get_input_embeddings() for a model of Hugging Face")  # fmt: skip
    if hasattr(embedding, "scale"):
        raise UserError("scale_embedding: this embedding is scaled already")
    start = torch.full((1,), math.sqrt(embedding.embedding_dim), device=embedding.weight.device)
    embedding.scale = nn.Parameter(start.to(embedding.weight.dtype))
    embedding.register_forward_hook(_scaled)
    return embedding.scale


@torch.no_grad()
def end_zero_init(model: nn.Module) -> list[str]:
    """Draw the weights of the linear layers and convolutions that are all zero, and return their names.

    DiT starts its modulation and output layers at zero, which serves LayerNorm and hurts DyT: the paper keeps it for
    LayerNorm alone (arXiv 2503.10622 v2, appendix A; issue 18 of jiachenzhu/DyT). They are drawn as DiT draws its other
    layers, Xavier-uniform, from torch's global generator; biases stay.
    """
    kinds = nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d
    found = {name: layer for name, layer in model.named_modules() if isinstance(layer, kinds)}
    zero = [name for name, layer in found.items() if not bool(layer.weight.any())]
    for name in zero:
        weight = found[name].weight
        # Flat, as DiT draws them, and then copied: of a weight that is channels last a flat view is none.
        weight.copy_(nn.init.xavier_uniform_(torch.empty_like(weight.flatten(1))).view(weight.shape))
    return zero


def _scaled(embedding: nn.Module, _args: tuple[Tensor, ...], output: Tensor) -> Tensor:
    return output * embedding.get_parameter("scale")


def _layer(layer: PointWise, has_bias: bool, device: torch.device | str | None, dtype: torch.dtype | None) -> PointWise:
    if not has_bias:
        layer.bias = None
    return layer.to(device=device, dtype=dtype)
