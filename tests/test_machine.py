"""Where a run runs: devices, precision of products, compiled blocks."""

import pytest
import torch
from conftest import TINY, config_of, tiny

from dytrun import machine
from dytrun.arm import build_arm
from dytrun.errors import UserError
from dytrun.model import compile_model


def test_float32_products_are_tf32_as_in_the_paper():
    before = torch.get_float32_matmul_precision()
    try:
        machine.prepare_torch(tiny().machine, torch.device("cpu"))
        assert torch.get_float32_matmul_precision() == "high"
    finally:
        torch.set_float32_matmul_precision(before)


@pytest.mark.skipif(torch.cuda.is_available(), reason="about machines without a GPU")
def test_devices_of_a_machine_without_gpu():
    assert machine.resolve_devices("auto") == (None, 1)
    assert machine.resolve_devices(3) == (None, 3)
    with pytest.raises(UserError, match="names GPUs"):
        machine.resolve_devices([0])


@pytest.mark.parametrize(
    ("device", "cores", "ranks", "expected"),
    [("cuda", 16, 1, 15), ("cuda", 128, 8, 15), ("cuda", 256, 4, 32), ("cuda", 4, 4, 1), ("cuda", 2, 8, 1),
     ("cpu", 1, 1, 0), ("cpu", 2, 1, 1), ("cpu", 16, 1, 4), ("cpu", 8, 4, 1), ("cpu", 2, 2, 0)],
)  # fmt: skip
def test_loader_processes_share_the_cores_with_the_ranks(monkeypatch, device, cores, ranks, expected):
    monkeypatch.setattr(machine, "cores", lambda: cores)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", str(ranks))
    assert machine.worker_count("auto", torch.device(device)) == expected
    assert machine.worker_count(5, torch.device(device)) == 5


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor:UserWarning")  # torch._dynamo looks at .grad
@pytest.mark.slow
def test_every_block_is_compiled_whatever_its_drop_path():
    """Blocks with rates of their own are compiled apart; none may fall back to eager unsaid."""
    kwargs = "model.kwargs={patch_size: 4, embed_dim: 16, depth: 12, num_heads: 2, global_pool: avg}"
    model, _ = build_arm(config_of(*TINY, kwargs, "model.drop_path=0.1", "norm=ln"), 10)
    compile_model(model, "blocks")
    torch._dynamo.reset()
    counter = torch._dynamo.testing.CompileCounter()
    for block in model.blocks:
        block._compiled_call_impl = torch.compile(block._call_impl, backend=counter, dynamic=False)
    for training in (True, False):
        model.train(training)
        with torch._dynamo.config.patch(fail_on_recompile_limit_hit=True):
            model(torch.randn(2, 3, 8, 8)).sum().backward()
    assert counter.frame_count >= 24


def test_a_model_without_blocks_is_not_compiled_block_by_block():
    with pytest.raises(UserError, match=r"machine\.compile: this model has no blocks"):
        compile_model(torch.nn.Linear(2, 2), "blocks")


@pytest.mark.parametrize(
    ("gpus", "env", "setting", "found"),
    [
        (2, {}, "auto", ([0, 1], 2)),
        (4, {}, [1, 3], ([1, 3], 2)),
        # torchrun, or SLURM with --gpus-per-node: each rank sees all, and takes the one of its place
        (2, {"RANK": "3", "WORLD_SIZE": "4", "LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "2"}, "auto", ([0, 1], 4)),
        # SLURM with --gpus-per-task: each rank sees its own alone, as device 0
        (1, {"RANK": "3", "WORLD_SIZE": "4", "LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "2", "SLURM_LOCALID": "1"}, "auto",
         ([0], 4)),
    ],
)  # fmt: skip
def test_a_rank_finds_its_gpu(monkeypatch, gpus, env, setting, found):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: gpus)
    for name, value in env.items():
        monkeypatch.setenv(name, value)
    assert machine.resolve_devices(setting) == found


@pytest.mark.parametrize(
    ("gpus", "env", "setting", "said"),
    [
        (2, {}, 3, "machine.devices: 3 is more than the 2 GPU(s) here"),
        (2, {}, [0, 2], "machine.devices: [0, 2] is more than the 2 GPU(s) here"),
        (1, {"WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2"}, "auto", "2 ranks share 1 GPU(s)"),
        (4, {"WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2"}, 4, "4, but 2 rank(s) were started on this machine"),
        (0, {}, 10**6, "1000000 ranks are too many for the"),
    ],
)
def test_devices_that_are_not_there(monkeypatch, gpus, env, setting, said):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: gpus > 0)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: gpus)
    for name, value in env.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(UserError, match="devices") as raised:
        machine.resolve_devices(setting)
    assert said in str(raised.value)
