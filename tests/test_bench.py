"""The instruments: rounds in turn, intervals, verdicts; what each of them prints and keeps; wrong input."""

import itertools
import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import dytrun
from torch import nn

from dytrun import bench, bench_model, bench_norm, bench_trainer, compose, norm, paired, timing
from dytrun.checkpoint import Store
from dytrun.distributed import Place
from dytrun.engine import Surroundings, fit
from dytrun.errors import UserError
from dytrun.optim import Plan
from dytrun.throughput import Clock

CPU = torch.device("cpu")
TINY = (
    "model=timm", "model.name=vit_tiny_patch16_224",
    "model.kwargs={patch_size: 4, embed_dim: 16, depth: 2, num_heads: 2, global_pool: avg}",
    "data.image_size=16", "data.num_classes=10",
)  # fmt: skip


def config_of(*words: str):
    return compose.expand(words, "bench").configs[0]


def eager_dyt() -> str:
    """Say who computes DyT here: the C++ op, or without a compiler torch's operators."""
    return norm.IMPLEMENTATIONS[norm.implementation(torch.ones(2, 3), "dyt")]


def said(line: str) -> None:
    """Progress is shown to nobody here."""


def test_rounds_are_in_turn_and_no_arm_always_follows_the_same_one():
    calls: list[int] = []

    def measure(arm: int):
        calls.append(arm)
        return float(arm)

    found = paired.in_turn([lambda arm=arm: measure(arm) for arm in range(3)], 12)
    assert found.tolist() == [[float(arm)] * 12 for arm in range(3)]
    rounds = [calls[start : start + 3] for start in range(0, 36, 3)]
    assert all(sorted(one) == [0, 1, 2] for one in rounds)
    before = {arm: {one[one.index(arm) - 1] for one in rounds if one.index(arm)} for arm in range(3)}
    assert all(len(others) == 2 for others in before.values())
    assert {one[0] for one in rounds} == {0, 1, 2}


def exact_coverage(low: int, high: int, n: int) -> float:
    """Probability that a median lies between the low-th and the high-th smallest of n values (from 1)."""
    return sum(math.comb(n, k) for k in range(low, high)) / 2**n


@pytest.mark.parametrize("confidence", [0.9, 0.95, 0.99])
@pytest.mark.parametrize("n", [5, 8, 11, 15, 21, 60])
def test_the_interval_of_a_median_is_the_narrowest_that_covers_it(n, confidence):
    values = np.random.default_rng(0).permutation(np.arange(1.0, n + 1))
    found = paired.ratio(values, np.ones(n), confidence)
    assert found.median == (n + 1) / 2
    if found.low is None:
        assert exact_coverage(1, n, n) < confidence, "even the whole range is too narrow"
        return
    low, high = round(found.low), round(found.high)
    assert low + high == n + 1
    assert exact_coverage(low, high, n) >= confidence > exact_coverage(low + 1, high - 1, n)


def test_what_may_be_concluded():
    itself = paired.Ratio(1.0, 0.98, 1.02, 21)
    slower, faster, close = (paired.Ratio(m, m - 0.01, m + 0.01, 21) for m in (1.1, 0.9, 1.025))
    assert "9.0 to 11.0 % slower" in paired.verdict("dyt", slower, "ln", itself)
    assert "9.0 to 11.0 % faster" in paired.verdict("dyt", faster, "ln", itself)
    assert "no larger than the error" in paired.verdict("dyt", close, "ln", itself)
    biased = paired.Ratio(1.05, 1.03, 1.1, 21)
    assert "no larger than the error" in paired.verdict("dyt", paired.Ratio(0.95, 0.93, 0.97, 21), "ln", biased)
    assert "not measured against itself" in paired.verdict("dyt", slower, "ln", None)
    short = paired.ratio(np.full(3, 2.0), np.ones(3), 0.99)
    assert "too few rounds (3)" in paired.verdict("dyt", short, "ln", itself)


def test_the_stopwatch():
    marks = []

    def parts(mark):
        mark()
        marks.append(1)
        mark()
        mark()

    found = timing.spans_ms(CPU, parts, 4)
    assert found.shape == (4, 2)
    assert bool((found >= 0).all()) and len(marks) == 4
    x = torch.randn(8, 16, requires_grad=True)
    layer = nn.LayerNorm(16)
    # x itself, and mean and reciprocal deviation of each row.
    assert timing.saved_bytes(lambda: layer(x), list(layer.parameters())) == x.nbytes + 2 * 8 * 4
    assert timing.saved_bytes(lambda: layer(x), []) > x.nbytes + 2 * 8 * 4
    assert timing.launches(CPU, lambda: (x * 2).view(-1) + 1) == 2
    assert timing.cold_copies(1024, CPU) > timing.cold_copies(2**30, CPU) >= 2


@pytest.fixture(scope="module")
def norms():
    """Measure one layer of each kind and layout, shortly."""
    shapes = "bench.shapes=[4x9x24,'2x8x6x6:channels_first','2x8x6x6:channels_last']"
    arms = "bench.arms=[ln,ln,dyt,torch,formula,plain,rms,identity]"
    config = config_of("bench=norm", shapes, arms, "bench.modes=[eager]", "bench.rounds=9", "bench.unit_ms=0.1")
    return bench_norm.measure(config, CPU, said)


def test_the_table_of_layers_says_who_computed_what(norms):
    assert [table.title for table in norms.tables] == [
        "4x9x24 fp32", "2x8x6x6:channels_first fp32", "2x8x6x6:channels_last fp32",
    ]  # fmt: skip
    for table in norms.tables:
        rows = {row[0]: dict(zip(table.columns, row, strict=True)) for row in table.rows}
        assert [row[0] for row in table.rows] == ["ln", "ln", "dyt", "torch", "formula", "plain", "rms", "identity"]
        assert rows["dyt"]["computed by"] == eager_dyt()
        assert rows["torch"]["computed by"] == norm.IMPLEMENTATIONS["torch"]
        assert (rows["dyt"]["saved / x"], rows["torch"]["saved / x"], rows["plain"]["saved / x"]) == (
            "1.00", "1.00", "2.00")  # fmt: skip
        assert "% of" not in rows["identity"]["fwd GB/s (of copy)"] and rows["identity"]["launches"] == "0"
        assert any(note.startswith("eager dyt: ") and "of ln's time" in note for note in table.notes)
        assert any("of plain's time" in note for note in table.notes)
        assert "copy: " in table.notes[-1]


def test_every_single_measurement_is_kept(norms):
    shape = norms.values["shapes"][0]
    assert [layer["arm"] for layer in shape["layers"]][:3] == ["ln", "ln", "dyt"]
    for layer in shape["layers"]:
        assert len(layer["forward_ms"]) == len(layer["backward_ms"]) == 9
    assert len(shape["copy_ms"]) == 9
    json.dumps(norms.values, allow_nan=False)


def test_a_model_with_and_without_its_norms():
    config = config_of("bench=model", *TINY, "bench.modes=[eager]", "bench.rounds=3", "bench.batch=2", "bench.steps=2")
    found = bench_model.measure(config, CPU, said)
    assert [table.title for table in found.tables] == [
        f"vit_tiny_patch16_224 eager {what}" for what in ("train", "infer")
    ]
    train = found.values["measured"][0]
    by = {arm["arm"]: arm["computed_by"] for arm in train["arms"]}
    assert by == {
        "ln": "F.layer_norm, eager", "dyt": f"{eager_dyt()}, eager", "formula": "row-expanded formula, eager",
        "identity": "no norms",
    }  # fmt: skip
    assert all(np.array(arm["step_ms"]).shape == (3, 2) for arm in train["arms"])
    saved = {arm["arm"]: arm["saved_bytes"] for arm in train["arms"]}
    assert saved["identity"] < saved["dyt"] <= saved["ln"] < saved["formula"]
    assert len(found.tables[0].rows) == 5 and "ln against itself" in found.tables[0].notes[-2]


def test_the_arm_of_a_model_is_what_norm_says():
    config = config_of("bench=model", *TINY, "norm=derf", "bench.arms=[ln,dyt]", "bench.modes=[eager]",
                       "bench.passes=[infer]", "bench.rounds=3", "bench.batch=2", "bench.steps=1")  # fmt: skip
    (table,) = bench_model.measure(config, CPU, said).tables
    assert table.rows[1][1] == "row-expanded formula, eager"
    assert "not measured against itself" in table.notes[0]


def test_the_trainers_loop_beside_a_bare_one():
    found = bench_trainer.measure(
        config_of("bench=trainer", *TINY, "bench.rounds=9", "bench.steps=3", "norm=dyt"), CPU, said
    )
    (table,) = found.tables
    assert [row[0] for row in table.rows] == ["bare loop", "bare loop", "dytrun"]
    assert "overhead: " in table.notes[1]
    assert np.array(found.values["bare_ms"]).shape == (2, 9) and len(found.values["dytrun_ms"]) == 9


def test_both_loops_do_the_same_training(tmp_path):
    """The weights after five steps of `fit` are those of five bare ones, bit for bit."""
    run = bench_trainer._as_measured(config_of("bench=trainer", *TINY, "norm=dyt").run, 5)
    run = run.model_copy(update={"optim": run.optim.model_copy(update={"lr": 1e-3})})
    batch = bench_model.random_batch(run, 4, CPU)
    bare, ours = (bench_trainer.training_state(run, CPU) for _ in range(2))
    before = [parameter.clone() for parameter in bare.model.parameters()]
    for _ in range(5):
        bench_model.bare_step(bare, batch, run)
    around = Surroundings(Plan(10**9, 10**9, 0, 4, 1), Place(0, 1, CPU), Clock(CPU, 4), itertools.repeat(batch),
                          lambda: iter(()), 0, Store(tmp_path / "checkpoints", 2), [])  # fmt: skip
    assert next(fit(run, ours, around)).step == 5
    for one, other in zip(ours.model.parameters(), bare.model.parameters(), strict=True):
        assert torch.equal(one, other)
    assert not all(torch.equal(one, old) for one, old in zip(bare.model.parameters(), before, strict=True))
    assert bench_model.at_rest(run).optim.lr < 1e-9


@pytest.mark.slow
def test_the_command_prints_a_table_and_leaves_a_file(tmp_path):
    """In a process of its own, where layers can be compiled: the shape checks of the tests would be compiled too."""
    words = ("bench.shapes=[2x3x8]", "bench.arms=[ln,ln,dyt,formula,torch]", "bench.rounds=3", "bench.unit_ms=0.1")
    done = dytrun("bench=norm", *words, f"runs_dir={tmp_path}", "tracking.mode=offline")
    assert done.returncode == 0, done.stderr
    assert "2x3x8 fp32" in done.stdout
    assert "too few rounds (3)" in done.stdout
    (file,) = (tmp_path / "bench").glob("norm-*.json")
    assert done.stdout.splitlines()[-1] == f"{file} written"
    values = json.loads(file.read_text())
    assert values["device"].startswith("CPU")
    assert (values["bench"]["name"], values["precision"]) == ("norm", "fp32")
    layers = [(layer["arm"], layer["mode"], layer["computed_by"]) for layer in values["shapes"][0]["layers"]]
    assert layers == [
        *[("ln", "eager", "F.layer_norm")] * 2,
        ("dyt", "eager", eager_dyt()),
        ("formula", "eager", norm.IMPLEMENTATIONS["formula"]),
        ("torch", "eager", norm.IMPLEMENTATIONS["torch"]),
        *[("ln", "compiled", "F.layer_norm")] * 2,
        ("dyt", "compiled", norm.IMPLEMENTATIONS["sigmoid"]),
        ("formula", "compiled", norm.IMPLEMENTATIONS["formula"]),
    ]
    (log,) = (tmp_path / "bench" / "wandb").glob("offline-run-*/*.wandb")
    assert log.stat().st_size > 1000


WRONG = [
    (["bench=norms"], "bench=norms: no such option; did you mean 'norm'?"),
    (["bench", "modell"], "bench=modell: no such option; did you mean 'model'?"),
    (["bench=norm", "bench.shapes=[3x]"], "bench.shapes: '3x' is no shape; say BxNxC"),
    (["bench=norm", "bench.shapes=['3x4:channels_first']"], "bench.shapes: '3x4:channels_first' is no shape"),
    (["bench=norm", "bench.rounds=2"], "bench.rounds"),
    (["bench=norm", "bench.round=5"], "did you mean 'bench.rounds'?"),
    (["bench=norm", "bench.arms=[ln,triton]"], "bench.arms: triton runs on cuda alone"),
    (["bench=norm", "bench.arms=[ln,liger]", "bench.shapes=[2x3x4]"], "bench.arms: liger runs on cuda alone"),
    (["bench=norm", "bench.arms=[ln,native]", "precision=fp16"], "bench.arms: there is no C++ op for this dtype"),
    (["bench=norm", "bench.arms=[native,torch]", "bench.modes=[compiled]"], "bench.arms: nothing of"),
    (["bench=norm", "bench.modes=[eager,eager]"], "bench.modes: ['eager', 'eager'] is not allowed (each should be"),
    (["bench=norm", "bench.out=/proc/x.json"], "bench.out: /proc/x.json cannot be written"),
    (["bench=model", "model.name=resnet18", "model=timm", "bench.arms=[ln,identity]"], "resnet18 has no LayerNorm"),
    (["bench=model", "epochs=0", "bench.steps=0"], "bench.steps"),
    (["bench=model", "-m", "model=vit_b,vit_s"], "does not sweep"),
    (["train", "bench=norm", "data=digits"], "bench"),
]


@pytest.mark.parametrize(("words", "line"), WRONG, ids=[" ".join(words) for words, _ in WRONG])
def test_wrong_input_is_one_line_and_leaves_nothing(words, line, tmp_path, monkeypatch, capsys):
    from dytrun import cli

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("sys.argv", ["dytrun", *words])
    assert cli.main() == 2
    assert line in capsys.readouterr().err
    left = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert not left


def test_all_that_is_wrong_is_said_at_once():
    with pytest.raises(UserError) as caught:
        config_of("bench=norm", "bench.rounds=1", "precision=fp8", "model.drop_path=2")
    assert {problem.partition(":")[0] for problem in caught.value.problems} == {
        "bench.rounds", "precision", "model.drop_path"}  # fmt: skip


def test_help_lists_every_instrument_with_its_keys():
    from dytrun.usage import command_help

    text = command_help("bench", None)
    for path in (Path(__file__).parents[1] / "conf" / "bench").glob("*.yaml"):
        assert f"bench={path.stem}" in text
    assert "bench.shapes: null" in text and "bench.length: auto" in text
    assert "bench=" not in command_help("train", None)


def test_a_file_is_promised_before_anything_is_measured(tmp_path):
    config = config_of("bench=norm", f"runs_dir={tmp_path}/here")
    path = bench.target(config)
    assert path.parent.is_dir() and path.name.startswith("norm-")
