"""The point-wise layers that take the place of a norm.

    DyT(x) = weight * tanh(alpha * x) + bias        Zhu et al. 2025, arXiv 2503.10622, equation 1

alpha is one learnable scalar a layer; weight and bias are one value a channel. No statistics are computed.
Axes: channels last (..., C), as tokens have them, or channels first (B, C, H, W).
"""

import torch
from jaxtyping import Float
from torch import Tensor, nn

# Said in every result: which implementation a speed belongs to.
FORMULA = "row-expanded formula"


def dyt(
    x: Float[Tensor, "..."],
    alpha: Float[Tensor, "1"],
    weight: Float[Tensor, "c"] | None,
    bias: Float[Tensor, "c"] | None,
    channel_axis: int = -1,
) -> Float[Tensor, "..."]:
    """Compute weight * tanh(alpha * x) + bias, in float32 or better, and return it in the dtype of x.

    alpha is expanded over rows before it is used. The value is the same, but its gradient then is a sum a row
    followed by a small sum, which torch.compile folds into the one backward kernel of x, weight and bias; the
    gradient of an unexpanded scalar costs a pass over the activations of its own.
    """
    rows = list(x.shape)
    rows[channel_axis] = 1
    maths = torch.promote_types(x.dtype, torch.float32)
    y = torch.tanh(alpha.expand(rows) * x.to(maths))
    shape = [1] * x.ndim
    shape[channel_axis] = -1
    if weight is not None:
        y = y * weight.view(shape)
    if bias is not None:
        y = y + bias.view(shape)
    return y.to(x.dtype)


class DynamicTanh(nn.Module):
    """Dynamic Tanh in the place of a LayerNorm over `num_channels`.

    Parameters carry the names of the reference implementation (jiachenzhu/DyT, dynamic_tanh.py), so that state
    dicts are exchangeable: `alpha` of shape (1,), `weight` and `bias` of shape (C,), each of the latter two
    missing where the norm had none.
    """

    def __init__(self, num_channels: int, alpha_init: float, channel_axis: int = -1):
        super().__init__()
        self.num_channels = num_channels
        self.alpha_init = alpha_init
        self.channel_axis = channel_axis
        self.alpha = nn.Parameter(torch.full((1,), alpha_init))
        self.weight: nn.Parameter | None = nn.Parameter(torch.ones(num_channels))
        self.bias: nn.Parameter | None = nn.Parameter(torch.zeros(num_channels))

    def forward(self, x: Float[Tensor, "..."]) -> Float[Tensor, "..."]:
        """Map activations of any shape with `num_channels` on the channel axis to the same shape and dtype."""
        return dyt(x, self.alpha, self.weight, self.bias, self.channel_axis)

    def extra_repr(self) -> str:
        """Say channels, initial alpha and layout."""
        layout = "channels_last" if self.channel_axis == -1 else "channels_first"
        return f"{self.num_channels}, alpha_init={self.alpha_init:g}, {layout}"
