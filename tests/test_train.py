"""The whole path in real processes: a sweep over both arms, its files, its report; ranks; faults; W&B offline."""

import json
import math
import os
import random
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import (
    TINY,
    ancestors,
    children_cpu_s,
    dytrun,
    is_gone,
    lines,
    only,
    processes,
    tiny,
    wait_for_title,
    wait_until,
)

from dytrun import norm
from dytrun.errors import UserError
from dytrun.records import METRICS, RunResult
from dytrun.run import load_config

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def sweep(tmp_path_factory):
    """LN and DyT, one after the other from one command line, offline in W&B, with EMA."""
    home = tmp_path_factory.mktemp("sweep")
    args = ["train", "-m", *TINY, "norm=ln,dyt", "ema=on", "epochs=2", "tracking.mode=auto", f"runs_dir={home}/runs"]
    env = {"OMP_NUM_THREADS": "1", "NETRC": str(home / "none")}
    return home / "runs", args, dytrun(*args, env=env), env


def test_a_sweep_trains_both_arms_and_prints_the_table(sweep):
    runs, _, done, _ = sweep
    assert done.returncode == 0, done.stderr
    assert "runs in" in done.stdout
    assert "2 run(s) asked for" in done.stdout
    assert "n = 1" in done.stdout
    assert len(list(runs.glob("*/result.json"))) == 2
    assert (runs / "report.html").is_file()


def test_a_run_leaves_what_the_design_says(sweep):
    run_dir = only(sweep[0], "*dyt*")
    result = RunResult.load(run_dir / "result.json")
    assert (result.status, result.norm, result.alpha_init, result.seed, result.epochs) == ("finished", "dyt", 0.5, 0, 2)
    assert (result.num_val, result.num_norm_sites, result.steps, result.ranks) == (360, 5, 88, 1)
    assert result.norm_impl == norm.described("dyt", "off", torch.device("cpu"))
    assert result.norm_impl in ("C++ op, eager", "sigmoid-form Function, eager")
    assert result.images_per_s > 0
    assert 0 < result.step_ms_p50 <= result.step_ms_p95
    assert 0 <= result.data_wait_frac <= 1
    assert 0 < result.peak_mem_gib < 20
    assert 0 < result.train_seconds < 100
    assert result.best_epoch in (1, 2)
    assert set(result.alpha) == {
        "blocks.0.norm1", "blocks.0.norm2", "blocks.1.norm1", "blocks.1.norm2", "fc_norm",
    }  # fmt: skip
    assert {"torch", "timm", "python", "dytrun"} <= set(result.versions)
    assert run_dir.name.endswith(result.science_id)
    correct = np.load(run_dir / "correct.npz")
    bits = np.unpackbits(correct["correct"], count=int(correct["num"]))
    assert 100 * bits.sum() / 360 == pytest.approx(result.top1)


def test_every_metric_is_written(sweep):
    names = set().union(*(line.keys() for line in lines(only(sweep[0], "*dyt*"))))
    assert set(METRICS) <= names
    assert "norm/alpha/fc_norm" in names


def test_both_arms_started_alike(sweep):
    ln, dyt = (lines(only(sweep[0], f"*{norm}*")) for norm in ("ln", "dyt"))
    assert [line["samples_seen"] for line in ln] == [line["samples_seen"] for line in dyt]
    results = [RunResult.load(only(sweep[0], f"*{norm}*") / "result.json") for norm in ("ln", "dyt")]
    assert results[0].pair_id == results[1].pair_id
    assert results[0].data_fingerprint == results[1].data_fingerprint
    assert results[1].num_params == results[0].num_params + 5


def test_typed_again_nothing_is_trained(sweep):
    runs, args, _, env = sweep
    before = {path: path.stat().st_mtime_ns for path in runs.glob("*/result.json")}
    begun = children_cpu_s()
    done = dytrun(*args, env=env)
    assert done.returncode == 0
    assert done.stdout.count("finished already") == 2
    assert "runs in" in done.stdout
    assert children_cpu_s() - begun < 20
    assert {path: path.stat().st_mtime_ns for path in runs.glob("*/result.json")} == before


def test_the_offline_run_can_be_read_with_wandbs_own_tool(sweep):
    run_dir = only(sweep[0], "*dyt*")
    (file,) = run_dir.glob("wandb/offline-run-*/*.wandb")
    wandb = Path(sys.executable).with_name("wandb")
    done = subprocess.run([wandb, "leet", "inspect", "--json", file], capture_output=True, text=True, check=True)
    history = [json.loads(line) for line in done.stdout.splitlines()]
    steps = [item for item in history if "val/top1" in json.dumps(item) and item.get("history")]
    assert len(steps) == 2
    summary = subprocess.run(
        [wandb, "leet", "inspect", "--summary", "--json", file], capture_output=True, text=True, check=True
    )
    found = json.loads(summary.stdout)
    assert "pair_id" in json.dumps(found["config"])
    assert "wandb sync" in sweep[2].stdout


def test_eval_counts_the_same(sweep):
    run_dir = only(sweep[0], "*dyt*")
    result = RunResult.load(run_dir / "result.json")
    for extra in ([], ["devices=2", "batch_per_rank=7", "workers=0"]):
        done = dytrun("eval", str(run_dir), *extra, env=sweep[3])
        assert done.returncode == 0, done.stderr
        found = json.loads((run_dir / "eval.json").read_text())
        assert found["raw"]["top1"] == result.top1
        assert found["raw"]["top5"] == result.top5
        assert found["ema"]["top1"] == result.ema_top1
        assert f"{result.top1:.3f}" in done.stdout


def test_a_run_of_an_older_version_can_be_looked_at(tmp_path):
    values = json.loads(tiny(f"runs_dir={tmp_path}").model_dump_json())
    del values["machine"]["loader"], values["tracking"]["probe_every_steps"]
    (tmp_path / "config.json").write_text(json.dumps(values))
    config = load_config(tmp_path)
    assert (config.machine.loader, config.machine.devices) == ("torch", values["machine"]["devices"])
    assert config.run_name == tiny().run_name
    del values["optim"]["lr"]  # of the science nothing is guessed
    (tmp_path / "config.json").write_text(json.dumps(values))
    with pytest.raises(UserError, match=r"optim\.lr: a value is needed"):
        load_config(tmp_path)


def test_one_and_two_ranks_see_the_same_images_and_losses(tmp_path):
    """With accumulation, a tail that fills no batch, and EMA; mixing partners and drop-path depend on the split."""
    overrides = [
        *TINY,
        "norm=dyt",
        "augment=light",
        "ema=on",
        "tracking.log_every_steps=1",
        "machine.max_batch_per_rank=8",
    ]
    losses, results = {}, {}
    for ranks in (1, 2):
        done = dytrun("train", *overrides, f"machine.devices={ranks}", f"runs_dir=runs{ranks}")
        assert done.returncode == 0, done.stderr
        results[ranks] = RunResult.load(only(tmp_path / f"runs{ranks}") / "result.json")
        assert results[ranks].ranks == ranks
        losses[ranks] = [line["train/loss"] for line in lines(only(tmp_path / f"runs{ranks}")) if "train/loss" in line]
    assert losses[1] == pytest.approx(losses[2], abs=1e-5)
    assert len(losses[1]) == 44
    assert results[1].val_loss == pytest.approx(results[2].val_loss, abs=1e-5)
    assert results[1].weights_sha256["start"] == results[2].weights_sha256["start"]
    assert results[1].weights_sha256["end"] != results[1].weights_sha256["start"]


def is_free(port: int) -> bool:
    with socket.socket() as probe:
        try:
            probe.bind(("127.0.0.1", port))
        except OSError:
            return False
        return True


def test_torchrun_on_two_nodes_joins_where_the_first_one_is(tmp_path):
    """Two agents as on two machines: each in a directory of its own, and only the first one's is written to."""
    args = ["train", *TINY, "norm=dyt", "epochs=2"]

    def launch() -> list[tuple[int, str, str]]:
        # Not one that the system may give to another process before torchrun has come to listen there.
        port = next(port for port in random.sample(range(20_000, 32_000), 1000) if is_free(port))
        agents = []
        for node in (0, 1):
            (tmp_path / f"node{node}").mkdir(exist_ok=True)
            command = ["torch.distributed.run", "--nnodes=2", f"--node-rank={node}", "--nproc-per-node=1",
                       "--master-addr=127.0.0.1", f"--master-port={port}", "-m", "dytrun", *args]  # fmt: skip
            agents.append(subprocess.Popen(
                [sys.executable, "-m", *command], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
                cwd=tmp_path / f"node{node}", env=os.environ | {"GLOO_SOCKET_IFNAME": "lo"},
            ))  # fmt: skip
        said = [agent.communicate(timeout=200) for agent in agents]
        return [(agent.returncode, *texts) for agent, texts in zip(agents, said, strict=True)]

    ended = launch()
    assert [code for code, *_ in ended] == [0, 0], ended
    path = only(tmp_path / "node0" / "runs") / "result.json"
    result = RunResult.load(path)
    assert result.ranks == 2
    assert [out.count("top-1 / top-5") for _, out, _ in ended] == [1, 0]
    # Its last checkpoint is there for the first node alone.
    path.unlink()
    ended = launch()
    assert [code for code, *_ in ended] == [0, 0], ended
    again = RunResult.load(path)
    assert (again.top1, again.weights_sha256) == (result.top1, result.weights_sha256)
    ended = launch()
    assert ["finished already" in out for _, out, _ in ended] == [True, False]
    assert [code for code, *_ in ended] == [0, 0], ended
    assert not list((tmp_path / "node1").iterdir())


@pytest.mark.parametrize("rank", [0, 1])
def test_a_killed_rank_is_named_and_takes_the_others_with_it(tmp_path, rank):
    args = ["train", *TINY, "norm=ln", "epochs=400", "machine.devices=2"]
    process = subprocess.Popen(
        [sys.executable, "-m", "dytrun", *args], start_new_session=True, stderr=subprocess.PIPE, text=True
    )
    victim = wait_for_title(f"dytrun: rank {rank} of 2, ", process.pid)
    wait_until(lambda: list(tmp_path.glob("runs/*/checkpoints/step-*")))
    # SLURM's proctrack/linuxproc cannot read a name with blanks, and would not end the process.
    assert Path(f"/proc/{victim}/comm").read_text() == "dytrun\n"
    begun = time.monotonic()
    os.kill(victim, signal.SIGKILL)
    _, err = process.communicate(timeout=200)
    assert time.monotonic() - begun < 60, "soon; a collective would wait for ten minutes"
    assert process.returncode == 1
    assert f"rank {rank} died: SIGKILL, process {victim}" in err
    assert "Traceback" not in err
    assert is_gone(process.pid)
    result = RunResult.load(only(tmp_path / "runs") / "result.json")
    assert result.status == "failed"
    assert result.message.startswith(f"rank {rank} died: SIGKILL")


def test_norms_with_statistics_are_arms_too(tmp_path):
    swept = dytrun("train", "-m", *TINY, "norm=rms,group", "++norm.affine=true", f"runs_dir={tmp_path}/runs",
                   "model.kwargs.embed_dim=64", env={"OMP_NUM_THREADS": "1"})  # fmt: skip
    assert swept.returncode == 0, swept.stderr
    results = {
        path.parent.name.split("-")[1]: json.loads(path.read_text()) for path in tmp_path.glob("runs/*/result.json")
    }
    assert {name: result["norm_impl"] for name, result in results.items()} == {
        "rms": "F.rms_norm, eager", "group": "F.group_norm, eager",
    }  # fmt: skip
    assert all(
        (result["alpha"], result["alpha_init"], result["num_norm_sites"]) == ({}, None, 5)
        for result in results.values()
    )
    assert results["group"]["num_params"] - results["rms"]["num_params"] == 5 * 64


def test_divergence_is_a_result(tmp_path):
    args = [*TINY, "norm=ln", "optim.lr=1e30", "optim.warmup_epochs=0", "optim.min_lr=0"]
    done = dytrun("train", *args)
    assert done.returncode == 1
    result = RunResult.load(only(tmp_path / "runs") / "result.json")
    assert result.status == "diverged"
    assert "not finite at step" in result.message
    assert result.top1 is None
    again = dytrun("train", *args)
    assert (again.returncode, "diverged already" in again.stdout) == (1, True)
    swept = dytrun("train", "-m", *args, "norm=ln,dyt")
    assert swept.returncode == 0
    assert "1 diverged" in swept.stdout


def test_an_image_that_cannot_be_read_ends_all_ranks_with_one_line(image_tree):
    root = image_tree(train={"a": 80, "b": 80}, val={"a": 4, "b": 4})
    # One of the evaluation, that rank 1 meets, while rank 0 has nothing to complain of.
    bad = root / "val" / "a" / "3.jpg"
    bad.write_bytes(b"\xff\xd8\xff\xe0 no picture")
    done = dytrun(
        "train",
        *TINY,
        "data=folder",
        f"data.root={root}",
        "data.image_size=16",
        "machine.devices=2",
        "machine.workers=0",
    )
    assert done.returncode == 2, done.stderr
    assert f"{bad}: cannot be read as an image" in done.stderr
    assert len(done.stderr.strip().splitlines()) == 1


def test_a_killed_run_goes_on_and_ends_as_if_it_had_not_been(tmp_path):
    args = ["train", *TINY, "norm=dyt", "ema=on", "epochs=20", "tracking.log_every_steps=11"]
    whole = dytrun(*args, "runs_dir=whole")
    assert whole.returncode == 0, whole.stderr
    process = subprocess.Popen(
        [sys.executable, "-m", "dytrun", *args], start_new_session=True, stdout=subprocess.DEVNULL
    )
    wait_until(lambda: any(path.name >= "step-00000132" for path in tmp_path.glob("runs/*/checkpoints/step-*[0-9]")))
    os.killpg(process.pid, signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL
    assert is_gone(process.pid)
    assert not list(tmp_path.glob("runs/*/result.json"))
    again = dytrun(*args)
    assert again.returncode == 0, again.stderr
    starts = (only(tmp_path / "runs") / "starts.jsonl").read_text().splitlines()
    assert [json.loads(start)["step"] >= 132 for start in starts] == [False, True]
    one, other = (only(tmp_path / name) for name in ("whole", "runs"))
    untimed = [
        [{name: value for name, value in line.items() if not name.startswith("perf/")} for line in lines(run_dir)]
        for run_dir in (one, other)
    ]
    assert untimed[0] == untimed[1]
    first, second = (RunResult.load(run_dir / "result.json") for run_dir in (one, other))
    assert (first.top1, first.ema_top1, first.val_loss, first.alpha) == (
        second.top1, second.ema_top1, second.val_loss, second.alpha,
    )  # fmt: skip


@pytest.mark.parametrize(("how", "code"), [("ctrl-c", 75), ("terminate", 75), ("kill", -signal.SIGKILL)])
def test_stopping_leaves_no_process_and_no_noise(tmp_path, how, code):
    args = ["train", *TINY, "norm=ln", "epochs=400", "machine.workers=1", "machine.devices=2"]
    process = subprocess.Popen(
        [sys.executable, "-m", "dytrun", *args], start_new_session=True, stderr=subprocess.PIPE, text=True
    )
    wait_until(lambda: list(tmp_path.glob("runs/*/checkpoints/step-*")))
    if how == "ctrl-c":
        os.killpg(process.pid, signal.SIGINT)
    else:
        os.kill(process.pid, signal.SIGTERM if how == "terminate" else signal.SIGKILL)
    _, err = process.communicate(timeout=200)
    assert process.returncode == code, err
    assert is_gone(process.pid)
    if code == 75:
        assert "type the command again" in err
        assert "Traceback" not in err
        assert RunResult.load(only(tmp_path / "runs") / "result.json").status == "interrupted"


def test_a_second_start_in_the_same_directory_is_refused(tmp_path):
    args = ["train", *TINY, "norm=ln", "epochs=400"]
    first = subprocess.Popen([sys.executable, "-m", "dytrun", *args], stdout=subprocess.DEVNULL)
    try:
        wait_until(lambda: list(tmp_path.glob("runs/*/metrics.jsonl")))
        second = dytrun(*args)
        assert second.returncode == 2
        assert f"process {first.pid} on" in second.stderr
        assert first.poll() is None
    finally:
        first.terminate()
        first.wait(60)


def test_wandbs_service_dying_ends_no_run(tmp_path):
    args = ["train", *TINY, "norm=ln", "epochs=60", "tracking.mode=offline", "tracking.log_every_steps=5"]
    process = subprocess.Popen(
        [sys.executable, "-m", "dytrun", *args], start_new_session=True, stdout=subprocess.PIPE, text=True
    )
    try:
        services: list[int] = []  # W&B may need longer to start than the first steps take
        while process.poll() is None:
            begun = any(path.stat().st_size for path in tmp_path.glob("runs/*/metrics.jsonl"))
            services = [pid for pid, said in processes() if "wandb-core" in said and process.pid in ancestors(pid)]
            if begun and services:
                break
            time.sleep(0.1)
        for pid in services:
            os.kill(pid, signal.SIGKILL)
        out, _ = process.communicate(timeout=400)
    finally:
        process.kill()
        process.wait()
    assert services, out
    assert process.returncode == 0, out
    run_dir = only(tmp_path / "runs")
    assert RunResult.load(run_dir / "result.json").status == "finished"
    assert "W&B is left out from here" in out
    assert len([line for line in lines(run_dir) if "val/top1" in line]) == 60


def test_compiled_blocks_train(tmp_path):
    done = dytrun("train", *TINY, "norm=dyt", "machine.compile=blocks", "tracking.log_every_steps=1")
    plain = dytrun("train", *TINY, "norm=dyt", "runs_dir=plain", "tracking.log_every_steps=1")
    assert done.returncode == plain.returncode == 0, done.stderr
    one, other = (only(tmp_path / name) for name in ("runs", "plain"))
    assert "compiled block by block" in RunResult.load(one / "result.json").norm_impl
    losses = [[line["train/loss"] for line in lines(run_dir) if "train/loss" in line] for run_dir in (one, other)]
    assert losses[0][:10] == pytest.approx(losses[1][:10], abs=1e-4)
    assert all(math.isfinite(loss) for loss in losses[0])
