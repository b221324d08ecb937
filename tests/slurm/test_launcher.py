"""hydra/launcher=slurm on a real SLURM: a sweep as a job array, ranks on two nodes, what always fails, wrong fields."""

import os
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from conftest import TINY, dytrun
from hypothesis import given, settings
from hypothesis import strategies as st
from submitit.slurm.slurm import _make_sbatch_string
from test_security import CANARIES, leaks

from dytrun import slurm
from dytrun.errors import UserError
from dytrun.launcher_config import SlurmConfig, checked
from dytrun.records import RunResult

SLURM = ("hydra/launcher=slurm", "hydra.launcher.timeout_min=10")
DEFAULTS = {
    "name": "dytrun", "timeout_min": 720, "nodes": 1, "array_parallelism": 256, "signal_delay_s": 120,
    "max_num_timeout": 100, "max_restarts": 3, "stderr_to_stdout": False, "setup": [], "additional_parameters": {},
} | dict.fromkeys(
    ["partition", "account", "qos", "constraint", "exclude", "gres", "comment", "tasks_per_node", "gpus_per_node",
     "gpus_per_task", "cpus_per_task", "cpus_per_gpu", "mem_gb", "mem_per_gpu", "mem_per_cpu"]
)  # fmt: skip


def results(runs: Path) -> dict[str, RunResult]:
    return {path.parent.name: RunResult.load(path) for path in runs.glob("*/result.json")}


def start(cluster, *args: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-m", "dytrun", "train", "-m", *TINY, *SLURM, *args],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=os.environ | cluster.env,
    )  # fmt: skip


def wait_for_checkpoint(runs: Path, timeout_s: float = 200) -> None:
    until = time.monotonic() + timeout_s
    while not list(runs.glob("*/checkpoints/step-*")):
        assert time.monotonic() < until, "no checkpoint"
        time.sleep(0.1)


def test_an_array_of_three_and_two_nodes_with_two_ranks_end_as_here(cluster, tmp_path):
    """The same weights to the bit, from the same command line but for the launcher."""
    sweep = ["norm=dyt", "norm.alpha_init=0.3,0.5,1.0"]
    array = dytrun("train", "-m", *TINY, *SLURM, *sweep, "runs_dir=array", env=cluster.env)
    assert array.returncode == 0, array.stderr
    jobs = array.stdout.split("submitted ")[1].split(";")[0].split(", ")
    assert [job.split("_")[1] for job in jobs] == ["0", "1", "2"]
    assert len({job.split("_")[0] for job in jobs}) == 1, "one array"
    here = dytrun("train", "-m", *TINY, *sweep, "runs_dir=here")
    assert here.returncode == 0, here.stderr
    there = results(tmp_path / "array")
    assert len(there) == 3
    for name, local in results(tmp_path / "here").items():
        assert (there[name].weights_sha256, there[name].top1) == (local.weights_sha256, local.top1)

    spread = ["norm=dyt", "seed=1", "machine.max_batch_per_rank=4"]
    ranks = ["hydra.launcher.nodes=2", "hydra.launcher.tasks_per_node=2"]
    two_by_two = dytrun("train", "-m", *TINY, *SLURM, *ranks, *spread, "runs_dir=spread", env=cluster.env)
    assert two_by_two.returncode == 0, two_by_two.stderr
    assert "on n[1-2]" in two_by_two.stdout
    assert dytrun("train", *TINY, *spread, "machine.devices=4", "runs_dir=four").returncode == 0
    (remote,), (local,) = results(tmp_path / "spread").values(), results(tmp_path / "four").values()
    assert remote.ranks == local.ranks == 4
    assert (remote.weights_sha256, remote.val_loss) == (local.weights_sha256, local.val_loss)

    again = dytrun("train", "-m", *TINY, *SLURM, *sweep, "runs_dir=array", env=cluster.env)
    assert (again.returncode, again.stdout.count("finished already"), "submitted" in again.stdout) == (0, 3, False)
    assert not list((tmp_path / "array").glob(".sweeps/*/*"))


def test_a_job_that_always_crashes_ends_after_the_bound_and_hides_no_other(cluster, tmp_path):
    """Its file of metrics is a directory: an error that nobody foresees, in every start."""
    broken = "vit_tiny_patch16_224-ln-digits-s0"
    name = dytrun("train", *TINY, "norm=ln", "dry_run=true").stdout.split("runs/")[1].split()[0]
    assert name.startswith(broken)
    (tmp_path / "runs" / name / "metrics.jsonl").mkdir(parents=True)
    done = dytrun("train", "-m", *TINY, *SLURM, "norm=ln,dyt", "hydra.launcher.max_restarts=1", env=cluster.env)
    assert done.returncode == 1
    assert f"dytrun: {name}: [Errno 21] Is a directory" in done.stderr
    assert "1 of 2 runs failed" in done.stderr
    assert sorted(result.status for result in results(tmp_path / "runs").values()) == ["failed", "finished"]
    (script,) = (tmp_path / "runs").glob(".sweeps/*/jobs/*/*_submission.sh")
    assert "--kill-on-bad-exit=1" in script.read_text()
    (log,) = (tmp_path / "runs").glob(".sweeps/*/jobs/*_0/*_log.err")
    (out,) = (tmp_path / "runs").glob(".sweeps/*/jobs/*_0/*_log.out")
    assert out.read_text().count("starts left: 1") == 1
    assert log.read_text().count("IsADirectoryError: ") == 2


def test_wrong_input_of_one_rank_is_said_and_not_tried_again(cluster, image_tree, tmp_path):
    root = image_tree(train={"a": 80, "b": 80}, val={"a": 4, "b": 4})
    bad = root / "val" / "a" / "3.jpg"  # rank 1 meets it
    bad.write_bytes(b"\xff\xd8\xff\xe0 no picture")
    data = ["data=folder", f"data.root={root}", "data.image_size=16", "norm=ln"]
    done = dytrun("train", "-m", *TINY, *SLURM, *data, "hydra.launcher.nodes=2", env=cluster.env)
    assert done.returncode == 2, done.stderr
    assert f"{bad}: cannot be read as an image" in done.stderr
    assert len(done.stderr.splitlines()) == 1, done.stderr
    assert "pending" not in done.stdout.partition("running")[2], "started once"


def test_jobs_go_on_without_their_driver_and_are_found_again(cluster, tmp_path):
    run = ["norm=ln,dyt", "epochs=40", "hydra.launcher.array_parallelism=1"]
    driver = start(cluster, *run)
    wait_for_checkpoint(tmp_path / "runs")  # of the first one; the other has yet to begin
    driver.send_signal(signal.SIGTERM)
    out, err = driver.communicate(timeout=200)
    assert driver.returncode == 75
    assert out.count("goes on as SLURM job") == 2
    assert "Traceback" not in err
    again = start(cluster, *run)
    out, err = again.communicate(timeout=200)
    assert again.returncode == 0, err
    assert "what they print is in" not in out, "nothing was submitted anew"
    assert out.count("SLURM has it as job") == 2
    assert [result.status for result in results(tmp_path / "runs").values()] == ["finished", "finished"]


def test_what_sbatch_refuses_is_one_line(cluster, tmp_path):
    done = dytrun("train", "-m", *TINY, *SLURM, "hydra.launcher.partition=nope", env=cluster.env)
    assert done.returncode == 2
    assert len(done.stderr.splitlines()) == 1, done.stderr
    assert "Invalid partition name specified" in done.stderr
    assert not list(tmp_path.iterdir())


def test_no_key_of_the_environment_is_in_any_file_of_a_sweep(cluster, tmp_path):
    """Neither in the batch script nor in what submitit pickles; sbatch itself hands the environment on.

    One run is refused, so that all files of the sweep are kept.
    """
    runs = ["tracking.mode=offline", "norm=dyt", "global_batch=32,2000"]
    done = dytrun("train", "-m", *TINY, *SLURM, *runs, env=cluster.env | CANARIES)
    assert done.returncode == 2, done.stderr
    for pattern in ("*_submission.sh", "*/*_submitted.pkl", "*/*_result.pkl", "*/*_log.out"):
        assert list(tmp_path.glob(f"runs/.sweeps/*/jobs/{pattern}")) or list(
            tmp_path.glob(f"runs/.sweeps/*/jobs/*/{pattern}")
        ), pattern
    assert list(tmp_path.glob("runs/*/wandb/*/*.wandb"))
    assert not leaks(tmp_path)


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        ({"name": "a\ntouch x"}, "hydra.launcher.name: 'a\\ntouch x' holds characters"),
        ({"partition": "low;touch x"}, "hydra.launcher.partition: 'low;touch x' holds characters"),
        ({"comment": "$(touch x)"}, "hydra.launcher.comment"),
        ({"setup": ["true\ntouch x"]}, "hydra.launcher.setup"),
        ({"additional_parameters": {"mail type": "END"}}, "hydra.launcher.additional_parameters.mail type"),
        ({"additional_parameters": {"mail-type": "a\nb"}}, "hydra.launcher.additional_parameters.mail-type"),
        ({"additional_parameters": {"array": "0-9"}}, "array would be array, which is set by dytrun"),
        ({"additional_parameters": {"arr": "0-9"}}, "arr would be array"),
        ({"additional_parameters": {"time": 1}}, "time would be time"),
        ({"gres": "gpu:4"}, "hydra.launcher.gres: gpu:4 does not say how many ranks"),
        ({"nodes": 0}, "hydra.launcher.nodes: 0"),
        ({"timeout_min": 2}, "hydra.launcher.signal_delay_s: the warning 120 s before the end of a job of 2 min"),
        ({"gpus_per_node": 8, "tasks_per_node": 4}, "hydra.launcher.tasks_per_node: 4 ranks for 8 GPUs"),
        ({"gpus_per_task": 2}, "hydra.launcher.gpus_per_task: 2"),
    ],
)
def test_wrong_fields_are_refused(changed, said):
    with pytest.raises(UserError) as raised:
        checked(SlurmConfig, DEFAULTS | changed)
    assert len(raised.value.problems) == 1
    assert said in raised.value.problems[0]


def test_other_launchers_of_submitit_are_checked_too():
    for values in ({"name": "a\nb"}, {"additional_parameters": {"a\nb": 1}}, {"additional_parameters": {"a": "x;y"}}):
        with pytest.raises(UserError, match="holds characters that no field"):
            slurm.check("hydra_plugins.hydra_submitit_launcher.submitit_launcher.SlurmLauncher", values)


def test_a_rank_a_gpu():
    assert checked(SlurmConfig, DEFAULTS | {"gpus_per_node": 8}).ranks_per_node == 8
    assert checked(SlurmConfig, DEFAULTS | {"gpus_per_task": 1, "tasks_per_node": 4}).ranks_per_node == 4
    assert checked(SlurmConfig, DEFAULTS).ranks_per_node == 1


@settings(max_examples=300, deadline=None)
@given(st.text(st.characters(codec="utf-8"), max_size=30), st.sampled_from(["partition", "comment", "qos", "name"]))
def test_no_text_reaches_the_script_as_anything_else(text, field):
    """Either it is refused, or bash reads back the very text from the one line that it stands on."""
    try:
        chosen = getattr(checked(SlurmConfig, DEFAULTS | {field: text}), field)
    except UserError:
        return
    flag = "job_name" if field == "name" else field
    plain = _make_sbatch_string(command="true", folder="/tmp", **{flag: "x"})
    script = _make_sbatch_string(command="true", folder="/tmp", **{flag: chosen})
    assert len(script.splitlines()) == len(plain.splitlines())
    start = f"#SBATCH --{flag.replace('_', '-')}="
    (line,) = [line for line in script.splitlines() if line.startswith(start)]
    assert shlex.split(line.removeprefix(start)) == ([text] if text else [])
