"""What is known of one norm of a trained model, from what went into it over some batches.

    z = alpha * x + shift of a point-wise layer; of a norm a * x, with the a of the tanh that comes nearest to it

Axes: R rows (tokens or pixels), C channel.
"""

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from scipy import stats
from torch import Tensor, nn

from dytrun.activations import SATURATED, inner, normalized
from dytrun.calibrate import fit
from dytrun.errors import UserError
from dytrun.functions import BOUNDS, FUNCTIONS
from dytrun.norm import PointWise
from dytrun.sites import Site

# Deviation from the straight line through f's origin, as a share of half of f's range, up to which an input is linear.
LINEAR = 0.01
# Times the median channel's root mean square, beyond which a channel stands out.
OUTLIER = 5.0
# Rows of a site that are kept to be drawn and fitted, and elements of them that a fit looks at.
_MAX_ROWS, _MAX_FITTED = 1024, 32_768
_BINS = 24
# Over fewer sites a correlation has no interval.
_FEWEST = 4
# Step for the slope of f at 0.
_SMALL = 1e-6


@dataclass(frozen=True)
class Shape:
    """How a norm's output, before weight and bias, depends on its input: all elements of the rows that were kept."""

    scale: float
    """a of the tanh(a x) b + c that is nearest by least squares."""
    height: float
    offset: float
    r2_tanh: float
    """Share of the output's variance that this tanh explains."""
    r2_line: float
    """The same of the best straight line."""
    s_index: float
    """Share of the straight line's squared error that the tanh removes: 0 a straight line, 1 a tanh."""


@dataclass(frozen=True)
class Shares:
    """How much of a norm's input lies where; they add up to 1."""

    linear: float
    curved: float
    saturated: float | None
    """None for a function without bounds."""


@dataclass(frozen=True)
class Spread:
    """The values of a parameter over its channels."""

    mean: float
    std: float
    least: float
    most: float
    counts: list[int]
    """Of a histogram between least and most."""


@dataclass(frozen=True)
class SiteLook:
    """What a norm is, what goes into it and what it makes of that."""

    name: str
    kind: str
    """The function's name, or the norm's class."""
    role: str
    block: int | None
    num_channels: int
    num_elements: int
    input_mean: float
    input_std: float
    """Over all elements: images, tokens and channels together."""
    alpha: float | None
    """Its mean where there is one a channel."""
    shift: float | None
    shape: Shape | None
    """Of norms; the curve of a point-wise layer is its formula."""
    shares: Shares
    weight: Spread | None
    bias: Spread | None
    rms_in: float
    rms_out: float
    """After weight and bias."""
    largest_in: float
    """Largest absolute value."""
    outliers: dict[int, float]
    """Channels whose root mean square is beyond 5 times the median channel's, with that ratio."""

    @property
    def inverse_std(self) -> float | None:
        """1 / input_std; None for inputs that are all the same."""
        return 1 / self.input_std if self.input_std else None


@dataclass(frozen=True)
class Cloud:
    """Rows of a site, drawn at random: what went in, and what came out before weight and bias, (R, C) each."""

    x: np.ndarray
    y: np.ndarray


class Watch:
    """Takes in what one norm computes, batch by batch."""

    def __init__(self, site: Site, norm: nn.Module, num_batches: int):
        self.site, self.norm = site, norm
        self._axis = -1 if site.channels_last else 1
        self._rows_a_batch = -(-_MAX_ROWS // num_batches)
        self._sizes: list[int] = []
        self._moments: list[Tensor] = []
        self._squares: list[Tensor] = []
        self._counts: list[Tensor] = []
        self._rows: list[tuple[Tensor, Tensor]] = []

    @torch.no_grad()
    def take(self, x: Float[Tensor, "..."]) -> None:
        """Take in one call's input.

        Raises:
            UserError: it is not finite.
        """
        y = normalized(self.norm, x)
        x = x.float()
        rows_in, rows_out = (value.movedim(self._axis, -1).flatten(0, -2) for value in (x, y))
        out = rows_out
        for parameter, operate in ((self._parameter("weight"), torch.mul), (self._parameter("bias"), torch.add)):
            out = out if parameter is None else operate(out, parameter.float())
        var, mean = torch.var_mean(rows_in.double(), correction=0)
        self._moments.append(torch.stack([mean, var, rows_in.abs().amax(), out.double().square().mean()]))
        if not bool(self._moments[-1].isfinite().all()):
            raise UserError(f"{self.site.name}: its values are not finite; choose another checkpoint")
        self._sizes.append(rows_in.numel())
        self._squares.append(rows_in.double().square().sum(0))
        if isinstance(self.norm, PointWise):
            self._counts.append(_counts(self.norm.function, inner(self.norm, x)))
        generator = torch.Generator().manual_seed(len(self._rows))
        drawn = torch.randperm(len(rows_in), generator=generator)[: self._rows_a_batch].to(x.device)
        self._rows.append((rows_in[drawn].cpu(), rows_out[drawn].cpu()))

    @property
    def is_seen(self) -> bool:
        """Whether the model has called this norm."""
        return bool(self._rows)

    @torch.no_grad()
    def look(self) -> tuple[SiteLook, Cloud]:
        """Return what was seen; it must have been something."""
        x, y = (torch.cat([rows[number] for rows in self._rows]) for number in (0, 1))
        sizes = np.array(self._sizes, dtype=float)
        means, variances, largest, squares = torch.stack(self._moments, 1).cpu().numpy()
        mean = np.average(means, weights=sizes)
        std = np.sqrt(np.average(variances + (means - mean) ** 2, weights=sizes))
        by_channel = (torch.stack(self._squares).sum(0) / (sizes.sum() / len(self._squares[0]))).sqrt().cpu().numpy()
        shape = None if isinstance(self.norm, PointWise) else _shape(x, y)
        counts = torch.stack(self._counts).sum(0) if shape is None else _counts("dyt", shape.scale * x)
        function = self.norm.function if isinstance(self.norm, PointWise) else "dyt"
        alpha, shift = (self._parameter(name) for name in ("alpha", "shift"))
        look = SiteLook(
            name=self.site.name,
            kind=function if isinstance(self.norm, PointWise) else type(self.norm).__name__,
            role=self.site.role,
            block=self.site.block,
            num_channels=self.site.num_channels,
            num_elements=int(sizes.sum()),
            input_mean=float(mean),
            input_std=float(std),
            alpha=None if alpha is None else alpha.float().mean().item(),
            shift=None if shift is None else shift.float().mean().item(),
            shape=shape,
            shares=_shares(function, counts),
            weight=_spread(self._parameter("weight")),
            bias=_spread(self._parameter("bias")),
            rms_in=float(np.sqrt(np.average(by_channel**2))),
            rms_out=float(np.sqrt(np.average(squares, weights=sizes))),
            largest_in=float(largest.max()),
            outliers=_outliers(by_channel),
        )
        return look, Cloud(x.numpy(), y.numpy())

    def _parameter(self, name: str) -> Tensor | None:
        return self.norm._parameters.get(name)


def _counts(function: str, z: Tensor) -> Tensor:
    """Count (all, linear, saturated) elements of z = alpha x + shift."""
    f, half = FUNCTIONS[function], 1.0
    ends = torch.tensor([-_SMALL, 0.0, _SMALL], dtype=torch.float64)
    below, origin, above = f(ends).tolist()
    value = f(z)
    if function in BOUNDS:
        low, high = BOUNDS[function]
        half = (high - low) / 2
        is_saturated = (value - (low + high) / 2).abs() > SATURATED * half
    else:
        is_saturated = torch.zeros_like(value, dtype=torch.bool)
    slope = (above - below) / (2 * _SMALL)
    is_linear = ((value - origin - slope * z).abs() <= LINEAR * half) & ~is_saturated
    return torch.stack([torch.ones_like(is_linear).sum(), is_linear.sum(), is_saturated.sum()])


def _shares(function: str, counts: Tensor) -> Shares:
    num, linear, saturated = counts.tolist()
    return Shares(linear / num, (num - linear - saturated) / num, saturated / num if function in BOUNDS else None)


def _shape(x: Tensor, y: Tensor) -> Shape:
    """Fit a tanh and a straight line to the elements of rows (R, C) of a norm's input and output."""
    generator = torch.Generator().manual_seed(0)
    drawn = torch.randperm(x.numel(), generator=generator)[:_MAX_FITTED]
    points = x.flatten()[drawn].view(-1, 1), y.flatten()[drawn].view(-1, 1)
    bent, line = PointWise(1, "dyt"), PointWise(1, "identity")
    errors = []
    for layer in (bent, line):
        layer.implementation = "formula"
        errors.append(fit(layer, *points).error ** 2)
    height, offset = (bent.get_parameter(name).item() for name in ("weight", "bias"))
    removed = 1 - errors[0] / errors[1] if errors[1] else 0.0
    return Shape(bent.alpha.item(), height, offset, 1 - errors[0], 1 - errors[1], removed)


def _spread(parameter: Tensor | None) -> Spread | None:
    if parameter is None:
        return None
    values = parameter.detach().double().cpu().numpy()
    counts, _ = np.histogram(values, _BINS)
    return Spread(float(values.mean()), float(values.std()), float(values.min()), float(values.max()), counts.tolist())


def _outliers(by_channel: np.ndarray) -> dict[int, float]:
    ratios = by_channel / max(float(np.median(by_channel)), 1e-30)
    order = np.argsort(-ratios, kind="stable")
    return {int(number): float(ratios[number]) for number in order if ratios[number] > OUTLIER}


@dataclass(frozen=True)
class Correlation:
    """Of alpha with 1/std of the input, over the sites of a model (figure 8 of DyT's paper)."""

    pearson: float
    low: float
    high: float
    """Interval of `pearson`, 95 %, as if the sites were independent of one another."""
    spearman: float
    num_sites: int


def correlation(sites: list[SiteLook]) -> Correlation | None:
    """Correlate alpha with 1/std over sites."""
    points = [(site.alpha, site.inverse_std) for site in sites if site.alpha is not None and site.inverse_std]
    if len(points) < _FEWEST or any(np.ptp(values) == 0 for values in np.array(points).T):
        return None
    alphas, inverse = np.array(points, dtype=float).T
    # SciPy's types do not name what these results have.
    found: Any = stats.pearsonr(alphas, inverse)
    ranked: Any = stats.spearmanr(alphas, inverse)
    low, high = found.confidence_interval(0.95)
    return Correlation(float(found.statistic), float(low), float(high), float(ranked.statistic), len(points))
