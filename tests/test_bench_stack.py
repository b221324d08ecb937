"""`bench=llama`: RMSNorm against torch's, what the blocks compute, one set of weights, and a small measurement."""

import json
import os
import subprocess
import sys

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from dytrun import bench_stack, llama
from dytrun.compose import expand
from dytrun.paired import Ratio

TINY = llama.Size(16, 2, 24)
ARMS = ["rms", "rms_fused", "plain", "dyt", "formula", "identity"]


def hidden(tokens: int = 6, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.randn(1, tokens, TINY.width, generator=torch.Generator().manual_seed(1)).to(dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_rmsnorm_is_torchs_to_the_last_roundings(dtype):
    torch.manual_seed(0)
    layer = llama.UnfusedRms(64)
    torch.nn.init.normal_(layer.weight)
    layer = layer.to(dtype)
    x = (3 * torch.randn(2, 5, 64)).to(dtype)
    y = layer(x)
    exact = F.rms_norm(x.double(), (64,), layer.weight.double(), 1e-5)
    assert (y.shape, y.dtype) == (x.shape, dtype)
    # Two roundings to the dtype, half an eps each: of x / rms, and of its product with the weight. Before that, in
    # float32: 64 squares and their sum are off by 64 half eps at most, the root halves that; a division by 64 and a sum
    # with eps likewise, rsqrt and a product, each an eps at most. float16 adds half its smallest number.
    bound = torch.finfo(dtype).eps + (64 / 4 + 4) * torch.finfo(torch.float32).eps
    assert bool(((y.double() - exact).abs() <= bound * exact.abs() + torch.finfo(dtype).smallest_normal * bound).all())


def test_plain_dyt_is_the_layer_of_dytrun():
    torch.manual_seed(0)
    layer, ours = llama.PlainDyt(16), llama.norm_of("dyt", 16)
    torch.nn.init.normal_(layer.weight)
    ours.load_state_dict(layer.state_dict())
    x = 3 * torch.randn(2, 5, 16)
    exact = layer.weight.double() * torch.tanh(0.5 * x.double())
    assert layer.alpha.item() == 0.5
    for found in (layer(x), ours(x)):
        # tanh to four units in the last place, and as it is by way of a sigmoid: that of 1, not of its own value.
        assert bool(((found - exact).abs() <= 4 * torch.finfo(torch.float32).eps * layer.weight.abs()).all())
    assert layer.bfloat16()(x.bfloat16()).dtype == torch.bfloat16


def test_a_token_sees_itself_and_those_before_it():
    x = hidden()
    for arm in ARMS:
        stack = llama.Stack(arm, llama.halves(TINY, 2, x), x)
        other = x.clone()
        other[:, 3] += 1
        before, after = stack(x), stack(other)
        assert before.shape == x.shape
        assert torch.equal(before[:, :3], after[:, :3])
        assert bool((before[:, 3:] != after[:, 3:]).any(-1).all()), "also those behind it, through attention"


def test_rotary_turns_pairs_of_channels_by_the_position():
    """As complex numbers, channel i and i + d/2 times exp(1j * position * 10000^(-2i/d))."""
    x = torch.randn(1, 2, 7, 8, dtype=torch.float64)
    pairs = torch.complex(x[..., :4], x[..., 4:])
    speeds = 10_000.0 ** -(torch.arange(0, 8, 2, dtype=torch.float64) / 8)
    angles = torch.arange(7, dtype=torch.float64)[:, None] * speeds
    expected = pairs * torch.polar(torch.ones_like(angles), angles)
    found = llama.turned(x, llama.rotary(7, 8).double())
    # An angle of up to 6 in float32 is off by 2 eps of it (its speed, and the product), and x by as much of its length.
    bound = (
        2 * 6 * torch.finfo(torch.float32).eps * expected.abs() + 2 * torch.finfo(torch.float32).eps * expected.abs()
    )
    assert bool(((torch.complex(found[..., :4], found[..., 4:]) - expected).abs() <= bound).all())


def test_attention_is_the_softmax_of_turned_products():
    x = hidden().double()
    attention = llama.Attention(TINY, x)
    for layer in attention.children():
        torch.nn.init.normal_(layer.weight, std=0.3)
    turns = llama.rotary(6, 8).double()
    found = attention(x, turns)
    heads = []
    for head in (slice(0, 8), slice(8, 16)):
        q, k, v = (
            (x[0] @ layer.weight[head].T)[None, None] for layer in (attention.query, attention.key, attention.value)
        )
        scores = (llama.turned(q, turns) @ llama.turned(k, turns).transpose(2, 3))[0, 0] / 8**0.5
        scores = scores.masked_fill(torch.ones(6, 6).triu(1).bool(), -torch.inf)
        heads.append(scores.softmax(-1) @ v[0, 0])
    expected = torch.cat(heads, -1) @ attention.out.weight.T
    torch.testing.assert_close(found[0], expected, rtol=1e-12, atol=1e-12)  # float64, some hundred operations


def test_all_arms_share_their_weights_and_a_second_process_has_the_same():
    x = hidden()
    torch.manual_seed(5)
    state = torch.get_rng_state()
    halves, again = llama.halves(TINY, 2, x), llama.halves(TINY, 2, x)
    assert torch.equal(torch.get_rng_state(), state), "nothing is drawn from the global generator"
    stacks = [llama.Stack(arm, halves, x) for arm in ARMS]
    linear = [{name: p for name, p in stack.named_parameters() if "norm" not in name} for stack in stacks]
    assert len(linear[0]) == 2 * 7
    for other in linear[1:]:
        assert all(other[name] is value for name, value in linear[0].items())
    for name, value in llama.Stack("rms", again, x).named_parameters():
        assert torch.equal(value, stacks[0].get_parameter(name))
        assert bool(value.isfinite().all()) and bool((value != 0).all())
    assert [len(stack.norms()) for stack in stacks] == [5] * len(ARMS)
    assert {name for name, _ in stacks[ARMS.index("dyt")].norm.named_parameters()} == {"alpha", "weight"}


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("depth", [1, 32])
def test_no_arm_meets_zero_or_infinite_gradients_in_half_precision(dtype, depth):
    x = hidden(dtype=dtype)
    halves = llama.halves(TINY, depth, x)
    for arm in ARMS:
        stack = llama.Stack(arm, halves, x)
        llama.loss_of(stack(x)).backward()
        for name, value in stack.named_parameters():
            assert bool(value.grad.isfinite().all()), (arm, name)
            assert bool(value.grad.any()), (arm, name)
            value.grad = None


def test_what_computes_the_norms_is_said():
    x = hidden()
    assert llama.described("dyt", False, x) in ("C++ op", "sigmoid-form Function")
    assert llama.described("dyt", True, x) == "row-expanded formula, tanh by a sigmoid; compiled"
    assert llama.described("formula", False, x) == "row-expanded formula"
    assert llama.described("identity", True, x) == "none"
    assert len({llama.described(arm, False, x) for arm in ARMS}) == len(ARMS)


def test_a_measurement_in_eager_mode(monkeypatch):
    monkeypatch.setitem(llama.SIZES, "small", TINY)
    arms = ["rms", *ARMS]
    config = expand(
        ["bench=llama", f"bench.arms=[{','.join(arms)}]", "bench.modes=[eager]", "bench.depth=2", "bench.rounds=3",
         "bench.length=64"], "bench",
    )  # fmt: skip
    lines = []
    found = bench_stack.measure(config.configs[0], torch.device("cpu"), lines.append)
    assert len(lines) == 2
    (table,) = found.tables
    assert len(table.rows) == 2 * 2 * len(arms)
    assert all(len(row) == len(table.columns) for row in table.rows)
    assert [row[0] for row in table.rows[:7]] == ["rms", "rms (again)", *ARMS[1:]]
    assert {(row[1], row[2]) for row in table.rows} == {
        (p, w) for p in ("train", "infer") for w in ("norms alone", "whole")
    }
    assert all("too few rounds (3)" in note for note in table.notes) and len(table.notes) == 2 * 2 * 5
    values = json.loads(json.dumps(found.values))
    assert values["stack"] == {"size": "small", "width": 16, "heads": 2, "hidden": 24, "depth": 2, "tokens": 64}
    assert values["closing"] == [], "one mode is no comparison"
    measured = values["measured"]
    assert [each["arm"] for each in measured] == 4 * arms
    for number, each in enumerate(measured):
        baseline = measured[number - number % len(arms)]
        assert len(each["ms"]) == 3 and min(each["ms"]) > 0
        ratios = sorted(a / b for a, b in zip(each["ms"], baseline["ms"], strict=True))
        assert each["ratio"]["median"] == pytest.approx(ratios[1])
        assert each["ms_p50"] == sorted(each["ms"])[1]
        assert (each["verdict"] is None) == (each["arm"] == "rms")
    alone = {
        each["arm"]: min(each["ms"]) for each in measured if (each["pass"], each["what"]) == ("infer", "norms alone")
    }
    # The best of three rounds, for other tests are running; no operator at all against five norms of at least one.
    assert alone.pop("identity") < min(alone.values()) / 2


# In a process of its own: the shape checks that the tests put around every function would be traced too.
_COMPILED = """
import json, sys, torch
from dytrun import bench_stack, llama
from dytrun.compose import expand
llama.SIZES["small"] = llama.Size(16, 2, 24)
config = expand(["bench=llama", "bench.depth=1", "bench.rounds=8", "bench.length=8", *sys.argv[1:]], "bench").configs[0]
graphs = []
def count(line):
    graphs.append(torch._dynamo.utils.counters["stats"]["unique_graphs"])
try:
    found = bench_stack.measure(config, torch.device("cpu"), count)
except Exception as error:
    print(json.dumps([type(error).__name__, str(error)]))
else:
    count("")
    print(json.dumps([graphs, found.values["closing"], [table.rows for table in found.tables]]))
"""


def in_a_process(*overrides: str, **env: str) -> list:
    done = subprocess.run(
        [sys.executable, "-c", _COMPILED, *overrides],
        capture_output=True, text=True, timeout=550, check=False, env=os.environ | env,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


@pytest.mark.slow
def test_a_measurement_of_compiled_modes():
    graphs, closing, tables = in_a_process("bench.arms=[rms,rms,dyt,identity]")
    eager, norms, whole = graphs[2] - graphs[0], graphs[4] - graphs[2], graphs[6] - graphs[4]
    assert eager == 0
    # Each pass: the norms of two kinds; of the whole stack three kinds besides.
    assert norms >= 2 * 2
    assert whole >= 2 * (2 + 3)
    assert len(tables) == 3
    assert [rows[2][-1] for rows in tables[1:]] == ["row-expanded formula, tanh by a sigmoid; compiled"] * 2
    assert [line.partition(":")[0] for line in closing] == [
        f"{p}, whole, dyt of rms's time" for p in ("train", "infer")
    ]
    for line in closing:
        assert "eager" in line and "norms_compiled" in line and ", compiled" in line


@pytest.mark.slow
def test_what_cannot_be_compiled_is_not_run_eagerly(tmp_path):
    name, said = in_a_process(
        "bench.arms=[rms,rms]", "bench.modes=[norms_compiled]", CXX="/nowhere/c++",
        TORCHINDUCTOR_CACHE_DIR=str(tmp_path),
    )  # fmt: skip
    assert name == "UserError"
    assert "torch cannot compile here" in said and "bench.modes=[eager]" in said


@pytest.mark.parametrize(
    ("eager", "compiled", "itself", "tail"),
    [
        (
            [0.8, 0.9],
            [0.99, 1.01],
            [0.99, 1.01],
            "(faster), compiled 1.000 [0.990, 1.010] (within the error); compiled, the gain is gone",
        ),
        ([0.8, 0.9], [1.1, 1.2], [0.99, 1.01], "(slower); compiled, the gain is gone"),
        ([0.8, 0.9], [0.5, 1.5], [0.99, 1.01], "compiled 1.000 [0.500, 1.500] (within the error)"),
        ([0.8, 0.9], [0.91, 0.97], [0.99, 1.01], "(faster), compiled 0.940 [0.910, 0.970] (faster)"),
        (
            [0.95, 1.05],
            [0.99, 1.01],
            [0.99, 1.01],
            "(within the error), compiled 1.000 [0.990, 1.010] (within the error)",
        ),
        ([0.8, 0.9], [0.99, 1.01], [0.85, 1.2], "(within the error), compiled 1.000 [0.990, 1.010] (within the error)"),
        ([0.8, 0.9], [0.99, 1.01], None, "(not known), compiled 1.000 [0.990, 1.010] (not known)"),
    ],
)
def test_the_last_sentence_claims_no_more_than_the_intervals(eager, compiled, itself, tail):
    def of(interval: list[float]) -> Ratio:
        return Ratio(sum(interval) / 2, *interval, n=15)

    again = [] if itself is None else ["rms"]
    config = expand(["bench=llama", "bench.modes=[eager,compiled]", "bench.passes=[infer]",
                     f"bench.arms=[{','.join(['rms', 'dyt', *again])}]"], "bench").configs[0]  # fmt: skip
    cells = [
        bench_stack._Cell(mode, "infer", what, np.ones((3, 15)), [0.0] * 3,
                          [of([1.0, 1.0]), of(found if what == "whole" else [7.0, 8.0]), *(of(itself) for _ in again)])
        for mode, found in (("eager", eager), ("compiled", compiled)) for what in ("norms alone", "whole")
    ]  # fmt: skip
    (said,) = bench_stack._closing(config.bench, cells)
    assert said.startswith("infer, whole, dyt of rms's time: eager ")
    assert said.endswith(tail)
