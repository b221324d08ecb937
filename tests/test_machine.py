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
