"""DyT's formula, its gradients and its dtypes, against float64 and against numbers written out."""

import math

import pytest
import torch

from dytrun.norm import DynamicTanh, dyt


def test_the_formula_by_hand():
    x = torch.tensor([[0.0, 1.0], [-2.0, 4.0]], dtype=torch.float64)
    alpha = torch.tensor([0.5], dtype=torch.float64)
    weight, bias = torch.tensor([1.0, 2.0], dtype=torch.float64), torch.tensor([0.25, -1.0], dtype=torch.float64)
    y = dyt(x, alpha, weight, bias)
    # tanh(0.5) = 0.46211715726, tanh(1) = 0.76159415596, tanh(2) = 0.96402758008
    expected = [[0.25, 2 * 0.46211715726 - 1], [-0.76159415596 + 0.25, 2 * 0.96402758008 - 1]]
    torch.testing.assert_close(y, torch.tensor(expected, dtype=torch.float64), rtol=0, atol=1e-10)


def test_parameters_are_those_of_the_reference():
    layer = DynamicTanh(6, alpha_init=0.5)
    assert {name: tuple(p.shape) for name, p in layer.named_parameters()} == {
        "alpha": (1,), "weight": (6,), "bias": (6,),
    }  # fmt: skip
    assert layer.alpha.item() == 0.5
    assert layer.weight.tolist() == [1.0] * 6
    assert layer.bias.tolist() == [0.0] * 6


@pytest.mark.parametrize(("shape", "axis"), [((3, 5), -1), ((2, 3, 4, 5), -1), ((2, 5, 3, 4), 1)])
def test_gradients_in_float64(shape, axis):
    torch.manual_seed(0)
    x = torch.randn(shape, dtype=torch.float64, requires_grad=True)
    alpha = torch.tensor([0.7], dtype=torch.float64, requires_grad=True)
    weight, bias = (torch.randn(5, dtype=torch.float64, requires_grad=True) for _ in range(2))
    assert torch.autograd.gradcheck(lambda *args: dyt(*args, axis), (x, alpha, weight, bias))


def test_channels_first_is_channels_last_moved():
    torch.manual_seed(0)
    x = torch.randn(2, 5, 3, 4)
    alpha, weight, bias = torch.tensor([0.7]), torch.randn(5), torch.randn(5)
    first = dyt(x, alpha, weight, bias, 1)
    last = dyt(x.movedim(1, -1), alpha, weight, bias, -1).movedim(-1, 1)
    assert torch.equal(first, last)


def test_a_square_image_with_as_many_channels_uses_the_channel_axis():
    # Where W = C, the wrong axis would broadcast without a word.
    x, weight = torch.ones(1, 3, 3, 3), torch.tensor([1.0, 2.0, 3.0])
    y = dyt(x, torch.tensor([1.0]), weight, None, 1)
    for channel in range(3):
        assert y[0, channel].unique().item() == pytest.approx((channel + 1) * math.tanh(1), rel=1e-6)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
def test_maths_is_float32_or_better_and_the_dtype_is_that_of_the_input(dtype):
    torch.manual_seed(0)
    x, alpha = torch.randn(64, 8).to(dtype), torch.tensor([0.5])
    weight, bias = torch.randn(8), torch.randn(8)
    y = dyt(x, alpha, weight, bias)
    exact = weight.double() * torch.tanh(0.5 * x.double()) + bias.double()
    assert y.dtype == dtype
    # One rounding to the output dtype, and one of float32 on the way to it.
    bound = (torch.finfo(dtype).eps + 4 * torch.finfo(torch.float32).eps) * (exact.abs() + weight.abs() + bias.abs())
    assert bool(((y.double() - exact).abs() <= bound).all())


def test_missing_affine_parts_stay_missing():
    x, alpha = torch.randn(2, 3), torch.tensor([0.5])
    assert torch.equal(dyt(x, alpha, None, None), torch.tanh(0.5 * x))
    assert dyt(torch.empty(0, 3), alpha, None, None).shape == (0, 3)


def test_the_gradient_of_alpha_is_a_sum_a_row_first():
    """The expanded alpha is what lets a compiler fold its gradient into the one backward kernel."""
    x, alpha = torch.randn(4, 6), torch.tensor([0.5], requires_grad=True)
    node = dyt(x, alpha, None, None).grad_fn
    names = []
    while node is not None and node.next_functions:
        names.append(type(node).__name__)
        node = node.next_functions[0][0]
    assert "ExpandBackward0" in names
