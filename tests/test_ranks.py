"""What ranks do with one another, on two real gloo ranks; and what is said where they cannot meet."""

import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import TINY, dytrun
from torch import nn

from dytrun import distributed, ranks
from dytrun.errors import UserError
from dytrun.records import RunResult

pytestmark = pytest.mark.slow


def together(_: str) -> list[str]:
    """Run on each rank; rank 0's answer is returned."""
    with distributed.session(None, 60) as place:
        said = [distributed.from_first(lambda: f"rank {place.rank}")]

        def refused() -> None:
            raise UserError("no")

        try:
            distributed.from_first(refused)
        except UserError as error:
            said.append(f"{len(error.problems)} problem(s)")
        tensors = {"a": torch.full((2, 3), 7.0), "b": torch.tensor(5), "c": torch.ones(0, dtype=torch.bfloat16)}
        got = distributed.broadcast_tensors(tensors if place.is_first else None, place.device)
        assert all(torch.equal(got[name], value) and got[name].dtype == value.dtype for name, value in tensors.items())
        model = nn.Linear(3, 2)
        nn.init.ones_(model.weight)
        nn.init.zeros_(model.bias)
        said.append(distributed.same_weights(model, "here"))
        with torch.no_grad():
            model.bias[1] = torch.nextafter(model.bias[1], torch.tensor(float(place.rank)))
        try:
            distributed.same_weights(model, "after step 3")
        except RuntimeError as error:
            said.append(str(error))
        problems: list[str] = [""] * 2
        torch.distributed.all_gather_object(problems, said[1])
        return [*said, *problems]


def left_alone(_: str) -> None:
    """Let rank 0 go, without a word, while rank 1 waits for it."""
    with distributed.session(None, 60) as place:
        if place.is_first:
            os._exit(9)
        distributed.barrier()


def test_two_ranks_agree(tmp_path):
    said = ranks.start_ranks(together, ("x",), 2)
    assert said[0] == "rank 0"
    assert said[4:] == ["1 problem(s)", "0 problem(s)"], "the first one says it, the others are silent"
    assert said[3] == "the weights of rank 1 are not those of rank 0 after step 3"
    model = nn.Linear(3, 2)
    nn.init.ones_(model.weight)
    nn.init.zeros_(model.bias)
    assert said[2] == distributed.same_weights(model, "in one process, the same digest")
    with pytest.raises(ranks.Failed, match=r"rank 0 died: exit code 9, process \d+; the other ranks were ended"):
        ranks.start_ranks(left_alone, ("x",), 2)


@pytest.mark.parametrize(
    ("env", "said"),
    [
        ({"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "BUSY"}, "is in use by another process; choose another port"),
        ({"WORLD_SIZE": "x"}, "RANK and WORLD_SIZE: 0 x 2 are no numbers"),
        ({}, "RANK is set, but the rest is not as torchrun sets it"),
    ],
)
def test_ranks_that_cannot_meet_say_why(tmp_path: Path, env, said):
    with socket.socket() as busy:
        busy.bind(("127.0.0.1", 0))
        busy.listen()
        port = str(busy.getsockname()[1])
        ranked = {"RANK": "0", "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2"} | env
        done = dytrun("train", *TINY, env={key: value.replace("BUSY", port) for key, value in ranked.items()})
    assert done.returncode == 2, done.stderr
    assert len(done.stderr.strip().splitlines()) == 1, done.stderr
    assert said in done.stderr
    assert not list(tmp_path.iterdir())


def test_two_runs_at_once_on_one_machine_do_not_meet(tmp_path: Path):
    """Each finds ports of its own, whatever another program has left in the environment."""
    with socket.socket() as busy:
        busy.bind(("127.0.0.1", 0))
        busy.listen()
        stale = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(busy.getsockname()[1])}
        command = [sys.executable, "-m", "dytrun", "train", *TINY, "machine.devices=2"]
        both = [
            subprocess.Popen([*command, f"seed={seed}"], env=os.environ | stale, stderr=subprocess.PIPE, text=True)
            for seed in (0, 1)
        ]
        errors = [process.communicate(timeout=200)[1] for process in both]
    assert [process.returncode for process in both] == [0, 0], errors
    results = [RunResult.load(path) for path in sorted(tmp_path.glob("runs/*/result.json"))]
    assert [(result.seed, result.status, result.ranks) for result in results] == [
        (0, "finished", 2),
        (1, "finished", 2),
    ]
