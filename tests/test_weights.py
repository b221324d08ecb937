"""Weights from files: what is copied, what is new, and what is refused; real files of every kind."""

import argparse
import io
import json
import os
import pickle
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import TINY, config_of, dytrun, tiny
from safetensors.torch import save_file

from dytrun.arm import build_arm
from dytrun.errors import UserError
from dytrun.plan import outline
from dytrun.weights import brings_alphas, load_weights, read_weights


def drawn(*overrides: str, classes: int = 10):
    """A model of the tiny run, with weights that no other seed has."""
    model, sites = build_arm(tiny("seed=7", *overrides), classes)
    return model, [site.name for site in sites]


def saved(tmp_path: Path, *overrides: str, classes: int = 10) -> tuple[Path, dict[str, torch.Tensor]]:
    model, _ = drawn(*overrides, classes=classes)
    path = tmp_path / "weights.safetensors"
    save_file(model.state_dict(), path)
    return path, model.state_dict()


def test_the_same_arm_takes_every_tensor(tmp_path):
    for norm in ("ln", "dyt", "derf"):
        path, state = saved(tmp_path, f"norm={norm}")
        model, _ = build_arm(tiny(f"norm={norm}"), 10)
        loaded = load_weights(model, read_weights(path), path)
        assert (loaded.copied, loaded.new, loaded.unused) == (len(state), [], [])
        assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())


def test_a_layernorm_file_into_dyt_copies_what_matches_and_names_the_alphas(tmp_path):
    path, state = saved(tmp_path)
    state["blocks.0.norm1.weight"].fill_(3.0)
    save_file(state, path)
    model, sites = build_arm(tiny("norm=dyt", "norm.alpha_init=0.7"), 10)
    loaded = load_weights(model, read_weights(path), path)
    assert loaded.new == [f"{site.name}.alpha" for site in sites]
    assert loaded.copied == len(state)
    assert all(torch.equal(model.state_dict()[name], value) for name, value in state.items())
    assert model.blocks[0].norm1.weight.unique().item() == 3.0
    assert {round(model.get_parameter(name).item(), 6) for name in loaded.new} == {0.7}


def test_a_layernorm_file_into_rms_names_the_biases_that_it_has_no_use_for(tmp_path):
    path, state = saved(tmp_path)
    model, sites = build_arm(tiny("norm=rms"), 10)
    loaded = load_weights(model, read_weights(path), path)
    assert sorted(loaded.unused) == sorted(f"{site.name}.bias" for site in sites)
    assert (loaded.new, loaded.copied) == ([], len(state) - 5)


def test_another_number_of_classes_leaves_the_classifier_as_drawn_and_says_so(tmp_path):
    path, _ = saved(tmp_path, classes=4)
    model, _ = build_arm(tiny(), 10)
    before = model.head.weight.detach().clone()
    loaded = load_weights(model, read_weights(path), path)
    assert loaded.new == ["head.weight", "head.bias"]
    assert torch.equal(model.head.weight, before)


@pytest.mark.parametrize("wrap", ["plain", "reference", "timm", "ddp", "compiled", "both"])
def test_pickles_of_weights_in_every_usual_wrapping(tmp_path, wrap):
    """The reference's checkpoints hold `model`, `args` (an argparse.Namespace) and more beside it."""
    model, _ = drawn("norm=dyt")
    state = model.state_dict()
    values = {
        "plain": state,
        "reference": {
            "model": state,
            "model_ema": {},
            "epoch": 3,
            "args": argparse.Namespace(lr=4e-3),
            "scaler": {},
            "optimizer": {"param_groups": [{"lr": np.float64(4e-3), "weight_decay": np.float32(0.05)}]},
        },
        "timm": {"state_dict": state, "arch": "vit", "metric": 1.0},
        "ddp": {f"module.{name}": value for name, value in state.items()},
        "compiled": {f"_orig_mod.{name}": value for name, value in state.items()},
        "both": {f"_orig_mod.module.{name}": value for name, value in state.items()},
    }[wrap]
    torch.save(values, tmp_path / "file.pth")
    other, _ = build_arm(tiny("norm=dyt"), 10)
    loaded = load_weights(other, read_weights(tmp_path / "file.pth"), tmp_path / "file.pth")
    assert loaded.copied == len(state)
    assert all(torch.equal(value, state[name]) for name, value in other.state_dict().items())


def test_a_part_of_a_pickle_can_be_named(tmp_path):
    model, _ = drawn("norm=dyt")
    state = model.state_dict()
    average = {name: value + 1 for name, value in state.items()}
    torch.save({"model": state, "model_ema": average}, tmp_path / "file.pth")
    assert torch.equal(read_weights(tmp_path / "file.pth")["head.bias"], state["head.bias"])
    assert torch.equal(read_weights(tmp_path / "file.pth", "model_ema")["head.bias"], state["head.bias"] + 1)
    with pytest.raises(UserError, match=r"init_part: .* has no part 'ema'; it has model, model_ema"):
        read_weights(tmp_path / "file.pth", "ema")
    one, other = (tiny(f"init_from={tmp_path}/file.pth", f"init_part={part}") for part in ("null", "model_ema"))
    assert one.science_id != other.science_id


class _Bomb:
    def __reduce__(self):
        return os.system, ("touch exploded",)


def test_a_pickle_with_code_is_refused_and_not_run(tmp_path):
    torch.save({"model": drawn()[0].state_dict(), "more": _Bomb()}, tmp_path / "bomb.pth")
    with pytest.raises(UserError, match=r"bomb.pth holds more than weights \((posix|os).system, which is code\)"):
        read_weights(tmp_path / "bomb.pth")
    assert not Path("exploded").exists()


def files(tmp_path: Path) -> dict[str, Path]:
    """Files that are none, or of something else."""
    good, _ = saved(tmp_path)
    (tmp_path / "cut.safetensors").write_bytes(good.read_bytes()[:-100])
    (tmp_path / "text.safetensors").write_text("no weights")
    (tmp_path / "text.pth").write_text("no weights")
    (tmp_path / "empty.pth").write_bytes(b"")
    (tmp_path / "plain.pth").write_bytes(pickle.dumps({"lr": 0.1}))
    torch.save({"epoch": 3}, tmp_path / "nothing.pth")
    whole = io.BytesIO()
    torch.save(drawn()[0].state_dict(), whole)
    (tmp_path / "cut.pth").write_bytes(whole.getvalue()[:3000])
    return {path.name: path for path in tmp_path.glob("*.*")} | {"missing.pth": tmp_path / "missing.pth"}


BROKEN = ("cut.safetensors", "text.safetensors", "text.pth", "empty.pth", "plain.pth", "nothing.pth", "cut.pth",
          "missing.pth")  # fmt: skip


@pytest.mark.parametrize("name", BROKEN)
def test_a_file_that_holds_no_weights_is_one_line(tmp_path, name):
    with pytest.raises(UserError, match=rf"init_from: .*{name} .*") as caught:
        read_weights(files(tmp_path)[name])
    assert len(str(caught.value).splitlines()) == 1


@pytest.mark.parametrize(
    ("file", "model", "said"),
    [
        (("norm=dyt",), ("norm=ln",), "it has 5 that the model has not, .* say norm=dyt"),
        (("norm=derf",), ("norm=dyt",), "it has 5 that the model has not, first blocks.0.norm1.shift"),
        (
            ("norm=dyt", "norm.per_channel_alpha=true"),
            ("norm=dyt",),
            r"alpha is \(16,\) float32 there and \(1,\) float32 here",
        ),
        (("model.kwargs.depth=3",), (), "is of another model: it has 12 that the model has not"),
        (("model.kwargs.depth=1",), (), "it lacks 12 of 32 tensors, first blocks.1"),
        (
            ("model.kwargs.embed_dim=32",),
            (),
            r"another model: .* is \(.*32.*\) float32 there and \(.*16.*\) float32",
        ),
        (("model.kwargs.global_pool=token",), (), "it lacks 2 .* first fc_norm.weight; it has 2 .* first norm"),
    ],
)
def test_weights_of_another_model_are_refused_and_nothing_is_copied(tmp_path, file, model, said):
    path, _ = saved(tmp_path, *file)
    target, _ = build_arm(tiny(*model), 10)
    before = {name: value.clone() for name, value in target.state_dict().items()}
    with pytest.raises(UserError, match=said):
        load_weights(target, read_weights(path), path)
    assert all(torch.equal(value, before[name]) for name, value in target.state_dict().items())


def test_a_directory_is_answered_with_the_file_to_give(tmp_path):
    file = tmp_path / "run" / "checkpoints" / "step-00000044" / "model.safetensors"
    file.parent.mkdir(parents=True)
    file.touch()
    with pytest.raises(UserError, match=f"is a directory; give a file, such as {file}"):
        tiny(f"init_from={tmp_path}/run").science()


def test_a_file_that_its_manifest_disowns_is_damaged(tmp_path):
    path, _ = saved(tmp_path)
    (tmp_path / "manifest.json").write_text(json.dumps({path.name: {"sha256": "0" * 64, "bytes": 1}}))
    with pytest.raises(UserError, match="is damaged"):
        read_weights(path)


@pytest.mark.parametrize("manifest", [{}, {"w.safetensors": "v1"}, {"w.safetensors": {"size": 3}}, ["w.safetensors"]])
def test_a_manifest_of_someone_else_says_nothing(tmp_path, manifest):
    path, _ = saved(tmp_path)
    path = path.rename(tmp_path / "w.safetensors")
    (tmp_path / "manifest.json").write_text(json.dumps(manifest))
    assert read_weights(path)


def test_values_that_are_no_weights_are_refused(tmp_path):
    path, state = saved(tmp_path)
    state["head.bias"][0] = float("nan")
    save_file(state, path)
    with pytest.raises(UserError, match=r"values that are not finite, first in head\.bias"):
        read_weights(path)
    save_file({name: (100 * value.nan_to_num()).int() for name, value in state.items()}, path)
    with pytest.raises(UserError, match=r"int32 there and .* float32 here"):
        load_weights(build_arm(tiny(), 10)[0], read_weights(path), path)


def test_safetensors_are_known_by_their_content(tmp_path):
    path, _ = saved(tmp_path)
    assert read_weights(path.rename(tmp_path / "wrong.pth"))


def test_weights_of_a_run_with_another_function_are_refused(tmp_path):
    """All functions have the same names, so only the run's own configuration tells them apart."""
    folder = tmp_path / "run" / "checkpoints" / "step-00000001"
    folder.mkdir(parents=True)
    save_file(drawn("norm=dyt")[0].state_dict(), folder / "model.safetensors")
    (tmp_path / "run" / "config.json").write_text(tiny("norm=dyt").model_dump_json())
    for norm in ("hardtanh", "dyt"):
        config = tiny(f"norm={norm}", f"init_from={folder}/model.safetensors")
        if norm == "dyt":
            assert dict(outline(config).rows)["alpha"].startswith("from the file")
        else:
            with pytest.raises(UserError, match="was trained with norm=dyt, not hardtanh"):
                outline(config)


def test_an_alpha_of_the_models_own_is_no_alpha_of_a_site():
    """timm's EfficientViM has parameters of that name in its plain form."""
    overrides = ("model=timm", "model.name=efficientvim_m1", "data=cifar10", "data.image_size=64")
    plain, _ = build_arm(config_of(*overrides), 10)
    converted, sites = build_arm(config_of(*overrides, "norm=dyt"), 10)
    assert "stages.0.blocks.0.alpha" in plain.state_dict()
    assert not brings_alphas(converted, plain.state_dict())
    assert brings_alphas(converted, converted.state_dict())
    loaded = load_weights(converted, plain.state_dict(), Path("plain"))
    assert loaded.new == [f"{site.name}.alpha" for site in sites]


# ------------------------------------------------------------------------------------------ in a run


def test_the_content_of_the_file_is_science_and_its_name_is_not(tmp_path):
    path, state = saved(tmp_path)
    shutil.copy(path, tmp_path / "copy.safetensors")
    config = tiny(f"init_from={path}")
    assert config.science_id != tiny().science_id
    assert config.science_id == tiny(f"init_from={tmp_path}/copy.safetensors").science_id
    state["head.bias"][0] += 1
    save_file(state, tmp_path / "other.safetensors")
    assert config.science_id != tiny(f"init_from={tmp_path}/other.safetensors").science_id
    # Both arms of a pair can start from one file.
    assert config.pair_id == tiny(f"init_from={path}", "norm=dyt").pair_id


def test_the_plan_tries_the_file_and_says_what_comes_of_it(tmp_path):
    path, _ = saved(tmp_path)
    rows = dict(outline(tiny(f"init_from={path}", "norm=dyt", "dry_run=true")).rows)
    assert rows["start"] == (f"{path}: 32 tensors copied; 5 new: blocks.0.norm1.alpha, blocks.0.norm2.alpha, "
                             "blocks.1.norm1.alpha, …")  # fmt: skip


@pytest.mark.slow
def test_a_run_starts_where_the_file_is_and_a_wrong_one_leaves_nothing(tmp_path):
    path, state = saved(tmp_path, "norm=dyt")
    args = ["train", *TINY, "norm=dyt", "optim.lr=1e-12", "optim.min_lr=1e-12", "optim.weight_decay=0"]
    done = dytrun(*args, f"init_from={path}", "runs_dir=runs")
    assert done.returncode == 0, done.stderr
    (run,) = Path("runs").glob("*/result.json")
    result = json.loads(run.read_text())
    assert result["init"]["copied"] == len(state)
    assert result["init"]["new"] == []
    (after,) = run.parent.glob("checkpoints/step-*/model.safetensors")
    found = read_weights(after)
    assert all(torch.allclose(value, state[name], atol=1e-8) for name, value in found.items())
    wrong = dytrun(*args, f"init_from={tmp_path}/none.safetensors", "runs_dir=others")
    assert (wrong.returncode, wrong.stdout) == (2, "")
    assert wrong.stderr.startswith("dytrun: init_from: ")
    assert len(wrong.stderr.splitlines()) == 1
    assert not Path("others").exists()
