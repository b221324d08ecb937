"""The clock: what counts as training time."""

import time

import pytest
import torch

from dytrun.throughput import WARMUP_STEPS, Clock


def test_pauses_and_warm_up_are_not_in_the_figures():
    clock = Clock(torch.device("cpu"), images_per_step=10)
    for _ in range(WARMUP_STEPS):
        time.sleep(0.05)
        clock.step_done()
    assert clock.window()["images_per_s"] != clock.window()["images_per_s"]  # nan while warming up
    for _ in range(4):
        with clock.data_wait():
            time.sleep(0.01)
        time.sleep(0.01)
        clock.step_done()
        with clock.pause():
            time.sleep(0.05)
    found = clock.total()
    assert found["step_ms_p50"] == pytest.approx(20, rel=0.5)
    assert found["images_per_s"] == pytest.approx(500, rel=0.5)
    assert 0.3 < found["data_wait_frac"] < 0.7
    assert found["peak_mem_gib"] > 0.01
    assert clock.train_seconds == pytest.approx(0.05 * WARMUP_STEPS + 4 * 0.02, rel=0.5)


def test_a_window_is_what_came_since_the_last():
    clock = Clock(torch.device("cpu"), images_per_step=1)
    for _ in range(WARMUP_STEPS):
        clock.step_done()
    time.sleep(0.03)
    clock.step_done()
    assert clock.window()["step_ms_p50"] > 25
    clock.step_done()
    assert clock.window()["step_ms_p50"] < 25
