"""The op on a CPU, compiled and in torch's operators: against float64, in every layout; when it is taken."""

import copy
import math
import os
import stat
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.func import functional_call, grad, vmap

from dytrun import cpu_kernels, timing
from dytrun.norm import PointWise, implementation

ENGINES = ("native", "torch", "formula")
UNIT = {torch.float32: 2.0**-24, torch.bfloat16: 2.0**-8, torch.float16: 2.0**-11, torch.float64: 2.0**-53}
# Terms that are summed one after the other in float32: at most 64 in the compiled op, before they go into a double; in
# torch's sums four levels of 16.
RUN = 64


@pytest.fixture(autouse=True)
def compiled(request):
    """Leave out what is about the compiled op where no compiler is; what takes its place is tested all the same."""
    parameters = request.node.callspec.params.values() if hasattr(request.node, "callspec") else ()
    is_native = "native" in parameters or request.node.get_closest_marker("native") is not None
    if is_native and cpu_kernels.library() is None:
        pytest.skip("no C++ compiler with OpenMP")


def layer_of(engine: str, channels: int, axis: int, seed: int, alpha: float = 0.7, shift: bool = False) -> PointWise:
    source = torch.Generator().manual_seed(seed)
    layer = PointWise(channels, "dyt", alpha, 0.25 if shift else None, axis)
    for parameter in (layer.weight, layer.bias):
        torch.nn.init.normal_(parameter, generator=source)
    layer.implementation = engine
    return layer


def computed(layer: PointWise, x: Tensor, dy: Tensor) -> dict[str, Tensor]:
    """Return y and all gradients."""
    x = x.detach().requires_grad_()
    y = layer(x)
    names = ["x", *(name for name, _ in layer.named_parameters())]
    found = torch.autograd.grad(y, [x, *layer.parameters()], dy.to(y.dtype))
    return {"y": y.detach()} | dict(zip(names, found, strict=True))


def bounds(layer: PointWise, x: Tensor, dy: Tensor, out: torch.dtype) -> dict[str, Tensor]:
    """How far y and the gradients may be from the exact ones, first order in the unit roundoff u of float32.

    z = alpha x + shift is off by 2u of its terms, which moves tanh by that times its slope and the slope by twice as
    much. tanh itself is off by 4u of its value (compiled, formula) or of 1 (as 2 s - 1), the slope 1 - tanh² by 8u of
    1; each product and sum after that adds u of what it makes. What is stored is off by the unit roundoff of its dtype.
    """
    u, exact = UNIT[torch.float64 if x.dtype == torch.float64 else torch.float32], copy.deepcopy(layer).double()
    shape = [1] * x.ndim
    shape[layer.channel_axis] = -1
    others = [axis for axis in range(x.ndim) if axis != layer.channel_axis % x.ndim]
    x, dy = x.double(), dy.double()
    alpha, weight, bias = exact.alpha.view([1] * x.ndim), exact.weight.view(shape), exact.bias.view(shape)
    shift = torch.zeros(1) if exact.shift is None else exact.shift
    z, terms = alpha * x + shift, (alpha * x).abs() + shift.abs()
    t = torch.tanh(z)
    slope = 1 - t * t
    off_t = u * (4 + 2 * terms * slope)
    off_slope = u * (8 + 4 * terms * slope)
    h, off_h = (dy * weight).abs() * slope, (dy * weight).abs() * (off_slope + 4 * u * slope)
    y = weight * t + bias

    def total(values: Tensor, off: Tensor, over: list[int] | None = None) -> Tensor:
        return off.sum(over) + 2 * RUN * u * values.abs().sum(over)

    return {
        "y": weight.abs() * off_t + 4 * u * ((weight * t).abs() + bias.abs()) + UNIT[out] * y.abs(),
        "x": alpha.abs() * off_h + 2 * u * alpha.abs() * h + UNIT[out] * alpha * h,
        "alpha": total(x * h, x.abs() * off_h).view(1),
        "shift": total(h, off_h).view(1),
        "weight": total(dy * t, dy.abs() * (off_t + 4 * u), others),
        "bias": total(dy, u * dy.abs(), others),
    }


def check(layer: PointWise, x: Tensor, dy: Tensor) -> None:
    exact = copy.deepcopy(layer).double()
    exact.implementation = "formula"
    found, right = computed(layer, x, dy), computed(exact, x.double(), dy.double())
    allowed = bounds(layer, x, dy, x.dtype)
    if x.dtype in (torch.float32, torch.float64):
        allowed["x"] = allowed["x"].clamp(min=UNIT[x.dtype] * 1e-30)
    for name, value in found.items():
        assert value.shape == right[name].shape
        off = (value.double() - right[name]).abs()
        assert bool((off <= allowed[name] + 1e-37).all()), (name, float(off.max()), float((off / allowed[name]).max()))


@st.composite
def cases(draw):
    """Shape, channel axis and how x lies in memory."""
    axis = draw(st.sampled_from([-1, 1]))
    channels = draw(st.integers(1, 40))
    if axis == -1:
        shape = [*draw(st.lists(st.integers(0, 9), max_size=3)), channels]
        memory = draw(st.sampled_from(["contiguous", "strided", "transposed", "expanded"]))
    else:
        shape = [draw(st.integers(0, 4)), channels, draw(st.integers(1, 8)), draw(st.integers(1, 8))]
        memory = draw(st.sampled_from(["contiguous", "channels_last", "strided", "transposed"]))
    return tuple(shape), axis, memory


def laid(x: Tensor, memory: str) -> Tensor:
    if memory == "channels_last":
        return x.to(memory_format=torch.channels_last)
    if memory == "strided":
        return torch.stack([x, -x], dim=-1)[..., 0]
    if memory == "transposed":
        return x.permute(*reversed(range(x.ndim))).contiguous().permute(*reversed(range(x.ndim)))
    if memory == "expanded" and x.ndim > 1:
        return x[:1].expand(x.shape) if x.shape[0] else x
    return x


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@given(case=cases(), exponent=st.floats(-3, 1), spread=st.sampled_from([0.1, 1.0, 30.0]), seed=st.integers(0, 99))
@settings(max_examples=40, deadline=None)
def test_values_and_gradients_are_those_of_float64(engine, dtype, case, exponent, spread, seed):
    shape, axis, memory = case
    source = torch.Generator().manual_seed(seed)
    x = laid((spread * torch.randn(shape, generator=source)).to(dtype), memory)
    dy = torch.randn(shape, generator=source).to(dtype)
    check(layer_of(engine, shape[axis], axis, seed, 10.0**exponent, seed % 2 == 0), x, dy)


@pytest.mark.parametrize("engine", ["native", "torch"])
@pytest.mark.parametrize(("shape", "axis"), [((3000, 70), -1), ((3, 5, 60, 70), 1), ((6, 49, 7, 7), 1)])
def test_more_than_a_block_and_a_thread(engine, shape, axis):
    x, dy = torch.randn(shape), torch.randn(shape)
    check(layer_of(engine, shape[axis], axis, 0), x, dy)
    check(layer_of(engine, shape[axis], axis, 0), x, dy[:1].expand(shape))
    layer = layer_of(engine, shape[axis], axis, 0)
    one, other = (computed(layer, x, dy) for _ in range(2))
    assert all(torch.equal(one[name], other[name]) for name in one), "the same bits every time"


@pytest.mark.parametrize("engine", ["native", "torch"])
@pytest.mark.parametrize("missing", ["weight", "bias", "both"])
def test_what_is_missing_or_a_channel_each(engine, missing):
    layer = PointWise(6, "dyt", 0.4, 0.1, per_channel_alpha=True)
    torch.nn.init.uniform_(layer.alpha, 0.1, 2)
    if missing in ("weight", "both"):
        layer.weight = None
    if missing in ("bias", "both"):
        layer.bias = None
    x, dy = torch.randn(50, 6), torch.randn(50, 6)
    exact = copy.deepcopy(layer).double()
    layer.implementation = engine
    right = computed(exact, x.double(), dy.double())
    for name, value in computed(layer, x, dy).items():
        torch.testing.assert_close(value.double(), right[name], rtol=RUN * 2.0**-23, atol=RUN * 2.0**-23)
    frozen = copy.deepcopy(layer)
    frozen.alpha.requires_grad_(False)
    frozen(x).sum().backward()
    assert frozen.alpha.grad is None
    assert frozen.shift.grad is not None


@pytest.mark.parametrize("engine", ENGINES)
def test_what_is_not_finite_is_seen(engine):
    x = torch.tensor([[math.nan, math.inf, -math.inf, 3e38, -1e-45]], requires_grad=True)
    layer = layer_of(engine, 5, -1, 0)
    y = layer(x)
    assert y.isnan().tolist() == [[True, False, False, False, False]]
    weight, bias = layer.weight.detach(), layer.bias.detach()
    torch.testing.assert_close(y[0, 1:], (weight * torch.tensor([0, 1, -1, 1, 0]) + bias)[1:])
    y.sum().backward()
    assert bool(x.grad[0, 0].isnan())
    assert x.grad[0, 1:4].abs().max() < 1e-15
    assert bool(layer.weight.grad[0].isnan())


@pytest.mark.parametrize("engine", [*ENGINES, "sigmoid"])
def test_saturation_makes_no_subnormal_numbers(engine):
    """They would make every product that they go into ten times as slow, in a model that trains badly."""
    layer, x = layer_of(engine, 64, -1, 0), torch.linspace(-200, 200, 6400).view(-1, 64).requires_grad_()
    layer(x).backward(torch.full_like(x, 1e-6))
    grads = [x.grad, *(parameter.grad for parameter in layer.parameters())]
    assert not [grad for grad in grads if bool(((grad != 0) & (grad.abs() < torch.finfo(torch.float32).tiny)).any())]


@pytest.mark.native
def test_small_numbers_keep_their_digits():
    """Compiled, tanh near 0 is not a difference of numbers near 1."""
    x = torch.logspace(-30, 0, 3001).view(-1, 1)
    layer = PointWise(1, "dyt", 1.0)
    layer.implementation = "native"
    off = (layer(x).double() / torch.tanh(x.double()) - 1).abs().max()
    assert off < 8 * 2.0**-24


@pytest.mark.parametrize("engine", ENGINES)
def test_gradients_of_gradients(engine):
    layer = layer_of("torch" if engine == "native" else engine, 3, -1, 0).double()
    x = torch.randn(4, 3, dtype=torch.float64, requires_grad=True)

    def call(x, *parameters):
        return functional_call(layer, dict(zip(dict(layer.named_parameters()), parameters, strict=True)), (x,))

    assert torch.autograd.gradcheck(call, (x, *layer.parameters()))
    assert torch.autograd.gradgradcheck(call, (x, *layer.parameters()))
    second = {}
    for name in (engine, "formula"):
        layer = layer_of(name, 3, -1, 0)
        y = x.detach().float().requires_grad_()
        (first,) = torch.autograd.grad(layer(y).square().sum(), y, create_graph=True)
        second[name] = torch.autograd.grad(first.square().sum(), [y, *layer.parameters()])
    for one, other in zip(*second.values() if engine != "formula" else [second["formula"]] * 2, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("engine", ["native", "torch"])
def test_inputs_that_are_one_another_or_made_of_one_another(engine):
    """With create_graph too: the formula that is then differentiated must not find a way from one to the other."""
    x = torch.randn(5, 3, requires_grad=True)
    both = torch.randn(3, requires_grad=True)
    found = []
    for name in (engine, "formula"):
        for create_graph in (True, False):
            layer = PointWise(3)
            layer.implementation = name
            values = {"alpha": x.mean().view(1), "weight": both, "bias": both}
            y = functional_call(layer, values, (x,))
            found.append(torch.autograd.grad(y.square().sum(), [x, both], create_graph=create_graph))
    for grads in found[:-1]:
        for one, other in zip(grads, found[-1], strict=True):
            torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("engine", ["native", "torch"])
def test_what_torch_has_as_a_default_changes_nothing(engine):
    x, dy = torch.randn(4, 6), torch.randn(4, 6)
    layers = [layer_of(engine, 6, -1, 0) for _ in range(3)]
    expected = computed(layers[0], x, dy)
    with torch.device("meta"):
        on_meta = computed(layers[1], x, dy)
    torch.set_default_dtype(torch.float64)
    try:
        in_double = computed(layers[2], x, dy)
    finally:
        torch.set_default_dtype(torch.float32)
    assert all(torch.equal(expected[name], found[name]) for found in (on_meta, in_double) for name in expected)


@pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated")  # torch's own, in forward mode
@pytest.mark.parametrize("engine", ["native", "torch"])
def test_gradients_in_batches_and_forward(engine):
    layer, x = layer_of(engine, 3, -1, 0), torch.randn(2, 3, requires_grad=True)
    y = layer(x).sum(1)
    rows = torch.autograd.grad(y, x, torch.eye(2), is_grads_batched=True, retain_graph=True)[0]
    for number in range(2):
        torch.testing.assert_close(rows[number], torch.autograd.grad(y[number], x, retain_graph=True)[0])
    layer.implementation = None
    _, along = torch.func.jvp(layer, (x.detach(),), (torch.ones_like(x),))
    torch.testing.assert_close(along.sum(), torch.autograd.grad(layer(x).sum(), x)[0].sum())


@pytest.mark.parametrize("engine", ["native", "torch"])
def test_a_parameter_elsewhere_and_one_without_an_axis(engine):
    layer = layer_of(engine, 3, -1, 0)
    layer.weight = torch.nn.Parameter(torch.ones(3, device="meta"))
    with pytest.raises(RuntimeError, match="activations are on cpu, a parameter of the layer on meta"):
        layer(torch.ones(2, 3))
    layer = layer_of(engine, 3, -1, 0)
    layer.alpha = torch.nn.Parameter(torch.tensor(0.5))
    layer(torch.ones(2, 3)).sum().backward()
    assert layer.alpha.grad.shape == ()


@pytest.mark.native
def test_only_x_is_kept():
    for engine, axis, shape in (("native", -1, (64, 32)), ("torch", -1, (64, 32)), ("native", 1, (4, 8, 5, 5))):
        layer, x = layer_of(engine, shape[axis], axis, 0), torch.randn(shape, requires_grad=True)
        assert timing.saved_bytes(lambda layer=layer, x=x: layer(x), list(layer.parameters())) == x.nbytes
    plain = timing.saved_bytes(lambda: layer_of("formula", 32, -1, 0)(torch.randn(64, 32, requires_grad=True)), [])
    assert plain >= 2 * 64 * 32 * 4


def test_what_comes_out_has_the_dtype_of_x_or_of_autocast():
    layer, x = PointWise(8), torch.randn(3, 8, requires_grad=True)
    assert layer(x).dtype == torch.float32
    assert layer(x.bfloat16()).dtype == torch.bfloat16
    for dtype in (torch.bfloat16, torch.float16):
        with torch.autocast("cpu", dtype):
            assert layer(x).dtype == dtype
            assert layer(x.double()).dtype == torch.float64
            layer(x).float().sum().backward()
    assert x.grad.dtype == torch.float32
    assert copy.deepcopy(layer).bfloat16()(x).dtype == torch.float32, "as the activations are, not as the weights"


@pytest.mark.native
def test_who_computes():
    x = torch.randn(3, 8)
    assert implementation(x, "dyt") == "native"
    assert implementation(x.bfloat16(), "dyt") == "native"
    assert implementation(x.double(), "dyt") == implementation(x.half(), "dyt") == "torch"
    assert implementation(x, "derf") == implementation(x.to("meta"), "dyt") == "formula"
    seen = []

    def spy(x: Tensor) -> Tensor:
        seen.append(implementation(x, "dyt"))
        return x.sum()

    grad(spy)(x)
    vmap(spy)(x)
    with pytest.warns(FutureWarning):
        torch.jit.trace(spy, x, check_trace=False)
    with torch._subclasses.FakeTensorMode() as mode:
        spy(mode.from_tensor(x))
    assert set(seen) == {"formula"}


@pytest.mark.native
def test_the_layer_goes_everywhere_a_module_goes():
    torch.manual_seed(0)
    layer, x = layer_of("native", 8, -1, 0), torch.randn(5, 8)
    layer.implementation = None
    expected = layer(x)
    twin = copy.deepcopy(layer)
    with torch.no_grad():
        twin.weight.zero_()
    twin.load_state_dict(layer.state_dict())
    assert torch.equal(twin(x), expected)
    assert torch.equal(functional_call(layer, dict(layer.named_parameters()), (x,)), expected)
    grads = grad(lambda parameters: functional_call(layer, parameters, (x,)).square().sum())(
        dict(layer.named_parameters())
    )
    expected.square().sum().backward()
    for name, parameter in layer.named_parameters():
        torch.testing.assert_close(grads[name], parameter.grad, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(torch.export.export(layer, (x,)).module()(x), expected)
    with torch.inference_mode():
        assert torch.equal(layer(x), expected)


_WHO = "import torch; from dytrun.norm import implementation; print(implementation(torch.ones(2, 3), 'dyt'))"


# Threads of one process that all find nothing.
_THREADS = """
from concurrent.futures import ThreadPoolExecutor
from dytrun import cpu_kernels
with ThreadPoolExecutor(4) as pool:
    for found in [pool.submit(cpu_kernels.library) for _ in range(4)]:
        print(found.result() is not None)
"""


def who_computes(**env: str) -> str:
    done = subprocess.run(
        [sys.executable, "-c", _WHO], env=os.environ | env, capture_output=True, text=True, check=True
    )
    return done.stdout.strip()


@pytest.mark.native
@pytest.mark.slow
def test_it_is_compiled_once_and_nothing_is_lost_without_a_compiler(tmp_path):
    """Two processes at a time on an empty cache; no compiler, a broken one; a cache that others may write to."""
    cache = str(tmp_path / "cache")
    with ThreadPoolExecutor() as pool:
        first = pool.submit(who_computes, XDG_CACHE_HOME=cache)
        second = pool.submit(who_computes, XDG_CACHE_HOME=cache)
    assert (first.result(), second.result()) == ("native", "native")
    (kept,) = (tmp_path / "cache" / "dytrun").iterdir()
    before = kept.stat().st_mtime_ns
    open_to_all = tmp_path / "open"
    (open_to_all / "dytrun").mkdir(parents=True)
    (open_to_all / "dytrun").chmod(0o777)
    with ThreadPoolExecutor() as pool:
        again = pool.submit(who_computes, XDG_CACHE_HOME=cache)
        others = pool.submit(who_computes, XDG_CACHE_HOME=str(open_to_all))
        assert who_computes(XDG_CACHE_HOME=cache, CXX="/nowhere/c++") == "torch"
        assert who_computes(XDG_CACHE_HOME=str(tmp_path / "new"), CXX="false") == "torch"
    assert again.result() == "native"
    assert kept.stat().st_mtime_ns == before
    assert others.result() == "native"
    assert not list((open_to_all / "dytrun").iterdir()), "a library that somebody else can change is not kept"
    together = tmp_path / "together"
    done = subprocess.run([sys.executable, "-c", _THREADS], env=os.environ | {"XDG_CACHE_HOME": str(together)},
                          capture_output=True, text=True, check=True)  # fmt: skip
    assert done.stdout.split() == ["True"] * 4
    assert len(list((together / "dytrun").iterdir())) == 1, "no half of a file is left"
    assert stat.S_IMODE((tmp_path / "cache" / "dytrun").stat().st_mode) == 0o700
