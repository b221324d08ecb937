"""The clock: what counts as training time."""

from types import SimpleNamespace

import pytest
import torch

from dytrun import throughput
from dytrun.throughput import WARMUP_STEPS, Clock


class Time:
    """Seconds that pass only when they are told to."""

    def __init__(self) -> None:
        self.now = 1000.0

    def perf_counter(self) -> float:
        return self.now

    def sleep(self, seconds: float) -> None:
        self.now += seconds


@pytest.fixture
def time(monkeypatch) -> Time:
    found = Time()
    monkeypatch.setattr(throughput, "time", SimpleNamespace(perf_counter=found.perf_counter))
    return found


def test_pauses_and_warm_up_are_not_in_the_figures(time):
    clock = Clock(torch.device("cpu"), images_per_step=10)
    for _ in range(WARMUP_STEPS):
        time.sleep(0.05)
        clock.step_done()
    assert clock.window()["images_per_s"] != clock.window()["images_per_s"]  # nan while warming up
    for _ in range(4):
        with clock.data_wait():
            time.sleep(0.005)
        time.sleep(0.015)
        clock.step_done()
        with clock.pause():
            time.sleep(0.05)
    found = clock.total()
    assert found["step_ms_p50"] == pytest.approx(20)
    assert found["images_per_s"] == pytest.approx(500)
    assert found["data_wait_frac"] == pytest.approx(0.25)
    assert found["peak_mem_gib"] > 0.01
    assert clock.train_seconds == pytest.approx(0.05 * WARMUP_STEPS + 4 * 0.02)


def test_a_window_is_what_came_since_the_last(time):
    clock = Clock(torch.device("cpu"), images_per_step=1)
    for _ in range(WARMUP_STEPS):
        clock.step_done()
    time.sleep(0.03)
    clock.step_done()
    assert clock.window()["step_ms_p50"] == pytest.approx(30)
    time.sleep(0.01)
    clock.step_done()
    assert clock.window()["step_ms_p50"] == pytest.approx(10)


def test_without_being_told_it_is_the_systems_clock():
    clock = Clock(torch.device("cpu"), images_per_step=1)
    for _ in range(WARMUP_STEPS + 1):
        clock.step_done()
    assert clock.total()["step_ms_p50"] > 0
