"""Order and randomness are functions: of seed, epoch, index and step, whatever the ranks and the workers."""

import numpy as np
import pytest
import torch
from conftest import tiny

from dytrun.data import RankShare, ValBatches, epoch_order, train_batches
from dytrun.sources import load_data

CPU = torch.device("cpu")


def batches(config, share: RankShare, workers: int = 0):
    data = load_data(config.data)
    return list(train_batches(config, data, share, CPU, workers))


def share(rank=0, world=1, batch=8, accumulation=1, first_step=0, total_steps=3, steps_per_epoch=2) -> RankShare:
    return RankShare(rank, world, batch, accumulation, steps_per_epoch, first_step, total_steps)


def test_an_epoch_is_a_permutation_of_seed_and_epoch():
    order = epoch_order(100, seed=3, epoch=7)
    assert sorted(order) == list(range(100))
    assert np.array_equal(order, epoch_order(100, seed=3, epoch=7))
    assert not np.array_equal(order, epoch_order(100, seed=3, epoch=8))
    assert not np.array_equal(order, epoch_order(100, seed=4, epoch=7))


def test_steps_walk_through_the_order_of_their_epoch():
    config = tiny()
    indices = [batch.indices.tolist() for batch in batches(config, share())]
    first, second = epoch_order(1437, 0, 0).tolist(), epoch_order(1437, 0, 1).tolist()
    assert indices == [first[:8], first[8:16], second[:8]]


@pytest.mark.parametrize(("world", "accumulation"), [(1, 4), (2, 2), (4, 1)])
def test_ranks_and_micro_batches_share_out_the_same_global_batch(world, accumulation):
    config = tiny("augment=light")
    whole = batches(config, share(batch=8, total_steps=2))
    parts = [
        batches(config, share(rank, world, 8 // world // accumulation, accumulation, total_steps=2))
        for rank in range(world)
    ]
    for step in range(2):
        mine = [batch for part in parts for batch in part[step * accumulation : (step + 1) * accumulation]]
        assert torch.equal(torch.cat([batch.indices for batch in mine]), whole[step].indices)
        assert torch.equal(torch.cat([batch.images for batch in mine]), whole[step].images)


def test_the_number_of_workers_changes_no_pixel():
    config = tiny("augment=light", "augment.mixup=0.8", "augment.erase_prob=0.5")
    alone, helped = batches(config, share()), batches(config, share(), workers=2)
    for one, other in zip(alone, helped, strict=True):
        assert torch.equal(one.images, other.images)
        assert torch.equal(one.targets, other.targets)


def test_taking_up_at_a_step_gives_what_would_have_come():
    config = tiny("augment=light", "augment.cutmix=1.0")
    whole, rest = batches(config, share(total_steps=5)), batches(config, share(first_step=3, total_steps=5))
    for one, other in zip(whole[3:], rest, strict=True):
        assert torch.equal(one.images, other.images)
        assert torch.equal(one.targets, other.targets)


def test_both_arms_see_bit_equal_batches():
    ln, dyt = (tiny(f"norm={norm}", "augment=paper", "data.image_size=16") for norm in ("ln", "dyt"))
    for one, other in zip(batches(ln, share()), batches(dyt, share()), strict=True):
        assert torch.equal(one.images, other.images)
        assert torch.equal(one.targets, other.targets)


def test_an_image_is_augmented_anew_in_each_epoch():
    config = tiny("augment=light")
    seen = {}
    for batch in batches(config, share(batch=1436, steps_per_epoch=1, total_steps=2)):
        for index, image in zip(batch.indices.tolist(), batch.images, strict=True):
            seen.setdefault(index, []).append(image)
    pairs = [images for images in seen.values() if len(images) == 2]
    assert sum(torch.equal(*images) for images in pairs) < len(pairs) / 20


def test_what_the_model_draws_depends_on_the_step_and_the_place_alone():
    config, data = tiny(), load_data(tiny().data)

    def draws(first_step: int) -> list[float]:
        return [torch.rand(1).item() for _ in train_batches(config, data, share(first_step=first_step), CPU, 0)]

    assert draws(0)[1:] == draws(1)
    assert len(set(draws(0))) == 3


@pytest.mark.parametrize("world", [1, 2, 3])
def test_validation_images_come_once_over_all_ranks(world):
    data = load_data(tiny().data)
    seen = []
    for rank in range(world):
        val = ValBatches(tiny().data, data.val, batch=20, workers=1, place=(rank, world, CPU))
        for _ in range(2):  # a second pass gives the same
            positions = [int(i) for batch in val() for i in batch.indices]
        seen += positions
    assert sorted(seen) == list(range(360))
