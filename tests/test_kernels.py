"""The CUDA kernels: their values where there is no GPU, what Triton makes of them, and who they are for."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from dytrun.norm import FUNCTIONS

CASES = Path(__file__).with_name("kernel_cases.py")


@pytest.mark.slow
def test_the_kernels_against_the_formula_in_float64(tmp_path):
    """In a process of its own: Triton's interpreter takes the place of its compiler when Triton is imported."""
    options = ["-q", "-x", "-p", "no:cacheprovider", "--basetemp", str(tmp_path / "cases")]
    interpreted = {} if torch.cuda.is_available() else {"TRITON_INTERPRET": "1"}
    done = subprocess.run(
        [sys.executable, "-m", "pytest", *options, str(CASES)],
        capture_output=True,
        text=True,
        timeout=550,
        env=os.environ | interpreted,
        check=False,
    )
    assert done.returncode == 0, done.stdout[-4000:]


@pytest.mark.parametrize("function", ["dyt", "derf", "satursin"])
@pytest.mark.parametrize(("shape", "axis"), [((256 * 197, 768), -1), ((128, 96, 56, 56), 1)])
def test_the_machine_code_of_both_passes(function, shape, axis, tmp_path, monkeypatch):
    """Nothing spills, activations move 16 bytes at a time, and two programs of the backward pass fit a processor."""
    from sass import count, launches

    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    forward, backward = (count(*launch) for launch in launches(shape, axis, function, torch.bfloat16))
    assert (forward.kernel, backward.kernel) == ("forward", "backward")
    assert (forward.spilled, backward.spilled) == (0, 0)
    assert (forward.loads, forward.stores) == (4, 4)
    assert (backward.loads, backward.stores) == (2, 1)
    assert 2 * 256 * backward.registers <= 65536
    # The issue slots of an H200 for an element, while its bytes are on their way.
    assert forward.per_element <= 31
    assert backward.per_element <= 47


def test_the_kernels_know_only_functions_of_the_family():
    from dytrun.kernels import FUSED, fits

    assert {"dyt", "derf"} <= FUSED < set(FUNCTIONS)
    x = torch.ones(2, 3)
    assert not fits(x, "dyt"), "not on the CPU"
    if torch.cuda.is_available():
        assert all(fits(x.cuda(), function) == (function in FUSED) for function in FUNCTIONS)
        assert not fits(x.double().cuda(), "dyt")
