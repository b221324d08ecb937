"""Checkpoints: whole, verified, and never silently another one."""

import pytest
import torch

from dytrun.checkpoint import Store
from dytrun.errors import UserError


def saved(store: Store, *steps: int, best: int | None = None) -> None:
    for step in steps:
        tensors = {"model": {"weight": torch.full((100,), float(step))}, "optimizer": {"0.step": torch.tensor(step)}}
        store.save(step, tensors, {"note": f"step {step}"}, is_best=step == best)


def test_what_is_saved_comes_back(tmp_path):
    store = Store(tmp_path / "checkpoints", keep=2)
    assert store.load() == (None, [])
    saved(store, 3)
    found, said = store.load()
    assert said == []
    assert (found.step, found.state) == (3, {"note": "step 3"})
    assert found.tensors["model"]["weight"].tolist() == [3.0] * 100
    assert found.tensors["optimizer"]["0.step"].shape == ()


def test_the_newest_and_the_best_are_kept(tmp_path):
    store = Store(tmp_path, keep=2)
    saved(store, 1, 2, 3, 4, 5, best=2)
    assert sorted(path.name for path in tmp_path.glob("step-*")) == ["step-00000002", "step-00000004", "step-00000005"]
    assert store.look_up("BEST").step == 2
    assert store.look_up("LATEST").step == 5
    assert (tmp_path / "LATEST").read_text().strip() == "5"


@pytest.mark.parametrize("file", ["model.safetensors", "optimizer.safetensors", "state.json", "manifest.json"])
@pytest.mark.parametrize("harm", ["flip", "cut", "remove"])
def test_a_damaged_checkpoint_is_put_aside_and_the_one_before_it_taken(tmp_path, file, harm):
    store = Store(tmp_path, keep=2)
    saved(store, 1, 2)
    path = tmp_path / "step-00000002" / file
    raw = bytearray(path.read_bytes())
    if harm == "remove":
        path.unlink()
    elif harm == "cut":
        path.write_bytes(raw[:-1])
    else:
        raw[len(raw) // 2] ^= 1
        path.write_bytes(raw)
    found, said = store.load()
    assert found.step == 1
    assert said[0].startswith("checkpoint of step 2: ")
    assert said[0].endswith(f"it was put aside as {tmp_path / 'step-00000002.corrupt'}")
    assert said[1] == "going on from step 1, the newest checkpoint that is whole"
    assert (tmp_path / "step-00000002.corrupt").is_dir()


def test_nothing_whole_left_is_an_error_and_not_a_fresh_start(tmp_path):
    store = Store(tmp_path, keep=2)
    saved(store, 1)
    (tmp_path / "step-00000001" / "model.safetensors").write_bytes(b"")
    for _ in range(2):
        with pytest.raises(UserError, match="no checkpoint there is whole"):
            store.load()


def test_what_a_killed_save_left_is_ignored_and_written_over(tmp_path):
    store = Store(tmp_path, keep=2)
    saved(store, 1)
    (tmp_path / ".step-00000002.partial").mkdir()
    (tmp_path / ".step-00000002.partial" / "model.safetensors").write_bytes(b"half")
    assert store.load()[0].step == 1
    saved(store, 2)
    assert store.load()[0].step == 2
    assert not list(tmp_path.glob(".*.partial"))
