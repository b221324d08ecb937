"""The family of layers: values by hand, gradients in float64, dtypes, layouts, names; and the comparators."""

import copy
import math
import pickle
import subprocess
import sys

import pytest
import torch
from torch import nn

from dytrun.config import PointWiseConfig
from dytrun.functions import FUNCTIONS, dyt
from dytrun.norm import GroupNorm, PointWise, RmsNorm, formula

# f(z) at z = -3, -0.5, 0, 0.5 and 3, from the definitions with the standard library's math.
AT = (-3.0, -0.5, 0.0, 0.5, 3.0)
BY_HAND = {
    "dyt": math.tanh,
    "derf": math.erf,
    "identity": lambda z: z,
    "hardtanh": lambda z: min(1.0, max(-1.0, z)),
    "sigmoid": lambda z: 1 / (1 + math.exp(-z)),
    "satursin": lambda z: math.sin(min(math.pi / 2, max(-math.pi / 2, z))),
    "arcsinh_clip": lambda z: min(1.0, max(-1.0, math.asinh(z))),
    "exproot": lambda z: math.copysign(1 - math.exp(-math.sqrt(abs(z))), z),
    "arctan": lambda z: 2 / math.pi * math.atan(z),
    "smoothsign": lambda z: z / (1 + abs(z)),
    "isru": lambda z: z / math.sqrt(1 + z * z),
    "dyisru": lambda z: z / math.sqrt(1 + z * z),
    "expsign": lambda z: math.copysign(1 - math.exp(-abs(z)), z),
    "cubsign": lambda z: z**3 / (1 + abs(z) ** 3),
}


def test_the_family_is_whole_and_every_member_has_a_configuration():
    assert set(FUNCTIONS) == set(BY_HAND)
    assert set(PointWiseConfig.model_fields["name"].annotation.__args__) == set(FUNCTIONS)
    for name, f in FUNCTIONS.items():
        assert f.__doc__
        assert name == "dyisru" or f.__name__ == name


@pytest.mark.parametrize("name", BY_HAND)
def test_every_function_by_hand(name):
    found = FUNCTIONS[name](torch.tensor(AT, dtype=torch.float64))
    assert found.tolist() == pytest.approx([BY_HAND[name](z) for z in AT], abs=1e-15)


@pytest.mark.parametrize("name", BY_HAND)
def test_every_function_has_finite_values_and_gradients_everywhere(name):
    z = torch.tensor([-1e30, -1e4, -1.0, -1e-30, 0.0, 1e-30, 1.0, 1e4, 1e30], requires_grad=True)
    y = FUNCTIONS[name](z)
    y.sum().backward()
    assert bool(y.isfinite().all())
    assert bool(z.grad.isfinite().all())
    if name not in ("identity", "sigmoid"):
        assert bool((y.abs() <= 1).all()), "bounded"
        assert torch.equal(y, -FUNCTIONS[name](-z)), "centred at zero"
    assert bool((y.diff() >= 0).all()), "monotone"


# f'(0), from the definitions; exproot's is unbounded next to 0, and 0 is chosen at it.
SLOPE_AT_0 = {"dyt": 1, "derf": 2 / math.sqrt(math.pi), "identity": 1, "hardtanh": 1, "sigmoid": 0.25, "satursin": 1,
              "arcsinh_clip": 1, "exproot": 0, "arctan": 2 / math.pi, "smoothsign": 1, "isru": 1, "dyisru": 1,
              "expsign": 1, "cubsign": 0}  # fmt: skip


@pytest.mark.parametrize("name", FUNCTIONS)
def test_the_slope_at_zero(name):
    z = torch.zeros(1, dtype=torch.float64, requires_grad=True)
    FUNCTIONS[name](z).sum().backward()
    assert z.grad.item() == pytest.approx(SLOPE_AT_0[name])


@pytest.mark.parametrize("layer", [PointWise(8, "dyisru"), RmsNorm(8, -1, 1e-6), GroupNorm(8, 2, -1, 1e-6)])
def test_a_layer_of_bf16_weights_computes_in_float32(layer):
    x = torch.randn(3, 5, 8).bfloat16()
    exact = layer(x.float())
    assert layer.bfloat16()(x).dtype == torch.bfloat16
    torch.testing.assert_close(layer(x).float(), exact, rtol=2**-7, atol=2**-7)


def test_the_formula_by_hand():
    x = torch.tensor([[0.0, 1.0], [-2.0, 4.0]], dtype=torch.float64)
    alpha, shift = torch.tensor([0.5], dtype=torch.float64), torch.tensor([0.25], dtype=torch.float64)
    weight, bias = torch.tensor([1.0, 2.0], dtype=torch.float64), torch.tensor([0.25, -1.0], dtype=torch.float64)
    y = formula(dyt, x, (alpha, None), (weight, bias))
    expected = [[0.25, 2 * math.tanh(0.5) - 1], [math.tanh(-1) + 0.25, 2 * math.tanh(2) - 1]]
    assert torch.allclose(y, torch.tensor(expected, dtype=torch.float64), rtol=1e-15)
    y = formula(torch.erf, x, (alpha, shift), (weight, bias))
    expected = [[math.erf(0.25) + 0.25, 2 * math.erf(0.75) - 1], [math.erf(-0.75) + 0.25, 2 * math.erf(2.25) - 1]]
    assert torch.allclose(y, torch.tensor(expected, dtype=torch.float64), rtol=1e-15)
    channel = torch.tensor([0.5, 2.0], dtype=torch.float64)
    y = formula(dyt, x, (channel, None), (None, None))
    assert torch.allclose(y, torch.tanh(x * channel), rtol=1e-15)


# In a process of its own: the shape checks that the tests put around every function would be traced too.
_COMPILED = """
import torch
from dytrun.norm import FUNCTIONS, PointWise
for name in FUNCTIONS:
    torch._dynamo.reset()
    torch.manual_seed(0)
    layer = PointWise(8, name, 0.7, shift_init=0.1)
    compiled = torch.compile(layer, backend="aot_eager", fullgraph=True)
    outputs = []
    for module in (layer, compiled):
        layer.zero_grad()
        x = torch.linspace(-3, 3, 32).view(4, 8).requires_grad_()
        y = module(x)
        y.square().sum().backward()
        outputs.append([y.detach(), x.grad, *(p.grad for p in layer.parameters())])
    for one, other in zip(*outputs, strict=True):
        torch.testing.assert_close(one, other, msg=lambda text: f"{name}: {text}")
print(len(FUNCTIONS))
"""


@pytest.mark.slow
def test_every_member_compiles_in_one_piece_to_the_same_values():
    done = subprocess.run([sys.executable, "-c", _COMPILED], capture_output=True, text=True, timeout=550, check=False)
    assert done.stdout.split() == [str(len(FUNCTIONS))], done.stderr


def test_a_layer_survives_copying_and_pickling():
    layer = PointWise(4, "derf", 0.3, shift_init=0.1, channel_axis=1)
    x = torch.randn(2, 4, 3, 3)
    for other in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
        assert torch.equal(other(x), layer(x))
        assert repr(other) == repr(layer)


def test_dyisru_is_the_counterpart_of_rmsnorm():
    """y = sqrt(C) x / sqrt(beta + x²) with alpha = 1 / sqrt(beta), arXiv 2503.21708: bounded by sqrt(C)."""
    layer = PointWise(16, "dyisru", alpha_init=0.5)
    x = torch.tensor([[3.0] * 16])
    assert layer(x)[0, 0].item() == pytest.approx(4 * 3 / math.sqrt(1 / 0.5**2 + 9), rel=1e-6)
    assert layer(1e6 * x)[0, 0].item() == pytest.approx(4, rel=1e-6)
    layer.weight = layer.bias = None
    assert layer(x)[0, 0].item() == pytest.approx(4 * 3 / math.sqrt(13), rel=1e-6)


def test_parameters_are_those_of_the_references():
    def shapes(layer: nn.Module) -> dict[str, tuple[int, ...]]:
        return {name: tuple(p.shape) for name, p in layer.named_parameters()}

    layer = PointWise(6)
    assert shapes(layer) == {"alpha": (1,), "weight": (6,), "bias": (6,)}
    assert (layer.alpha.item(), layer.weight.tolist(), layer.bias.tolist()) == (0.5, [1.0] * 6, [0.0] * 6)
    derf = PointWise(6, "derf", shift_init=0.0)
    assert shapes(derf) == {"alpha": (1,), "shift": (1,), "weight": (6,), "bias": (6,)}
    assert derf.shift.item() == 0
    channels = PointWise(6, "derf", shift_init=0.0, per_channel_alpha=True)
    assert shapes(channels) == {"alpha": (6,), "shift": (6,), "weight": (6,), "bias": (6,)}
    assert repr(derf) == "PointWise(6, derf, alpha_init=0.5, channels_last)"


@pytest.mark.parametrize(("shape", "axis"), [((3, 5), -1), ((2, 3, 4, 5), -1), ((2, 5, 3, 4), 1)])
@pytest.mark.parametrize("size", [1, 5])
def test_gradients_in_float64(shape, axis, size):
    torch.manual_seed(0)
    x = torch.randn(shape, dtype=torch.float64, requires_grad=True)
    alpha, shift = (torch.full((size,), value, dtype=torch.float64, requires_grad=True) for value in (0.7, 0.1))
    weight, bias = (torch.randn(5, dtype=torch.float64, requires_grad=True) for _ in range(2))
    for f in (torch.tanh, FUNCTIONS["isru"]):
        assert torch.autograd.gradcheck(
            lambda x, a, s, w, b, f=f: formula(f, x, (a, s), (w, b), axis), (x, alpha, shift, weight, bias)
        )


@pytest.mark.parametrize("name", FUNCTIONS)
def test_channels_first_is_channels_last_moved(name):
    torch.manual_seed(0)
    first = PointWise(5, name, 0.7, 0.1, channel_axis=1, per_channel_alpha=True)
    nn.init.normal_(first.weight)
    nn.init.normal_(first.bias)
    last = PointWise(5, name, 0.7, 0.1, per_channel_alpha=True)
    last.load_state_dict(first.state_dict())
    x = torch.randn(2, 5, 3, 4)
    assert torch.equal(first(x), last(x.movedim(1, -1)).movedim(-1, 1))


def test_a_square_image_with_as_many_channels_uses_the_channel_axis():
    # Where W = C, the wrong axis would broadcast without a word.
    x, weight = torch.ones(1, 3, 3, 3), torch.tensor([1.0, 2.0, 3.0])
    y = formula(dyt, x, (torch.tensor([1.0]), None), (weight, None), 1)
    for channel in range(3):
        assert y[0, channel].unique().item() == pytest.approx((channel + 1) * math.tanh(1), rel=1e-6)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
def test_maths_is_float32_or_better_and_the_dtype_is_that_of_the_input(dtype):
    torch.manual_seed(0)
    x, alpha = torch.randn(64, 8).to(dtype), torch.tensor([0.5])
    weight, bias = torch.randn(8), torch.randn(8)
    y = formula(dyt, x, (alpha, None), (weight, bias))
    exact = weight.double() * torch.tanh(0.5 * x.double()) + bias.double()
    assert y.dtype == dtype
    # One rounding to the output dtype, and one of float32 on the way to it.
    bound = (torch.finfo(dtype).eps + 4 * torch.finfo(torch.float32).eps) * (exact.abs() + weight.abs() + bias.abs())
    assert bool(((y.double() - exact).abs() <= bound).all())


def test_missing_affine_parts_stay_missing():
    x, alpha = torch.randn(2, 3), torch.tensor([0.5])
    assert torch.equal(formula(dyt, x, (alpha, None), (None, None)), torch.tanh(0.5 * x))
    assert formula(dyt, torch.empty(0, 3), (alpha, None), (None, None)).shape == (0, 3)


def test_the_gradient_of_alpha_is_a_sum_a_row_first():
    """The expanded alpha is what lets a compiler fold its gradient into the one backward kernel."""
    x, alpha = torch.randn(4, 6), torch.tensor([0.5], requires_grad=True)
    node = formula(dyt, x, (alpha, None), (None, None)).grad_fn
    names = []
    while node is not None and node.next_functions:
        names.append(type(node).__name__)
        node = node.next_functions[0][0]
    assert "ExpandBackward0" in names


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_rmsnorm_by_hand_in_both_layouts(dtype):
    torch.manual_seed(0)
    last, first = RmsNorm(6, -1, 1e-6), RmsNorm(6, 1, 1e-6)
    nn.init.normal_(last.weight)
    first.load_state_dict(last.state_dict())
    x = torch.randn(2, 3, 4, 6).to(dtype)
    exact = x.double() / (x.double().square().mean(-1, keepdim=True) + 1e-6).sqrt() * last.weight.double()
    assert last(x).dtype == dtype
    assert torch.allclose(last(x).double(), exact, rtol=torch.finfo(dtype).eps, atol=1e-6)
    assert torch.equal(first(x.movedim(-1, 1)).movedim(1, -1), last(x))


def test_groupnorm_spans_the_tokens_of_an_image():
    torch.manual_seed(0)
    layer = GroupNorm(6, 2, -1, 1e-6)
    x = torch.randn(2, 5, 6)
    grouped = x.double().view(2, 5, 2, 3)
    mean, var = grouped.mean((1, 3), keepdim=True), grouped.var((1, 3), keepdim=True, unbiased=False)
    exact = ((grouped - mean) / (var + 1e-6).sqrt()).view(2, 5, 6)
    assert torch.allclose(layer(x).double(), exact, atol=1e-5)
    first = GroupNorm(6, 2, 1, 1e-6)
    pixels = torch.randn(2, 6, 3, 4)
    assert torch.equal(first(pixels), nn.functional.group_norm(pixels, 2, first.weight, first.bias, 1e-6))
