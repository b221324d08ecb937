"""Configuration: what composes, what is refused and how it is said, and what makes the identity of a run."""

import json

import pytest
from conftest import TINY, config_of, tiny
from hypothesis import given, settings
from hypothesis import strategies as st

from dytrun.config import DataConfig, OptimConfig, RunConfig
from dytrun.errors import UserError
from dytrun.usage import CONF
from dytrun.validation import validate


def problems(*overrides: str) -> list[str]:
    with pytest.raises(UserError) as caught:
        config_of(*overrides)
    return list(caught.value.problems)


@pytest.mark.parametrize("group", ["model", "norm", "data", "augment", "ema", "experiment"])
def test_every_option_of_every_group_composes(group):
    options = sorted(path.stem for path in (CONF / group).glob("[!_]*.yaml"))
    assert options
    for option in options:
        extra = {"timm": ["model.name=vit_base_patch16_224"], "llama": ["data=text", "norm=rms"],
                 "text": ["model=llama", "norm=rms"]}  # fmt: skip
        config_of(f"{group}={option}", *extra.get(option, []))


def test_the_default_is_the_papers_recipe():
    config = config_of("model=vit_b", "norm=dyt")
    assert config.model.model_dump() == {
        "name": "vit_base_patch16_224", "drop_path": 0.1, "kwargs": {"global_pool": "avg"},
    }  # fmt: skip
    assert config.norm.model_dump() == {
        "name": "dyt", "alpha_init": 0.5, "rules": {}, "shift_init": None, "learn_alpha": True,
        "per_channel_alpha": False, "affine": True, "types": ["layernorm"], "include": None, "exclude": [],
        "calibrate": False, "calibrate_images": 512,
    }  # fmt: skip
    assert config.optim == OptimConfig(
        lr=4e-3, betas=(0.9, 0.999), eps=1e-8, weight_decay=0.05, min_lr=1e-6, warmup_epochs=20, clip_grad=None,
        layer_decay=1.0,
        stop_at_spike=False,
    )  # fmt: skip
    assert (config.epochs, config.global_batch, config.seed, config.precision) == (300, 4096, 0, "fp32")
    assert (config.ema.enabled, config.ema.decay) == (True, 0.9999)
    augment = config.augment
    assert (augment.rand_augment, augment.mixup, augment.cutmix) == ("rand-m9-mstd0.5-inc1", 0.8, 1.0)
    assert (augment.mix_prob, augment.mix_switch_prob, augment.smoothing) == (1.0, 0.5, 0.1)
    assert (augment.erase_prob, augment.erase_mode, augment.interpolation) == (0.25, "pixel", "bicubic")


def test_vit_l_has_betas_of_its_own():
    assert config_of("model=vit_l").optim.betas == (0.9, 0.95)
    assert config_of("model=vit_l").model.drop_path == 0.4
    assert config_of("model=vit_l", "optim.betas=[0.9,0.99]").optim.betas == (0.9, 0.99)


def test_all_errors_are_named_at_once():
    found = "\n".join(problems("norm=dyt", "norm.alpha_init=-1", "optim.lr=abc", "+bogus=1", "optim.wight_decay=0.1"))
    assert "norm.alpha_init: -1" in found
    assert "optim.lr: 'abc'" in found
    assert "bogus: no such key" in found
    assert "optim.wight_decay: no such key; did you mean 'optim.weight_decay'?" in found
    assert len(found.splitlines()) == 4


@pytest.mark.parametrize(
    ("override", "said"),
    [
        ("norm=dytt", "norm=dytt: no such option; did you mean 'dyt'?"),
        ("model=vit_x", "model=vit_x: no such option"),
        ("experiment=quikstart", "did you mean 'quickstart'?"),
        ("epochs=0", "epochs: 0"),
        ("epochs=inf", "epochs: inf"),
        ("optim.lr=nan", "optim.lr: nan"),
        ("seed=-1", "seed: -1"),
        ("augment.smoothing=1.5", "augment.smoothing: 1.5"),
        ("precision=float32", "precision: 'float32'"),
        ("machine.devices=-2", "machine.devices: -2"),
        ("machine.devices=[]", "machine.devices: an empty list"),
        ("tracking.project=../x", "tracking.project: '../x'"),
        ("model.name=hf-hub:someone/model", "model.name: 'hf-hub:someone/model'"),
        ("optim.warmup_epochs=300", "optim.warmup_epochs: 300 leaves nothing of epochs=300"),
        ("optim.min_lr=1", "optim.min_lr: 1 is above optim.lr"),
        ("seed=0,1", "seed=0,1: several values need a sweep; add -m"),
        ("norm.alpha_init=0.3", "norm.alpha_init: another option of this group has this key"),
        ("+agument=light", "agument: no such key; did you mean 'augment'?"),
        ("augment.rand_augment=rand-foo", "augment.rand_augment: 'rand-foo'"),
        ("augment.scale=[1.0,0.1]", "augment.scale: [1, 0.1] is no range"),
        ("optim.betas=[0.9]", "optim.betas"),
        ("runs_dir=''", "runs_dir"),
        ("epochs=1.5", "epochs: 1.5"),
        ("model=timm", "model.name: a value is needed"),
        ("epochs", "epochs"),
        ("--frobnicate", "--frobnicate: no such option"),
    ],
)
def test_a_wrong_value_is_said_in_one_line(override, said):
    found = problems(override)
    assert len(found) == 1
    assert said in found[0]


@pytest.mark.parametrize(
    "override", ["+_target_=os.system", "+model._target_=os.system", "model.kwargs={_target_: os.system}"]
)
def test_nothing_can_be_instantiated_from_a_configuration(override):
    assert any("_target_ is refused" in problem for problem in problems(override))


@settings(max_examples=40, deadline=None)
@given(st.dictionaries(st.text(max_size=8), st.one_of(st.none(), st.text(max_size=8), st.integers(), st.floats())))
def test_arbitrary_values_are_refused_and_never_crash(values):
    with pytest.raises(UserError) as caught:
        validate(RunConfig, values)
    assert all(problem for problem in caught.value.problems)


def test_science_is_the_identity_and_machine_is_not():
    base = tiny("norm=dyt")
    same = [
        "machine.workers=3",
        "machine.compile=blocks",
        "tracking.tags=[a]",
        "checkpoint.keep=5",
        "runs_dir=elsewhere",
    ]
    for override in same:
        assert tiny("norm=dyt", override).science_id == base.science_id
    for override in [
        "seed=1",
        "optim.lr=2e-3",
        "epochs=2",
        "precision=bf16",
        "norm.alpha_init=0.4",
        "data.image_size=16",
    ]:
        assert tiny("norm=dyt", override).science_id != base.science_id


def test_a_pair_differs_in_norm_and_seed_alone():
    base = tiny("norm=ln")
    assert tiny("norm=dyt", "seed=3").pair_id == base.pair_id
    assert tiny("norm=dyt", "norm.alpha_init=0.1").pair_id == base.pair_id
    assert tiny("norm=dyt", "optim.lr=2e-3").pair_id != base.pair_id


def test_where_imagenet_lies_is_no_science_but_a_folder_is_known_by_its_path(monkeypatch):
    monkeypatch.setenv("IMAGENET_DIR", "/somewhere")
    assert config_of().data.root == "/somewhere"
    assert config_of().science_id == config_of("data.root=/elsewhere").science_id
    assert config_of("data=folder", "data.root=/a").science_id != config_of("data=folder", "data.root=/b").science_id


def test_what_has_no_effect_is_no_science():
    def science_id(*overrides: str) -> str:
        return config_of("norm=dyt", *overrides).science_id

    for one, other in (
        (["ema=off", "ema.decay=0.5"], ["ema=off"]),
        (["augment=none", "augment.mix_prob=0.3"], ["augment=none"]),
        (["norm.exclude=[final, qk]"], ["norm.exclude=[qk, final]"]),
        (["norm.calibrate_images=9"], []),
        (["+model.kwargs.img_size=224"], []),
        (["+norm.rules={}"], []),
    ):
        assert science_id(*one) == science_id(*other), one
    for one, other in (
        (["norm.rules={attention: 1, *@0: 2}"], ["norm.rules={attention: 1, final: 2}"]),
        (["norm.include=[final]"], []),
        (["norm.learn_alpha=false"], []),
    ):
        assert science_id(*one) != science_id(*other), one
    rules = [{"attention": 1.0, "*@0": 2.0}, {"*@0": 2.0, "attention": 1.0}]
    config = config_of("norm=dyt")
    both = [config.model_copy(update={"norm": config.norm.model_copy(update={"rules": one})}) for one in rules]
    assert both[0].science_id != both[1].science_id, "the last rule that matches counts"


def test_a_run_is_named_after_its_science():
    config = tiny("norm=dyt", "seed=4")
    assert config.run_name == f"vit_tiny_patch16_224-dyt-digits-s4-{config.science_id}"
    assert str(config.run_dir) == f"runs/{config.run_name}"


def test_a_configuration_survives_its_json():
    config = tiny("norm=dyt")
    assert validate(RunConfig, json.loads(config.model_dump_json())) == config


def test_a_configuration_is_frozen():
    with pytest.raises(ValueError, match="frozen"):
        tiny().data.image_size = 3


def test_a_users_own_groups_are_found(tmp_path):
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "mine.yaml").write_text((CONF / "data" / "folder.yaml").read_text().replace("224", "96"))
    config = config_of("data=mine", "--config-dir", str(tmp_path))
    assert isinstance(config.data, DataConfig)
    assert config.data.image_size == 96


def test_free_arguments_of_a_model_need_no_plus():
    config = config_of(*TINY, "model.kwargs.qkv_bias=false")
    assert config.model.kwargs["qkv_bias"] is False
