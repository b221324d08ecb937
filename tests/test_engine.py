"""One optimizer step and many: accumulation, clipping, precision, EMA, divergence, resuming; one process."""

import copy
import dataclasses
import functools
import itertools
import os
import time
from contextlib import contextmanager

import pytest
import torch
import torch.nn.functional as F
from conftest import tiny

from dytrun import engine, optim, replay
from dytrun.agreement import LAG, Agreement
from dytrun.arm import build_arm
from dytrun.batch import BadImage
from dytrun.checkpoint import Store
from dytrun.data import RankShare, ValBatches, epoch_order, train_batches
from dytrun.distributed import Place
from dytrun.engine import Diverged, Interrupted, fit
from dytrun.errors import UserError
from dytrun.records import EvalRecord, TrainRecord
from dytrun.sources import load_data
from dytrun.state import Best, build_state, restore
from dytrun.surroundings import Surroundings
from dytrun.throughput import Clock

# tests/gpu.sh runs this file on a GPU too.
PLACE = Place(0, 1, torch.device(os.environ.get("DYTRUN_TEST_DEVICE", "cpu")))


class Bench:
    """A run without files around it: configuration, state and surroundings."""

    def __init__(self, directory, *overrides: str):
        self.config = tiny(*overrides)
        data = load_data(self.config.data)
        self.plan = optim.plan_steps(self.config, len(data.train.labels), 1)
        model, sites = build_arm(self.config, 10)
        self.state = build_state(model.to(PLACE.device), self.config, PLACE.device)
        self.store = Store(directory, self.config.checkpoint.keep)
        self.data = data
        self.sites = [site.name for site in sites]

    def around(self, train=None, stop_at: int | None = None) -> Surroundings:
        plan = self.plan
        share = RankShare(0, 1, plan.batch_per_rank, plan.accumulation, plan.steps_per_epoch, self.state.step,
                          plan.total_steps)  # fmt: skip
        val = ValBatches(self.config.data, self.data.val, 96, 0, (0, 1, PLACE.device))
        return Surroundings(
            plan=plan,
            place=PLACE,
            clock=Clock(PLACE.device, self.config.global_batch),
            train=train or train_batches(self.config, self.data, share, PLACE.device, 0),
            val=val,
            num_val=360,
            store=self.store,
            sites=self.sites,
            stopped_by=self.signal_in(stop_at),
            num_train=len(self.data.train.labels),
        )

    def signal_in(self, step: int | None):
        """Ask, from that step on, but not before the first one."""
        calls = itertools.count()
        return lambda: "SIGTERM" if next(calls) and step is not None and self.state.step >= step else ""

    def steps(self, count: int, around: Surroundings | None = None) -> list:
        """Do some steps, and return what is known of each."""
        under, found = engine.underway(self.config, self.state, around or self.around()), []
        for _ in range(count):
            optim.set_lr(self.state.optimizer, optim.lr_at(self.state.step, self.config.optim, self.plan))
            found += engine.train_step(under)
        return found + under.agreement.take(everything=True)

    def stop(self, at: int) -> None:
        """Train until a signal comes in the step after `at`, and save."""
        with pytest.raises(Interrupted, match=rf"SIGTERM after step {at}; its checkpoint is written"):
            list(fit(self.config, self.state, self.around(stop_at=at - 1)))

    def take_up(self) -> "Bench":
        """Put the newest checkpoint into this one, which is new."""
        restore(self.state, self.store.load()[0], PLACE)
        return self

    def records(self, steps: int | None = None):
        found = fit(self.config, self.state, self.around())
        return list(found if steps is None else itertools.islice(found, steps))


def weights(model) -> dict[str, torch.Tensor]:
    return {name: value.clone() for name, value in model.state_dict().items()}


def equal(one, other) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def test_records_come_at_windows_and_ends_of_epochs(tmp_path):
    bench = Bench(tmp_path, "norm=dyt", "epochs=2", "tracking.log_every_steps=20", "tracking.probe_every_steps=30")
    found = bench.records()
    kinds = [(type(record).__name__, record.step) for record in found]
    assert kinds == [
        ("TrainRecord", 20), ("ProbeRecord", 30), ("TrainRecord", 40), ("TrainRecord", 44), ("EvalRecord", 44),
        ("TrainRecord", 60), ("ProbeRecord", 60), ("TrainRecord", 80), ("TrainRecord", 88), ("ProbeRecord", 88),
        ("EvalRecord", 88),
    ]  # fmt: skip
    train = [record for record in found if isinstance(record, TrainRecord)]
    assert train[0].samples_seen == 640
    assert train[-1].epoch == 2.0
    assert train[-1].loss < train[0].loss
    assert train[-1].speed.images_per_s > 0
    assert isinstance(found[-1], EvalRecord)
    assert found[-1].raw.num == 360


@pytest.mark.parametrize("norm", ["ln", "dyt"])
def test_accumulated_gradients_equal_those_of_the_whole_batch(tmp_path, norm):
    """With float64 weights and gradients; only the loss itself is taken in float32, as always."""
    after = []
    for limit in ("null", "4"):
        bench = Bench(tmp_path, f"norm={norm}", f"machine.max_batch_per_rank={limit}", "augment.smoothing=0.1")
        bench.state.model.double()
        bench.state.optimizer = optim.build_optimizer(bench.state.model, bench.config.optim)
        around = bench.around()
        around.train.close()
        share = RankShare(0, 1, bench.plan.batch_per_rank, bench.plan.accumulation, 44, 0, 3)
        micros = (batch._replace(images=batch.images.double()) for batch in
                  train_batches(bench.config, bench.data, share, PLACE.device, 0))  # fmt: skip
        around = bench.around(micros)
        bench.steps(3, around)
        after.append(weights(bench.state.model))
    assert bench.plan.accumulation == 8
    for name, value in after[0].items():
        torch.testing.assert_close(value, after[1][name], rtol=1e-5, atol=1e-7)


def test_three_steps_equal_a_plain_loop(tmp_path):
    """The recipe in ten lines of eager torch, foreach AdamW, no augmentation: the same losses."""
    bench = Bench(tmp_path, "norm=dyt", "optim.weight_decay=0.05", "augment.smoothing=0.1")
    model = copy.deepcopy(bench.state.model)
    plain = torch.optim.AdamW(optim.param_groups(model, bench.config.optim), lr=1e-3, fused=False, foreach=False)
    expected = []
    batches = list(itertools.islice(bench.around().train, 3))
    for step, (images, labels, *_) in enumerate(batches):
        optim.set_lr(plain, optim.lr_at(step, bench.config.optim, bench.plan))
        loss = F.cross_entropy(model(images), labels, label_smoothing=0.1)
        plain.zero_grad()
        loss.backward()
        plain.step()
        expected.append(loss.item())
    bench = Bench(tmp_path, "norm=dyt", "augment.smoothing=0.1", "tracking.log_every_steps=1")
    found = [record.loss for record in bench.records(3)]
    assert found == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16"])
def test_clipping_clips_in_every_precision(tmp_path, precision):
    bench = Bench(tmp_path, "norm=ln", "optim.clip_grad=0.01", f"precision={precision}")
    (verdict,) = bench.steps(1)
    norm = torch.nn.utils.get_total_norm([p.grad for p in bench.state.model.parameters() if p.grad is not None])
    assert verdict.grad_norm > 0.1
    assert norm.item() == pytest.approx(0.01, rel=1e-3)


@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16"])
def test_every_precision_learns_and_keeps_float32_weights(tmp_path, precision):
    bench = Bench(tmp_path, "norm=dyt", f"precision={precision}", "epochs=3", "optim.lr=3e-3")
    found = [record for record in bench.records() if isinstance(record, TrainRecord)]
    assert found[-1].loss < found[0].loss - 0.1
    assert {p.dtype for p in bench.state.model.parameters()} == {torch.float32}


@pytest.mark.parametrize("poison", ["image", "gradient"])
def test_a_value_that_is_not_finite_never_reaches_the_weights(tmp_path, poison):
    bench = Bench(tmp_path, "norm=dyt", "tracking.log_every_steps=4")
    clean = list(itertools.islice(bench.around().train, 8))
    before: list[dict] = []

    def micros():
        for number, batch in enumerate(clean):
            if number == 5:
                before.append(weights(bench.state.model))
                if poison == "image":
                    batch.images[0, 0, 0, 0] = float("nan")
                else:
                    hook = bench.state.model.head.weight.register_hook(lambda grad: grad * float("inf"))
            if number == 6 and poison == "gradient":
                hook.remove()
            yield batch

    with pytest.raises(Diverged, match="not finite at step 5") as raised:
        list(fit(bench.config, bench.state, bench.around(micros())))
    assert raised.value.samples == [clean[5].indices.tolist()]
    # On CUDA two more steps had been begun, with good values; but a run that has failed once stays where it was.
    assert equal(weights(bench.state.model), before[0])


def test_fp16_skips_an_overflow_and_goes_on(tmp_path):
    bench = Bench(tmp_path, "norm=ln", "precision=fp16", "tracking.log_every_steps=4")
    bench.state.scaler = torch.amp.GradScaler(PLACE.device.type, init_scale=2.0**40)
    start = bench.state.scaler.get_scale()
    assert len(bench.records(3)) == 3
    assert bench.state.scaler.get_scale() < start


def test_ema_is_its_formula(tmp_path):
    bench = Bench(tmp_path, "norm=dyt", "ema=on", "ema.decay=0.9")
    expected, around = weights(bench.state.model), bench.around()
    for _ in range(3):
        bench.steps(1, around)
        for name, value in bench.state.model.state_dict().items():
            expected[name] = 0.9 * expected[name] + 0.1 * value
    for name, value in bench.state.ema.module.state_dict().items():
        torch.testing.assert_close(value, expected[name], rtol=1e-6, atol=1e-7)


RECIPE = ("ema=on", "epochs=3", "augment=light", "augment.mixup=0.8", "tracking.log_every_steps=10")
# A BatchNorm's statistics, and gradients in several parts.
CONV = ("model.name=lcnet_035", "model.kwargs={}", "data.image_size=32", "global_batch=256", "epochs=2", "ema=on",
        "machine.max_batch_per_rank=128")  # fmt: skip


@pytest.mark.parametrize(
    ("overrides", "stops"),
    [
        (("norm=dyt", "model.drop_path=0.1", *RECIPE), [44]),
        (("norm=dyt", "model.drop_path=0.1", *RECIPE), [1, 50, 63, 88, 131]),  # twice in one epoch; the last but one
        (("norm=ln", "precision=fp16", *RECIPE), [30, 132]),
        (("norm=ln", *CONV), [1, 2, 8]),
    ],
)
def test_stopped_at_any_step_a_run_ends_bit_equal_to_one_that_was_not(tmp_path, overrides, stops):
    whole = Bench(tmp_path / "whole", *overrides)
    records = whole.records()
    bench, found = Bench(tmp_path / "parts", *overrides), []
    for at in stops:
        around = bench.around(stop_at=at - 1)
        with pytest.raises(Interrupted, match=f"after step {at};"):
            found += collected(fit(bench.config, bench.state, around), into := [])
        found += into
        bench = Bench(tmp_path / "parts", *overrides).take_up()
        assert bench.state.step == at
    found += bench.records()
    assert state_of(bench) == state_of(whole)
    assert [without_speed(one) for one in found] == [without_speed(one) for one in records]


def collected(records, into: list) -> list:
    """Go through the records and keep each as it comes."""
    for record in records:
        into.append(record)
    return []


def without_speed(record) -> dict:
    metrics = {name: value for name, value in record.metrics().items() if not name.startswith("perf/")}
    return {"step": record.step, "samples_seen": record.samples_seen} | metrics


def state_of(bench: Bench) -> dict:
    """Everything that must be the same, bit for bit."""
    state = bench.state
    moments = state.optimizer.state_dict()["state"]
    tensors = {f"model.{name}": value for name, value in state.model.state_dict().items()}
    tensors |= {f"{index}.{name}": value for index, one in moments.items() for name, value in one.items()}
    tensors |= {} if state.ema is None else {f"ema.{name}": v for name, v in state.ema.module.state_dict().items()}
    plain = state.step, state.is_evaluated, state.best, state.window, state.losses, state.spikes, state.weights_sha256
    return {name: value.cpu().numpy().tobytes() for name, value in tensors.items()} | {
        "plain": plain, "scale": state.scaler.state_dict(),
    }  # fmt: skip


def test_a_stop_before_the_first_step_saves_nothing(tmp_path):
    bench = Bench(tmp_path)
    with pytest.raises(Interrupted, match="SIGTERM after step 0; it had not begun"):
        list(fit(bench.config, bench.state, dataclasses.replace(bench.around(), stopped_by=lambda: "SIGTERM")))
    assert bench.store.load() == (None, [])


def test_a_stop_within_an_evaluation_leaves_it_to_the_next_start(tmp_path):
    whole = Bench(tmp_path / "whole", "norm=dyt", "epochs=2")
    records = whole.records()
    bench, signals = Bench(tmp_path / "parts", "norm=dyt", "epochs=2"), iter([""] * 45 + ["SIGTERM"] * 99)
    around = dataclasses.replace(bench.around(), stopped_by=lambda: next(signals))
    with pytest.raises(Interrupted, match="SIGTERM after step 44; its checkpoint is written"):
        collected(fit(bench.config, bench.state, around), found := [])
    assert not any(isinstance(record, EvalRecord) for record in found)
    again = Bench(tmp_path / "parts", "norm=dyt", "epochs=2").take_up()
    assert (again.state.step, again.state.is_evaluated) == (44, False)
    found += again.records()
    assert [without_speed(one) for one in found] == [without_speed(one) for one in records]
    assert state_of(again) == state_of(whole)


def test_an_image_of_the_evaluation_that_cannot_be_read_loses_no_training(tmp_path):
    bench = Bench(tmp_path, "norm=dyt")

    def broken():
        raise UserError("val/a/3.jpg: cannot be read")
        yield

    with pytest.raises(UserError, match=r"3\.jpg"):
        list(fit(bench.config, bench.state, dataclasses.replace(bench.around(), val=broken)))
    again = Bench(tmp_path, "norm=dyt").take_up()
    assert again.state.step == 44
    assert again.records()[-1].raw.num == 360


def test_minutes_too_make_a_checkpoint(tmp_path):
    bench = Bench(tmp_path, "checkpoint.every_minutes=1e-9", "checkpoint.keep=50")
    found = bench.records()
    assert sorted(bench.store._steps()) == list(range(1, 45))
    assert found[-1].raw.top1 == Bench(tmp_path / "other", "checkpoint.every_minutes=null").records()[-1].raw.top1


def test_the_best_epoch_is_remembered_across_a_stop(tmp_path):
    bench = Bench(tmp_path, "norm=dyt")
    bench.state.best = Best(99.5, 7, 308)
    bench.stop(5)
    again = Bench(tmp_path, "norm=dyt").take_up()
    assert again.state.best == Best(99.5, 7, 308)


def test_a_checkpoint_of_the_other_arm_is_refused(tmp_path):
    Bench(tmp_path, "norm=ln").stop(5)
    other = Bench(tmp_path, "norm=dyt")
    with pytest.raises(UserError, match=r"checkpoint of step 5: it does not fit.*Missing key.*alpha"):
        other.take_up()


def test_a_spike_is_counted_and_ends_the_run_where_that_is_asked_for(tmp_path):
    def loud(bench):
        factor = lambda: 1e3 if bench.state.model.training and bench.state.step == 40 else 1  # noqa: E731
        bench.state.model.head.register_forward_hook(lambda module, args, out: out * factor())
        return bench

    bench = loud(Bench(tmp_path / "noted", "norm=ln", "optim.lr=1e-4"))
    bench.records()
    assert bench.state.spikes == [40]
    bench = loud(Bench(tmp_path / "ended", "norm=ln", "optim.lr=1e-4", "optim.stop_at_spike=true"))
    with pytest.raises(Diverged, match="the loss is a spike at step 40"):
        bench.records()
    assert bench.state.step == 40


def test_a_resume_keeps_the_memory_layout_of_the_moments(tmp_path):
    """A fused optimizer pairs elements by memory: a contiguous moment of a channels-last weight would be scrambled."""
    overrides = (
        "model.name=convnext_atto", "model.kwargs={depths: [1,1,1,1], dims: [8,8,8,8]}", "data.image_size=32",
        "global_batch=256",
    )  # fmt: skip
    bench = Bench(tmp_path, *overrides)
    bench.state.model.to(memory_format=torch.channels_last)
    bench.stop(2)
    again = Bench(tmp_path, *overrides)
    again.state.model.to(memory_format=torch.channels_last)
    again.take_up()
    moments = again.state.optimizer.state
    assert all(m["exp_avg"].stride() == p.stride() for p, m in moments.items())
    step = list(itertools.islice(bench.around().train, bench.plan.accumulation))
    for one in (bench, again):
        one.steps(1, one.around(iter(step)))
    assert equal(weights(again.state.model), weights(bench.state.model))


def test_the_optimizer_gets_its_settings():
    config = tiny("optim.betas=[0.8,0.9]", "optim.eps=1e-6", "optim.weight_decay=0.2")
    optimizer = build_state(build_arm(config, 10)[0], config, torch.device("cpu")).optimizer
    assert optimizer.defaults["betas"] == (0.8, 0.9)
    assert optimizer.defaults["eps"] == 1e-6
    assert [group["weight_decay"] for group in optimizer.param_groups] == [0.2, 0.0]


def test_soft_targets_are_not_smoothed_again(tmp_path):
    bench = Bench(tmp_path, "augment.mixup=0.8", "augment.smoothing=0.1", "tracking.log_every_steps=1")
    (batch,) = itertools.islice(bench.around().train, 1)
    assert batch.targets.shape == (32, 10)
    log_p = F.log_softmax(bench.state.model(batch.images), dim=1)
    expected = -(batch.targets * log_p).sum(1).mean().item()
    assert bench.records(1)[0].loss == pytest.approx(expected, rel=1e-5)


def test_fp16_too_stops_at_a_loss_that_is_not_finite(tmp_path):
    bench = Bench(tmp_path, "precision=fp16", "tracking.log_every_steps=2")
    batches = list(itertools.islice(bench.around().train, 2))
    batches[0].images[:] = float("nan")
    with pytest.raises(Diverged, match="not finite at step 0"):
        list(fit(bench.config, bench.state, bench.around(iter(batches))))


SLOW_S = 2.0


@contextmanager
def slow(pause):
    with pause():
        yield
        time.sleep(SLOW_S)


def test_evaluation_runs_in_the_runs_precision_and_is_no_training_time(tmp_path):
    bench = Bench(tmp_path, "precision=bf16", "norm=ln")
    seen = []
    bench.state.model.head.register_forward_hook(lambda module, args, out: seen.append((module.training, out.dtype)))
    around = bench.around()
    engine.evaluate_state(bench.config, bench.state, around)
    assert set(seen) == {(False, torch.bfloat16)}
    around.clock.pause = functools.partial(slow, around.clock.pause)
    begun = time.perf_counter()
    list(fit(bench.config, bench.state, around))
    elapsed = time.perf_counter() - begun
    assert sum(around.clock._steps_ms) / 1e3 < around.clock.train_seconds < elapsed - SLOW_S


def test_evaluation_of_a_model_with_drop_path_draws_nothing(tmp_path):
    bench = Bench(tmp_path, "model.drop_path=0.5")
    assert [block.drop_path1.drop_prob for block in bench.state.model.blocks[1:]] == [0.5]
    bench.state.model.train()
    one, other = (engine.evaluate_state(bench.config, bench.state, bench.around()).raw.loss for _ in range(2))
    assert one == other


def test_a_step_done_again_is_the_step(tmp_path):
    """A spike, whose numbers are finite, in four micro-batches with drop-path and mixing: the same loss and norm."""
    overrides = ("norm=dyt", "model.drop_path=0.5", "machine.max_batch_per_rank=8", "augment.mixup=0.8")
    bench = Bench(tmp_path, *overrides)
    around = dataclasses.replace(bench.around(), facts={"data": bench.data.facts})
    (*_, verdict) = bench.steps(4, around)
    again = Bench(tmp_path, *overrides)
    again.steps(3)
    said = Diverged("", 3, [], {"loss": verdict.loss, "grad_norm": verdict.grad_norm})
    order = epoch_order(1437, seed=0, epoch=0)[3 * 32 : 4 * 32]
    said.samples = [order[i : i + 8].tolist() for i in range(0, 32, 8)]
    assert "dytrun replay" in replay.keep(tmp_path, again.state.model, around, said)
    model = Bench(tmp_path / "other", *overrides, "seed=1").state.model
    found = replay.again(bench.config, tmp_path, bench.data, (model, bench.plan), PLACE)
    assert (found["step"], found["is_reproduced"]) == (3, True)
    assert found["loss"] == pytest.approx(verdict.loss, rel=1e-6)
    assert found["grad_norm"] == pytest.approx(verdict.grad_norm, rel=1e-5)
    assert found["ranks"][0]["images_not_finite"] == []
    assert found["ranks"][0]["first_module"] is None


def test_on_a_device_that_is_behind_nothing_is_lost_of_the_last_steps(tmp_path, monkeypatch):
    """The host reads a step's numbers two steps later on CUDA; so here too."""
    monkeypatch.setattr(engine, "Agreement", lambda device, lag, losses: Agreement(device, LAG, losses))
    bench = Bench(tmp_path, "norm=ln")

    def micros():
        for number, batch in enumerate(Bench(tmp_path / "x", "norm=ln").around().train):
            bad = {7: BadImage("a.jpg", "empty", "b.jpg")} if number == 3 else {}
            yield batch._replace(bad=bad)

    with pytest.raises(Interrupted, match="after step 5"):
        list(fit(bench.config, bench.state, bench.around(micros(), stop_at=2)))
    again = Bench(tmp_path, "norm=ln").take_up()
    assert (again.state.substituted, list(again.state.bad_images)) == (1, [7])
    assert again.state.window.steps == 5


def test_seeds_give_other_weights():
    one, other = (build_arm(tiny(f"seed={seed}"), 10)[0].state_dict() for seed in (0, 1))
    assert not torch.equal(one["head.weight"], other["head.weight"])
