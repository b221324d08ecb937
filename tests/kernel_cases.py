"""The kernels against the formula in float64. test_kernels.py runs this file, on a GPU or in Triton's interpreter.

Tolerances are bounds, not measurements. z = alpha * x + shift is off by at most `dz`, two roundings of each of its
terms; f is monotone, so it is then off by no more than at the ends of z ± dz, and its slope is taken there too. The
kernels' own maths are at most eight operations off by an ulp: `OWN` of the value, or of 1 where the kernel computes for
a result in bf16 (it knows tanh and erf there up to that). Last comes the rounding to the dtype of the result, which
Triton's interpreter leaves out for bf16: it cuts off.
"""

import math
from typing import NamedTuple

import pytest
import torch
from torch import Tensor

from dytrun import kernels
from dytrun.kernels import DTYPES, FUSED
from dytrun.norm import FUNCTIONS
from dytrun.norm import formula as formula

# The interpreter computes with numpy, which warns of what a GPU does silently.
pytestmark = pytest.mark.filterwarnings("ignore:(overflow|divide by zero|invalid value) encountered:RuntimeWarning")

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
EPS = torch.finfo(torch.float32).eps
OWN = 8 * EPS
# By this much the float64 slopes themselves may be off: autograd has 1 - t² for tanh, t (1 - t) for the sigmoid.
LEAST = 2 * torch.finfo(torch.float64).eps
# tanh.approx.f32, PTX ISA; the interpreter has no PTX.
APPROX = 2**-11 if DEVICE == "cuda" else 0.0
# Near pi / 2 a cosine in float32 is as far off as pi / 2 is.
ABSOLUTE_SLOPE = {"satursin"}
AXES = {"tokens": ((3, 11, 100), -1), "first": ((2, 40, 5, 7), 1), "memory": ((2, 40, 5, 7), 1)}


class Case(NamedTuple):
    """The inputs of a layer."""

    x: Tensor
    inner: tuple[Tensor, Tensor | None]
    affine: tuple[Tensor | None, Tensor | None]
    axis: int

    def tensors(self) -> list[Tensor]:
        return [t for t in (self.x, *self.inner, *self.affine) if t is not None]

    def as_double(self) -> "Case":
        x, alpha, shift, weight, bias = (
            None if t is None else t.detach().double().requires_grad_() for t in (self.x, *self.inner, *self.affine)
        )
        return Case(x, (alpha, shift), (weight, bias), self.axis)


def make(shape: tuple[int, ...], axis: int, dtype=torch.float32, per_channel=False, alpha=0.7, shift=True) -> Case:
    torch.manual_seed(0)
    channels = shape[axis]

    def parameter(scale: float, size: int = channels) -> Tensor:
        return (scale * (1 + 0.3 * torch.randn(size))).to(DEVICE).requires_grad_()

    size = channels if per_channel else 1
    x = (2 * torch.randn(shape)).to(DEVICE, dtype).requires_grad_()
    return Case(
        x,
        (parameter(alpha, size), parameter(0.2, size) if shift else None),
        (parameter(1.0), parameter(0.5)),
        axis,
    )


def run(case: Case, function: str, out_dtype: torch.dtype, dy: Tensor) -> tuple[Tensor, tuple[Tensor, ...]]:
    y = kernels.point_wise(case.x, case.inner, case.affine, function, case.axis, out_dtype)
    return y, torch.autograd.grad(y, case.tensors(), dy.to(y.dtype))


def check(case: Case, function: str, out_dtype: torch.dtype, dy: Tensor) -> None:
    """Compare y and all gradients with float64's, each within its bound."""
    y, gradients = run(case, function, out_dtype, dy)
    assert (y.dtype, y.shape) == (out_dtype, case.x.shape)
    exact = case.as_double()
    wanted = formula(FUNCTIONS[function], exact.x, exact.inner, exact.affine, case.axis)
    of = torch.autograd.grad(wanted, exact.tensors(), dy.to(out_dtype).double())
    with torch.no_grad():
        bounds = limits(exact, function, out_dtype, dy.to(out_dtype).double())
    bounds[0] += rounding(wanted, out_dtype)
    for name, bound, one, other in zip(["y", "x", *names(case)], bounds, (y, *gradients), (wanted, *of), strict=True):
        if name != "y":
            tensor = dict(zip(["x", *names(case)], case.tensors(), strict=True))[name]
            assert (one.dtype, one.shape) == (tensor.dtype, tensor.shape), name
            bound = bound + rounding(other, one.dtype)
        distance = (one.double() - other).abs()
        assert bool((distance <= bound).all()), f"{name} is off by {(distance / bound).max():.2f} of the bound"


def names(case: Case) -> list[str]:
    present = zip(("alpha", "shift", "weight", "bias"), (*case.inner, *case.affine), strict=True)
    return [name for name, tensor in present if tensor is not None]


def rounding(value: Tensor, dtype: torch.dtype) -> Tensor:
    """Half an ulp of a dtype, or a whole one where bits are cut off, and as much of its smallest number."""
    kind, share = torch.finfo(dtype), 1.0 if DEVICE == "cpu" and dtype == torch.bfloat16 else 0.5
    return share * kind.eps * value.abs() + kind.smallest_normal * kind.eps


def limits(case: Case, function: str, out_dtype: torch.dtype, dy: Tensor) -> list[Tensor]:
    """Return bounds of y, dx and the gradients of the parameters that are there, all but their last rounding."""
    shape = [1] * case.x.ndim
    shape[case.axis] = -1
    alpha, shift, weight, bias = (
        torch.zeros(()).double().to(DEVICE) if t is None else t.view(shape) for t in (*case.inner, *case.affine)
    )
    weight = weight if case.affine[0] is not None else torch.ones_like(weight)
    z = alpha * case.x + shift
    dz = EPS * ((alpha * case.x).abs() + shift.abs() + z.abs())
    (low, _), (f, slope), (high, _) = (curve(function, at) for at in (z - dz, z, z + dz))
    slopes = torch.stack([curve(function, at)[1] for at in (z - dz, z + dz)])
    absolute = out_dtype == torch.bfloat16
    off = torch.maximum((high - f).abs(), (low - f).abs()) + OWN * (1 if absolute else f.abs())
    forward = off + (APPROX * f.abs() if function == "dyt" and absolute else 0)
    off_slope = (slopes - slope).abs().amax(0) + OWN * (1 if function in ABSOLUTE_SLOPE else slope) + LEAST

    h, off_h = dy * weight * slope, (dy * weight).abs() * (off_slope + 2 * EPS * slope)
    found = [weight.abs() * forward + 2 * EPS * ((weight * f).abs() + bias.abs())]
    found.append(alpha.abs() * off_h + 2 * EPS * (alpha * h).abs())
    terms = {
        "alpha": (case.x * h, case.x.abs() * off_h),
        "shift": (h, off_h),
        "weight": (dy * f, dy.abs() * off),
        "bias": (dy, torch.zeros_like(dy)),
    }
    for name, parameter in zip(names(case), case.tensors()[1:], strict=True):
        term, off_term = (
            t.expand(case.x.shape).movedim(case.axis, -1).reshape(-1, case.x.shape[case.axis]) for t in terms[name]
        )
        # Terms are added up channel by channel, whatever the order, and for a scalar then the channels.
        depth = term.shape[0] + (term.shape[1] if parameter.numel() == 1 else 0)
        total = (off_term + depth * EPS * term.abs()).sum(0)
        found.append(total if parameter.numel() == term.shape[1] else total.sum())
    return found


def curve(function: str, z: Tensor) -> tuple[Tensor, Tensor]:
    """Return f and f', as torch differentiates it, in float64."""
    with torch.enable_grad():
        z = z.detach().requires_grad_()
        f = FUNCTIONS[function](z)
        return f.detach(), torch.autograd.grad(f.sum(), z)[0]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("layout", AXES)
@pytest.mark.parametrize("function", sorted(FUSED))
def test_values_and_gradients(function, layout, dtype):
    shape, axis = AXES[layout]
    case = make(shape, axis, dtype, per_channel=layout == "first", shift=layout != "memory")
    if layout == "memory":
        x = case.x.detach().contiguous(memory_format=torch.channels_last).requires_grad_()
        case = case._replace(x=x)
    check(case, function, dtype, torch.randn(shape, device=DEVICE))


@pytest.mark.parametrize("alpha", [1e-3, 0.1, 10.0])
@pytest.mark.parametrize("function", ["dyt", "derf", "sigmoid", "expsign"])
def test_from_almost_linear_to_saturated(function, alpha):
    case = make((5, 9, 96), -1, alpha=alpha, shift=False)
    with torch.no_grad():
        case.x[0] *= 100
    for out_dtype in (torch.float32, torch.bfloat16):
        check(case, function, out_dtype, torch.randn(case.x.shape, device=DEVICE))


@pytest.mark.parametrize("out_dtype", DTYPES)
@pytest.mark.parametrize("dtype", DTYPES)
def test_any_dtype_from_any_dtype(dtype, out_dtype):
    check(make((4, 6, 33), -1, dtype), "dyt", out_dtype, torch.randn(4, 6, 33, device=DEVICE))


def test_parameters_in_bf16_get_gradients_in_bf16():
    case = make((4, 6, 33), -1, torch.bfloat16)
    half = [t.detach().bfloat16().requires_grad_() for t in (*case.inner, *case.affine)]
    case = Case(case.x, (half[0], half[1]), (half[2], half[3]), -1)
    check(case, "dyt", torch.bfloat16, torch.randn(4, 6, 33, device=DEVICE))


VIEWS = {
    "every other channel": ((6, 5, 80), -1, lambda x: x[..., ::2]),
    "every other token": ((6, 5, 40), -1, lambda x: x[:, ::2]),
    "tokens of an image that is channels first": ((2, 40, 3, 5), -1, lambda x: x.permute(0, 2, 3, 1)),
    "an image of tokens": ((2, 3, 5, 40), 1, lambda x: x.permute(0, 3, 1, 2)),
    "a cut image": ((2, 40, 6, 7), 1, lambda x: x[:, :, 1:-1, 2:]),
    "a matrix, transposed": ((40, 9), 1, lambda x: x.t()),
    "a row": ((40,), -1, lambda x: x),
    "every other number of a row": ((80,), -1, lambda x: x[::2]),
    "one copied row": ((1, 40), -1, lambda x: x.expand(7, 40)),
    "a volume": ((2, 40, 2, 3, 4), 1, lambda x: x),
    "a volume in channels-last memory": ((2, 2, 3, 4, 40), 1, lambda x: x.movedim(-1, 1)),
    "a signal": ((3, 40, 65), 1, lambda x: x),
    "one pixel": ((3, 40, 1, 1), 1, lambda x: x),
    "one channel": ((3, 1, 5, 7), 1, lambda x: x),
    "nine channels": ((50, 9), -1, lambda x: x),
    "more channels than a tile is wide": ((5, 700), -1, lambda x: x),
}

COPIED = {
    "every other channel", "every other token", "a cut image", "a matrix, transposed", "every other number of a row",
    "one copied row",
}  # fmt: skip


@pytest.mark.parametrize("view", VIEWS)
def test_any_strides(view):
    shape, axis, change = VIEWS[view]
    whole = torch.randn(shape, device=DEVICE)
    x = change(whole).detach().requires_grad_()
    case = make(tuple(x.shape), axis)._replace(x=x)
    check(case, "dyt", torch.float32, torch.randn(x.shape, device=DEVICE))
    y = kernels.point_wise(x, case.inner, case.affine, "dyt", axis, torch.bfloat16)
    if view not in COPIED:
        assert y.stride() == x.stride(), "the memory format stays"


@pytest.mark.parametrize("layout", AXES)
def test_gradients_of_any_strides(layout):
    shape, axis = AXES[layout]
    case = make(shape, axis)
    check(case, "dyt", torch.float32, torch.ones((), device=DEVICE).expand(shape))
    check(case, "dyt", torch.float32, torch.randn(shape[::-1], device=DEVICE).permute(*range(len(shape))[::-1]))
    row = [n if k == axis % len(shape) else 1 for k, n in enumerate(shape)]
    check(case, "dyt", torch.float32, torch.randn(row, device=DEVICE).expand(shape))


@pytest.mark.parametrize(("shape", "axis"), [((0, 40), -1), ((2, 0, 40), -1), ((0, 40, 3, 3), 1), ((2, 40, 0, 3), 1)])
def test_nothing(shape, axis):
    case = make(shape, axis, per_channel=True)
    y, (dx, *others) = run(case, "dyt", torch.bfloat16, torch.zeros(shape, device=DEVICE))
    assert (y.shape, y.dtype, dx.shape) == (shape, torch.bfloat16, shape)
    assert all(torch.equal(other, torch.zeros(40, device=DEVICE)) for other in others)


@pytest.mark.parametrize("layout", AXES)
def test_what_is_missing_stays_missing(layout):
    shape, axis = AXES[layout]
    case = make(shape, axis)
    weight, bias = case.affine
    for affine in ((None, None), (weight, None), (None, bias)):
        check(case._replace(affine=affine), "derf", torch.float32, torch.randn(shape, device=DEVICE))


@pytest.mark.parametrize("layout", AXES)
def test_what_needs_no_gradient_changes_no_other(layout):
    shape, axis = AXES[layout]
    case, dy = make(shape, axis), torch.randn(shape, device=DEVICE)
    y, all_of_them = run(case, "dyt", torch.float32, dy)
    for k, wanted in enumerate(all_of_them):
        tensors = [t.detach().requires_grad_(j == k) for j, t in enumerate(case.tensors())]
        alone = Case(tensors[0], (tensors[1], tensors[2]), (tensors[3], tensors[4]), axis)
        again = kernels.point_wise(alone.x, alone.inner, alone.affine, "dyt", axis, torch.float32)
        assert torch.equal(again, y)
        assert torch.equal(torch.autograd.grad(again, tensors[k], dy)[0], wanted)


@pytest.mark.parametrize(("shape", "axis"), [((65600, 7), -1), ((32800, 2, 3), 1)])
def test_more_rows_than_a_grid_has_on_its_other_axes(shape, axis):
    check(make(shape, axis, torch.bfloat16), "dyt", torch.bfloat16, torch.randn(shape, device=DEVICE))


@pytest.mark.parametrize("layout", AXES)
def test_the_same_bits_every_time(layout):
    shape, axis = AXES[layout]
    case, dy = make(shape, axis, torch.bfloat16), torch.randn(shape, device=DEVICE)
    one, other = (run(case, "dyt", torch.bfloat16, dy) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip((one[0], *one[1]), (other[0], *other[1]), strict=True))


SATURATED = {"dyt": 1, "derf": 1, "identity": math.inf, "hardtanh": 1, "sigmoid": 1, "satursin": 1, "exproot": 1,
             "smoothsign": 1, "isru": 1, "dyisru": 1, "expsign": 1, "cubsign": 1}  # fmt: skip
# f'(0), as in test_norm.py.
SLOPE_AT_0 = {"dyt": 1, "derf": 2 / math.sqrt(math.pi), "identity": 1, "hardtanh": 1, "sigmoid": 0.25, "satursin": 1,
              "exproot": 0, "smoothsign": 1, "isru": 1, "dyisru": 1, "expsign": 1, "cubsign": 0}  # fmt: skip


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("function", sorted(FUSED))
def test_the_ends_and_the_middle(function, dtype):
    x = torch.tensor([[math.inf, -math.inf, math.nan, 0.0, 1e30, -1e30, 1e-30, -1e-30]], device=DEVICE, dtype=dtype)
    x.requires_grad_()
    alpha = torch.ones(1, device=DEVICE, requires_grad=True)
    y = kernels.point_wise(x, (alpha, None), (None, None), function, -1, dtype).detach()
    # An ulp is what the interpreter cuts off.
    top = SATURATED[function]
    bottom = 0 if function == "sigmoid" else -top
    assert y[0, :2].tolist() == pytest.approx([top, bottom], rel=torch.finfo(dtype).eps + OWN)
    assert math.isnan(y[0, 2])

    finite = x.detach()[:, 3:].clone().requires_grad_()
    y = kernels.point_wise(finite, (alpha, None), (None, None), function, -1, dtype)
    dx, of_alpha = torch.autograd.grad(y.sum(), (finite, alpha))
    assert all(bool(t.isfinite().all()) for t in (y, dx, of_alpha))
    assert y[0, 0].item() == (0.5 if function == "sigmoid" else 0)
    assert dx[0, 0].item() == pytest.approx(SLOPE_AT_0[function], rel=torch.finfo(dtype).eps + OWN)


def test_a_second_derivative_is_refused():
    case = make((3, 8), -1)
    y = kernels.point_wise(case.x, case.inner, case.affine, "dyt", -1, torch.float32)
    (dx,) = torch.autograd.grad(y.sum(), case.x, create_graph=True)
    with pytest.raises(RuntimeError, match="cannot be differentiated twice"):
        torch.autograd.grad(dx.sum(), case.x)


def test_parameters_that_do_not_fit_are_refused():
    x, three, two = torch.ones(2, 3, device=DEVICE), torch.ones(3, device=DEVICE), torch.ones(2, device=DEVICE)
    for inner, affine in (((two, None), (None, None)), ((three, two), (None, None)), ((three, None), (two, None))):
        with pytest.raises(ValueError, match="do not fit 3 channels"):
            kernels.point_wise(x, inner, affine, "dyt", -1, torch.float32)
