"""f and f' of the point-wise layers inside a Triton kernel, in float32.

Definitions, and the slope at corners and at 0, are those of functions.FUNCTIONS. Comparisons are written such that NaN
falls through to the branch that keeps it, and infinities end in the saturated value.
"""

from typing import TYPE_CHECKING, Any, NamedTuple, no_type_check

import triton
import triton.language as tl

# Triton looks for this word in annotations, and pyright would believe it. `no_type_check`, below, is for jaxtyping,
# which would wrap what Triton has to read.
if TYPE_CHECKING:
    constexpr = Any
else:
    constexpr = tl.constexpr

# Of functions.FUNCTIONS, those that need nothing but exp, erf and roots.
FUSED = frozenset({
    "dyt", "derf", "identity", "hardtanh", "sigmoid", "satursin", "exproot", "smoothsign", "isru", "dyisru", "expsign",
    "cubsign",
})  # fmt: skip

_LOG2_E: constexpr = tl.constexpr(1.4426950408889634)
_HALF_PI: constexpr = tl.constexpr(1.5707963267948966)
_DERF_SLOPE: constexpr = tl.constexpr(1.1283791670955126)  # 2 / sqrt(pi)


class How(NamedTuple):
    """What a kernel is compiled for.

    `single` says of alpha and shift whether it is one number for all channels. `slots` says of alpha, shift, weight and
    bias where among the sums its gradient goes; -1: nowhere. `exact` is False where the result is rounded to bf16, and
    `asm` allows PTX then.
    """

    function: str
    by_row: bool
    single: tuple[bool, bool]
    exact: bool
    asm: bool
    tile: tuple[int, int]
    slots: tuple[int, int, int, int] = (-1, -1, -1, -1)
    dx: bool = False


@triton.jit
@no_type_check
def _inverse(x, asm: constexpr) -> Any:
    """Return 1 / x, off by an ulp; a subnormal result is 0, which Triton's division spends four instructions on."""
    if asm:
        r = tl.inline_asm_elementwise("rcp.approx.ftz.f32 $0, $1;", "=f,f", [x], tl.float32, is_pure=True, pack=1)
    else:
        r = 1 / x
    return r


@triton.jit
@no_type_check
def _tanh(size, exact: constexpr, asm: constexpr):
    """Return tanh and its slope for size >= 0; one exponential gives both without cancellation in the slope."""
    e = tl.exp2(size * (-2 * _LOG2_E))
    r = _inverse(1 + e, asm)
    t = (1 - e) * r
    if exact:
        # 1 - e cancels next to 0. Coefficients: Cephes, tanhf.c, for up to 0.625.
        s = size * size
        p = (((-5.70498872745e-3 * s + 2.06390887954e-2) * s - 5.37397155531e-2) * s + 1.33314422036e-1) * s
        t = tl.where(size < 0.625, size + size * s * (p - 3.33332819422e-1), t)
    return t, 4 * e * r * r


@triton.jit
@no_type_check
def _rise(size, asm: constexpr):
    """Return 1 - exp(-size) for size >= 0, by way of tanh(size / 2), which is exact next to 0."""
    t, _ = _tanh(size * 0.5, True, asm)
    return 2 * t * _inverse(1 + t, asm)


@triton.jit
@no_type_check
def _sin(z):
    """Return sin(z) for |z| <= pi / 2: Taylor's series, whose next term is below 7e-10.

    CUDA's sine reduces arguments of any size, in local memory.
    """
    s = z * z
    p = ((s * (1 / 6227020800) - 1 / 39916800) * s + 1 / 362880) * s - 1 / 5040
    return z + z * s * ((p * s + 1 / 120) * s - 1 / 6)


@triton.jit
@no_type_check
def _erf(size, gauss, asm: constexpr):
    """Return erf for size >= 0 from gauss = exp(-size²), off by 1.5e-7, and by 2e-6 of itself.

    Abramowitz and Stegun, 7.1.26; for small sizes Taylor's series.
    """
    t = _inverse(1 + size * 0.3275911, asm)
    p = t * (t * (t * (t * (t * 1.061405429 - 1.453152027) + 1.421413741) - 0.284496736) + 0.254829592)
    s = size * size
    return tl.where(size < 0.1, size * _DERF_SLOPE * ((s * 0.1 - 1 / 3) * s + 1), 1 - p * gauss)


@triton.jit
@no_type_check
def _half_curve(a, how: constexpr):
    """Return f and f' of the odd functions for a >= 0."""
    if how.function == "dyt":
        f, slope = _tanh(a, how.exact, how.asm)
    elif how.function == "smoothsign":
        r = _inverse(1 + a, how.asm)
        f, slope = tl.where(a > 1e9, 1.0, a * r), r * r  # beyond, it is 1 to the last bit, and inf / inf would be NaN
    elif how.function == "expsign":
        f, slope = _rise(a, how.asm), tl.exp2(a * -_LOG2_E)
    elif how.function == "exproot":
        root = tl.sqrt(a)
        f, slope = (
            _rise(root, how.asm),
            tl.where(root == 0, 0.0, tl.exp2(root * -_LOG2_E) * 0.5 * _inverse(root, how.asm)),
        )
    elif how.function == "isru" or how.function == "dyisru":
        inner = tl.where(a > 1e9, 1e9, a)  # beyond, a² would overflow
        q = tl.rsqrt(1 + inner * inner)
        f, slope = inner * q, tl.where(a > 1e9, 0.0, q * q * q)
    else:
        tl.static_assert(how.function == "cubsign")
        inner = tl.where(a > 1e6, 1e6, a)  # beyond, a³ would overflow
        r = _inverse(1 + inner * inner * inner, how.asm)
        f, slope = inner * inner * inner * r, tl.where(a > 1e6, 0.0, 3 * inner * inner * r * r)
    return f, slope


@triton.jit
@no_type_check
def curve(z, how: constexpr):
    """Return f(z) and f'(z)."""
    a = tl.abs(z)
    if how.function == "identity":
        f, slope = z, tl.full(z.shape, 1.0, tl.float32)
    elif how.function == "hardtanh":
        f, slope = tl.where(z > 1, 1.0, tl.where(z < -1, -1.0, z)), tl.where(a >= 1, 0.0, 1.0)
    elif how.function == "derf":
        gauss = tl.exp2(z * z * -_LOG2_E)
        f, slope = tl.erf(z), gauss * _DERF_SLOPE
        if not how.exact:
            half = _erf(a, gauss, how.asm)
            f = tl.where(z < 0, -half, half)
    elif how.function == "sigmoid":
        e = tl.exp2(a * -_LOG2_E)
        r = _inverse(1 + e, how.asm)
        f, slope = tl.where(z < 0, e * r, r), e * r * r
    elif how.function == "satursin":
        inner = tl.where(z > _HALF_PI, _HALF_PI, tl.where(z < -_HALF_PI, -_HALF_PI, z))
        f, slope = _sin(inner), tl.where(a > _HALF_PI, 0.0, _sin(_HALF_PI - tl.abs(inner)))
    else:
        f, slope = _half_curve(a, how)
        f = tl.where(z < 0, -f, f)
    return f, slope


@triton.jit
@no_type_check
def value(z, how: constexpr):
    """Return f(z) alone."""
    if how.function == "dyt" and how.asm and not how.exact:
        # Off by 2^-11 at most (PTX ISA), a quarter of what rounding to bf16 costs.
        f = tl.inline_asm_elementwise("tanh.approx.f32 $0, $1;", "=f,f", [z], tl.float32, is_pure=True, pack=1)
    else:
        f, _ = curve(z, how)
    return f
