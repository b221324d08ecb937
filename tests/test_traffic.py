"""What torch.compile writes for the norms, counted for an H200 that is only described: see traffic.py."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

pytest.importorskip("triton", reason="inductor writes Triton code")

ROWS, CHANNELS = 50432, 768  # ViT-B, 256 images
# What one row's float32 costs an element when it is written and read again: LayerNorm's statistics, DyT's sums.
ROW = 2 * 4 / CHANNELS


@pytest.fixture(scope="module")
def counted():
    """Return what a process of its own counts: the shape checks around every function would be compiled too."""
    alone = f"{ROWS}x{CHANNELS} (LayerNorm|naive DyT|DyT|DyT, wide|DyT by sigmoid|Derf, wide|isru, wide)"
    only = f"^({alone}|block .* {ROWS}x{CHANNELS} (LayerNorm|DyT|Derf), wide)$"
    command = [sys.executable, str(Path(__file__).with_name("traffic.py")), "--json", "--only", only]
    done = subprocess.run(command, capture_output=True, text=True, timeout=200, check=False)
    assert done.returncode == 0, done.stderr
    rows = [json.loads(line) for line in done.stdout.splitlines()]
    found = {row["what"] if row["shape"] == f"{ROWS}x{CHANNELS}" else (row["shape"], row["what"]): row for row in rows}
    assert len(found) == 7 + 6
    return found


@pytest.mark.slow
@pytest.mark.parametrize("what", ["DyT", "DyT, wide", "DyT by sigmoid", "Derf, wide", "isru, wide"])
def test_a_compiled_layer_is_one_kernel_each_way_as_layernorm_is(counted, what):
    ours, theirs = counted[what], counted["LayerNorm"]
    for way in ("forward", "backward"):
        assert ours[way]["full"] == theirs[way]["full"] == 1
    # x in and y out, two bytes each; then x and its gradient's two ends. 0.3 is what sums over partial ones may cost.
    assert 4 <= ours["forward"]["counted"] <= 4.1
    assert 6 <= ours["backward"]["counted"] <= 6.3
    # alpha, and shift, have one partial sum a row, LayerNorm two statistics.
    assert abs(ours["backward"]["counted"] - theirs["backward"]["counted"]) <= 2 * ROW
    assert abs(ours["backward"]["moved"] - theirs["backward"]["moved"]) <= 2 * ROW


@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_between_residuals_it_moves_no_more_than_layernorm(counted, dtype):
    """As dytrun compiles; with inductor's own limits a residual that is recomputed costs DyT two more passes."""
    theirs = counted[f"block {dtype} {ROWS}x{CHANNELS}", "LayerNorm, wide"]["backward"]["counted"]
    for what in ("DyT, wide", "Derf, wide"):
        assert counted[f"block {dtype} {ROWS}x{CHANNELS}", what]["backward"]["counted"] <= theirs + 2 * ROW


@pytest.mark.slow
def test_the_workspace_of_partial_sums_is_seen_in_the_wrapper(counted):
    # Two sums a channel, float32, written and read, for every 16 to 128 rows: that is how inductor bounds its split.
    for what in ("LayerNorm", "DyT"):
        way = counted[what]["backward"]
        assert 6 + 16 / 128 <= way["moved"] <= 6.3 + 16 / 16
        assert way["small"] >= 2, "a sum each of weight and bias"


@pytest.mark.slow
def test_the_count_tells_a_formula_that_costs_more(counted):
    # Three passes: columns, alpha, and x, each over x and its output's gradient; the last one writes.
    naive = counted["naive DyT"]
    assert (naive["forward"]["full"], naive["backward"]["full"]) == (1, 3)
    assert 3 * 4 + 2 <= naive["backward"]["counted"] <= 3 * 4 + 2 + 0.3


def test_the_walk_over_a_graph_is_that_of_the_engine():
    from described_gpu import gradients

    torch.manual_seed(0)
    alpha, weight = torch.randn(1, requires_grad=True), torch.randn(6, requires_grad=True)

    def layer(x: torch.Tensor) -> torch.Tensor:
        return (weight * torch.erf(alpha.expand(4, 1) * x.float() + alpha)).to(x.dtype)

    x = torch.randn(4, 6, dtype=torch.bfloat16, requires_grad=True)
    branch = torch.randn(6, requires_grad=True)
    unused = torch.zeros(1, requires_grad=True)
    first = layer(x + branch.bfloat16())
    outputs = [layer(first * x), first]
    inputs = [x, branch, unused, alpha, weight]
    given = [torch.randn_like(output) for output in outputs]
    expected = torch.autograd.grad(outputs, inputs, given, allow_unused=True, retain_graph=True)
    found = gradients(outputs, inputs, given)
    for one, other in zip(found, expected, strict=True):
        assert (one is None) == (other is None)
        assert one is None or (one.dtype == other.dtype and torch.equal(one, other))
    assert sum(gradient is None for gradient in found) == 1
