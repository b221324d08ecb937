"""Blocks of a language model shaped like LLaMA's, around one of several norms: what DyT's paper timed.

Two norms a block and one at the end, rotary embeddings, causal attention, SwiGLU; no linear layer has a bias. There is
no vocabulary: hidden states come in and go out.

DyT has no bias here, and its alpha begins at 0.5, as where the paper measures time. (Where it trains such models, alpha
depends on width and place, and a learnable scalar follows the embedding, without which they hardly learn. That is one
product a model, and is left out.)
"""

import math
from typing import NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from dytrun.norm import IMPLEMENTATIONS, PointWise, compiled_implementation, implementation


class Size(NamedTuple):
    """Of a block."""

    width: int
    heads: int
    hidden: int


SIZES = {"7b": Size(4096, 32, 11008), "small": Size(256, 4, 688)}
_EPS = 1e-5  # Llama 2's
_ALPHA = 0.5
_ROTARY_BASE = 10_000.0


class UnfusedRms(nn.Module):
    """RMSNorm operator by operator, as Hugging Face's LlamaRMSNorm computes it: the baseline of the paper's table."""

    def __init__(self, width: int):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))

    def forward(self, x: Float[Tensor, "... c"]) -> Float[Tensor, "... c"]:
        """Divide each token by its root mean square in float32, and weigh it in its own dtype."""
        maths = x.to(torch.float32)
        maths = maths * torch.rsqrt(maths.pow(2).mean(-1, keepdim=True) + _EPS)
        return self.weight * maths.to(x.dtype)


class PlainDyt(nn.Module):
    """DyT as its paper writes it, in three operators and in the dtype of its input: what the paper timed."""

    def __init__(self, width: int):
        super().__init__()
        self.alpha = nn.Parameter(torch.full((1,), _ALPHA))
        self.weight = nn.Parameter(torch.ones(width))

    def forward(self, x: Float[Tensor, "... c"]) -> Float[Tensor, "... c"]:
        """Map each value by itself."""
        return self.weight * torch.tanh(self.alpha * x)


class Attention(nn.Module):
    """Causal self-attention; as many keys as queries, as LLaMA-7B has them."""

    def __init__(self, size: Size, like: Tensor):
        super().__init__()
        self.heads = size.heads
        self.query, self.key, self.value, self.out = (_linear(size.width, size.width, like) for _ in range(4))

    def forward(self, x: Float[Tensor, "b t c"], turns: Float[Tensor, "2 t d"]) -> Float[Tensor, "b t c"]:
        """Let every token look at itself and at those before it; `turns` is `rotary`'s."""
        layers = (self.query, self.key, self.value)
        q, k, v = (layer(x).unflatten(-1, (self.heads, -1)).transpose(1, 2) for layer in layers)
        y = F.scaled_dot_product_attention(turned(q, turns), turned(k, turns), v, is_causal=True)
        return self.out(y.transpose(1, 2).flatten(2))


class SwiGlu(nn.Module):
    """The feed-forward half of a block: silu(gate) * up, and down again."""

    def __init__(self, size: Size, like: Tensor):
        super().__init__()
        self.gate, self.up = (_linear(size.width, size.hidden, like) for _ in range(2))
        self.down = _linear(size.hidden, size.width, like)

    def forward(self, x: Float[Tensor, "b t c"]) -> Float[Tensor, "b t c"]:
        """Map each token by itself."""
        return self.down(F.silu(self.gate(x)) * self.up(x))


class Block(nn.Module):
    """Attention and feed-forward, each behind a norm and beside a residual."""

    def __init__(self, norms: tuple[nn.Module, nn.Module], attention: Attention, feed_forward: SwiGlu):
        super().__init__()
        self.attention_norm, self.feed_forward_norm = norms
        self.attention, self.feed_forward = attention, feed_forward

    def forward(self, x: Float[Tensor, "b t c"], turns: Float[Tensor, "2 t d"]) -> Float[Tensor, "b t c"]:
        """Add to the tokens what each half makes of them."""
        x = x + self.attention(self.attention_norm(x), turns)
        return x + self.feed_forward(self.feed_forward_norm(x))


Halves = list[tuple[Attention, SwiGlu]]


class Stack(nn.Module):
    """Blocks and a last norm. Attention and feed-forward are given, so that several stacks can share them."""

    def __init__(self, arm: str, halves: Halves, like: Float[Tensor, "b t c"]):
        super().__init__()
        width = like.shape[-1]
        norms = [norm_of(arm, width).to(like) for _ in range(2 * len(halves) + 1)]
        self.blocks = nn.ModuleList(
            Block((norms[2 * number], norms[2 * number + 1]), *pair) for number, pair in enumerate(halves)
        )
        self.norm = norms[-1]
        self.register_buffer("turns", rotary(like.shape[1], width // halves[0][0].heads).to(like), persistent=False)

    def forward(self, x: Float[Tensor, "b t c"]) -> Float[Tensor, "b t c"]:
        """Map the hidden states behind an embedding to those before a vocabulary."""
        for block in self.blocks:
            x = block(x, self.turns)
        return self.norm(x)

    def norms(self) -> list[nn.Module]:
        """Return the norms in the order in which they are called."""
        blocks = [block for block in self.blocks if isinstance(block, Block)]
        return [*(norm for block in blocks for norm in (block.attention_norm, block.feed_forward_norm)), self.norm]


def norm_of(arm: str, width: int) -> nn.Module:
    """Build the norm of an arm of `bench=llama`, in float32 on the CPU."""
    if arm in ("dyt", "formula"):
        layer = PointWise(width, "dyt", alpha_init=_ALPHA)
        layer.bias = None
        layer.implementation = "formula" if arm == "formula" else None
        return layer
    return {"rms": UnfusedRms, "rms_fused": _fused_rms, "plain": PlainDyt, "identity": nn.Identity}[arm](width)


def described(arm: str, is_compiled: bool, like: Tensor) -> str:
    """Say what computes the norms of an arm for such hidden states."""
    if arm == "identity":
        return "none"
    chosen = compiled_implementation(like.device, "dyt") if is_compiled else implementation(like, "dyt")
    dyt = "formula" if arm == "formula" else chosen
    written = {"rms": "float32, pow, mean, rsqrt, mul", "rms_fused": "F.rms_norm", "plain": "mul, tanh, mul"}
    said = written.get(arm) or IMPLEMENTATIONS[dyt]
    return f"{said}; compiled" if is_compiled else said


def halves(size: Size, depth: int, like: Tensor) -> Halves:
    """Build the parts of `depth` blocks that are no norms, on the device of `like` and in its dtype; always the same.

    Their weights are small enough at their ends that the hidden states stay as large as they came without any norm:
    squared from block to block (silu(gate) * up), they would be infinite after a few, and a GPU that multiplies
    infinities draws another power, and has another clock, than one that multiplies numbers.
    """
    found = [(Attention(size, like), SwiGlu(size, like)) for _ in range(depth)]
    random = torch.Generator(like.device).manual_seed(0)
    for attention, feed_forward in found:
        for half, end in ((attention, attention.out), (feed_forward, feed_forward.down)):
            for layer in half.children():
                scale = 1 / (2 * depth) if layer is end else 1.0
                weight = layer.get_parameter("weight")
                nn.init.normal_(weight, std=scale / math.sqrt(weight.shape[1]), generator=random)
    return found


def rotary(tokens: int, channels: int) -> Float[Tensor, "2 t d"]:
    """Return cosine and sine of the angles by which `turned` turns the channels of a head at each position.

    Channel i and channel i + channels/2 are turned together, as Hugging Face pairs them.
    """
    speeds = _ROTARY_BASE ** -(torch.arange(0, channels, 2) / channels)
    angles = (torch.arange(tokens)[:, None] * speeds).repeat(1, 2)
    return torch.stack([angles.cos(), angles.sin()])


def turned(x: Float[Tensor, "b h t d"], turns: Float[Tensor, "2 t d"]) -> Float[Tensor, "b h t d"]:
    """Turn queries or keys by their position (rotary embedding, arXiv 2104.09864)."""
    first, second = x.chunk(2, -1)
    return x * turns[0] + torch.cat([-second, first], -1) * turns[1]


def loss_of(y: Float[Tensor, "b t c"]) -> Float[Tensor, ""]:
    """Return a scalar whose gradients are neither zero nor infinite in half precision: the mean length² of a token."""
    return y.float().square().sum(-1).mean()


def _linear(width_in: int, width_out: int, like: Tensor) -> nn.Linear:
    # Not with torch's own initial weights: they would be drawn from its global generator, and overwritten.
    return nn.Linear(width_in, width_out, bias=False, device="meta", dtype=like.dtype).to_empty(device=like.device)


def _fused_rms(width: int) -> nn.RMSNorm:
    return nn.RMSNorm(width, _EPS)
