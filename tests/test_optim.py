"""Schedule and parameter groups, against numbers computed with the reference implementation."""

import pytest
import torch
from conftest import config_of, tiny

from dytrun.arm import build_arm
from dytrun.errors import UserError
from dytrun.optim import build_optimizer, lr_at, param_groups, plan_steps, set_lr

IMAGENET = 1_281_167
# jiachenzhu/DyT aab5dde, utils.cosine_scheduler: lr 4e-3, 300 epochs of 312 steps, 20 epochs of warm-up.
REFERENCE_LR = {
    0: 0.0,
    1: 6.411283859592884e-07,
    312: 0.00020003205641929797,
    6239: 0.004,
    6240: 0.004,
    46800: 0.0022243729699685643,
    93599: 1.0000012929028863e-06,
}
# The same, optim_factory.get_parameter_groups: (tensors, elements) without and with decay.
REFERENCE_GROUPS = {
    ("vit_b", "ln"): ((102, 275_176), (50, 86_292_480)),
    ("vit_b", "dyt"): ((127, 275_201), (50, 86_292_480)),
    ("vit_l", "ln"): ((198, 526_312), (98, 303_800_320)),
    ("vit_l", "dyt"): ((247, 526_361), (98, 303_800_320)),
    ("convnext_b", "ln"): ((231, 169_448), (113, 88_422_016)),
    ("convnext_b", "dyt"): ((272, 169_489), (113, 88_422_016)),
    ("convnext_l", "ln"): ((231, 253_672), (113, 197_513_664)),
    ("convnext_l", "dyt"): ((272, 253_713), (113, 197_513_664)),
}


def test_the_schedule_is_the_references():
    config = config_of()
    plan = plan_steps(config, IMAGENET, world=64)
    assert (plan.steps_per_epoch, plan.total_steps, plan.warmup_steps) == (312, 93_600, 6_240)
    assert (plan.batch_per_rank, plan.accumulation) == (64, 1)
    for step, lr in REFERENCE_LR.items():
        assert lr_at(step, config.optim, plan) == pytest.approx(lr, abs=1e-15)


@pytest.mark.parametrize(("model", "norm"), REFERENCE_GROUPS)
def test_the_groups_are_the_references(model, norm):
    config = config_of(f"model={model}", f"norm={norm}")
    built, _ = build_arm(config, 1000, device="meta")
    decayed, plain = param_groups(built, config.optim)
    sizes = [(len(group["params"]), sum(p.numel() for p in group["params"])) for group in (plain, decayed)]
    assert tuple(sizes) == REFERENCE_GROUPS[model, norm]
    assert (plain["weight_decay"], decayed["weight_decay"]) == (0.0, 0.05)


def test_no_part_of_a_norm_is_ever_decayed():
    config = tiny("norm=dyt")
    model, sites = build_arm(config, 10)
    plain = {id(p) for p in param_groups(model, config.optim)[1]["params"]}
    for site in sites:
        for name in ("alpha", "weight", "bias"):
            assert id(model.get_parameter(f"{site.name}.{name}")) in plain
    assert id(model.pos_embed) in plain


def test_what_a_model_names_by_a_glob_is_not_decayed_either():
    config = config_of("model=timm", "model.name=xcit_nano_12_p16_224")
    model, _ = build_arm(config, 10, device="meta")
    (decayed,) = (group["params"] for group in param_groups(model, config.optim) if group["weight_decay"])
    assert not {id(p) for p in model.pos_embed.parameters()} & {id(p) for p in decayed}


def test_layer_decay_gives_alpha_the_layer_of_its_site():
    config = tiny("norm=dyt", "optim.layer_decay=0.5")
    model, _ = build_arm(config, 10)
    optimizer = build_optimizer(model, config.optim)
    set_lr(optimizer, 1.0)
    lr = {id(p): group["lr"] for group in optimizer.param_groups for p in group["params"]}
    block = model.blocks[0].norm1
    assert lr[id(block.alpha)] == lr[id(block.weight)] < lr[id(model.head.weight)] == 1.0


@pytest.mark.parametrize(
    ("world", "limit", "batch_per_rank", "accumulation"),
    [(1, "null", 4096, 1), (1, "64", 64, 64), (8, "64", 64, 8), (64, "64", 64, 1), (2, "100", 64, 32)],
)
def test_accumulation_follows_from_the_largest_micro_batch(world, limit, batch_per_rank, accumulation):
    plan = plan_steps(config_of(f"machine.max_batch_per_rank={limit}"), IMAGENET, world)
    assert (plan.batch_per_rank, plan.accumulation) == (batch_per_rank, accumulation)


@pytest.mark.parametrize(
    ("overrides", "num_train", "world", "said"),
    [
        ((), 4095, 1, "global_batch: 4096 is more than the 4095 training images"),
        ((), IMAGENET, 3, "global_batch: 4096 cannot be split over 3 ranks"),
        (("global_batch=134",), 1000, 2, "split into equal micro-batches of 1 at most|mixed in pairs"),
        (("global_batch=134", "augment.mixup=0", "augment.cutmix=0"), 1000, 2, "micro-batches of 1 at most"),
        (("global_batch=9",), 100, 1, "mixed in pairs, and a rank's 9 images"),
    ],
)
def test_a_batch_that_does_not_fit_is_refused(overrides, num_train, world, said):
    with pytest.raises(UserError, match=said):
        plan_steps(config_of(*overrides), num_train, world)


def test_one_step_of_warm_up_and_none():
    plan = plan_steps(tiny("optim.warmup_epochs=0"), 1437, 1)
    assert lr_at(0, tiny().optim, plan) == pytest.approx(1e-3)
    assert torch.isfinite(torch.tensor([lr_at(step, tiny().optim, plan) for step in range(plan.total_steps)])).all()
