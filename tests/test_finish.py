"""Batches are finished as torchvision and timm do it, by whichever of the two ways; the noise is noise."""

import os
import subprocess
import sys

import numpy as np
import pytest
import torch
from conftest import config_of
from scipy import stats
from timm.data import Mixup
from torchvision import transforms

from dytrun.augment import NOWHERE, Box, seeded
from dytrun.finish import Finish, Mixing, constants, fused, mixed_targets, mixing_drawer, noise, numbers_of

CPU = torch.device("cpu")
CUT = Mixing(0.8, Box(3, 5, 6, 8))
MIXINGS = {"none": Mixing(), "blend": Mixing(0.3), "cut": CUT}
SIDE = 20
DATA = config_of(f"data.image_size={SIDE}").data


def batch(number: int = 6, side: int = SIDE) -> torch.Tensor:
    return torch.randint(0, 256, (number, side, side, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))


def erased(*boxes: Box) -> torch.Tensor:
    return torch.tensor([(*box, 2**60 + 7 * number if box.height else 0) for number, box in enumerate(boxes)])


BOXES = erased(Box(0, 0, 4, 5), NOWHERE, Box(10, 12, 10, 8), NOWHERE, Box(2, 3, 1, 1), Box(0, 1, 19, 19))


def finished(images, boxes=None, mixing=None, mode="pixel") -> torch.Tensor:
    return Finish(DATA, mode, CPU)(images, boxes, mixing)


def by_whole_tensors(images, boxes, mixing: Mixing, mode: str) -> torch.Tensor:
    return fused(images, constants(DATA, mode, CPU), boxes, numbers_of(mixing), mode)


def test_plain_images_are_normalised_as_by_torchvision():
    images = batch()
    plain = transforms.Compose([transforms.ToTensor(), transforms.Normalize(DATA.mean, DATA.std)])
    assert torch.equal(finished(images), torch.stack([plain(image.numpy()) for image in images]))


@pytest.mark.parametrize("mode", ["pixel", "rand", "const"])
@pytest.mark.parametrize("mixing", MIXINGS)
def test_both_ways_give_the_same(mode, mixing):
    images = batch()
    for boxes in (BOXES, erased(*(NOWHERE,) * 6)):
        torch.testing.assert_close(
            finished(images, boxes, MIXINGS[mixing], mode), by_whole_tensors(images, boxes, MIXINGS[mixing], mode),
            rtol=0, atol=2e-6,
        )  # fmt: skip


@pytest.mark.parametrize("mixing", MIXINGS)
def test_a_batch_that_no_cache_holds_is_finished_alike(monkeypatch, mixing):
    images = batch()
    expected = [finished(images, boxes, MIXINGS[mixing]) for boxes in (BOXES, None)]
    monkeypatch.setattr("dytrun.finish._CACHED_BYTES", 0)
    assert all(torch.equal(finished(images, boxes, MIXINGS[mixing]), one)
               for boxes, one in zip((BOXES, None), expected, strict=True))  # fmt: skip


@pytest.mark.parametrize("mixing", MIXINGS)
def test_a_batch_may_be_odd(mixing):
    for number in (1, 5):
        torch.testing.assert_close(
            finished(batch()[:number], BOXES[:number], MIXINGS[mixing]),
            by_whole_tensors(batch()[:number], BOXES[:number], MIXINGS[mixing], "pixel"), rtol=0, atol=2e-6,
        )  # fmt: skip


@pytest.mark.parametrize("boxes", [None, BOXES])
@pytest.mark.parametrize("mode", ["pixel", "rand", "const"])
def test_both_ways_lay_images_out_as_models_are_given_them_elsewhere(mode, boxes):
    for images in (finished(batch(), boxes, CUT, mode), by_whole_tensors(batch(), boxes, CUT, mode)):
        assert images.is_contiguous()


def test_a_batch_that_is_kept_is_not_written_over():
    """Its memory is used again once nobody holds it, or a view of it."""
    finish, images = Finish(DATA, "pixel", CPU), batch()
    kept = [finish(images + shift) for shift in range(5)]
    expected = [finished(images + shift) for shift in range(5)]
    views = [one[2:3, 1] for one in kept]
    assert len({one.data_ptr() for one in kept}) == 5
    assert all(torch.equal(*pair) for pair in zip(kept, expected, strict=True))
    del kept
    more = [finish(images) for _ in range(5)]
    assert all(torch.equal(one, other[2:3, 1]) for one, other in zip(views, expected, strict=True))
    del more, views
    assert len({finish(images).data_ptr() for _ in range(6)}) <= 2


def test_a_box_is_erased_and_nothing_else():
    images = batch()
    plain, got = finished(images), finished(images, BOXES)
    for image, before, (top, left, height, width, _) in zip(got, plain, BOXES.tolist(), strict=True):
        inside = torch.zeros(20, 20, dtype=torch.bool)
        inside[top : top + height, left : left + width] = True
        assert torch.equal(image[:, ~inside], before[:, ~inside])
        assert not inside.any() or (image[:, inside] != before[:, inside]).all()
    rand, const = (finished(images, BOXES, None, mode)[0, :, :4, :5] for mode in ("rand", "const"))
    assert all(len(channel.unique()) == 1 for channel in rand)
    assert len(rand.unique()) == 3
    assert not const.any()


def test_what_stands_in_a_box_depends_on_the_key_and_the_place_alone():
    images = batch()
    alone = finished(images[2:3], BOXES[2:3])
    assert torch.equal(alone[0], finished(images, BOXES)[2])
    narrow = torch.tensor([[12, 13, 3, 4, int(BOXES[2, 4])]])
    assert torch.equal(finished(images[2:3], narrow)[0, :, 12:15, 13:17], alone[0, :, 12:15, 13:17])
    other = BOXES[2:3].clone()
    other[0, 4] += 1
    assert (finished(images[2:3], other)[0, :, 10:, 12:] != alone[0, :, 10:, 12:]).all()


def test_the_noise_is_normal_and_uncorrelated():
    places = torch.arange(3 * 224 * 224)
    values = torch.stack([noise(torch.tensor(key), places) for key in (0, 1, 2**62 + 12345, 2**63 - 1)])
    for row in values.numpy():
        assert stats.kstest(row, "norm").pvalue > 1e-3
        assert abs(stats.kurtosis(row)) < 0.05
        for lag in (1, 2, 3, 224, 224 * 224):
            assert abs(np.corrcoef(row[:-lag], row[lag:])[0, 1]) < 0.012
    assert np.abs(np.corrcoef(values.numpy()) - np.eye(4)).max() < 0.012
    assert values.isfinite().all()


@pytest.mark.parametrize("mixed", ["mixup=0.8,cutmix=1.0", "mixup=0.8,cutmix=0", "mixup=0,cutmix=1.0"])
def test_mixing_is_timms_for_every_seed(mixed):
    config = config_of(*(f"augment.{one}" for one in mixed.split(",")), "augment.mix_prob=0.8")
    augment, images, labels = config.augment, batch(), torch.tensor([0, 3, 1, 2, 3, 3])
    draw = mixing_drawer(augment, 4, 20)
    assert draw is not None
    oracle = Mixup(augment.mixup, augment.cutmix, prob=0.8, switch_prob=0.5, label_smoothing=0.1, num_classes=4)
    kinds = set()
    for seed in range(60):
        seeded(seed)
        mixing = draw()
        seeded(seed)
        expected, targets = oracle(finished(images), labels)
        torch.testing.assert_close(finished(images, None, mixing), expected, rtol=0, atol=1e-6)
        torch.testing.assert_close(mixed_targets(labels, mixing, 4, 0.1), targets, rtol=0, atol=1e-7)
        kinds.add("cut" if mixing.cut else "none" if mixing.lam == 1 else "blend")
    assert kinds == {"none"} | ({"blend"} if augment.mixup else set()) | ({"cut"} if augment.cutmix else set())


def test_mixup_by_hand():
    augment = config_of("augment.mixup=1.0", "augment.cutmix=0").augment
    draw, images, labels = mixing_drawer(augment, 4, 20), batch(2), torch.tensor([0, 3])
    assert draw is not None
    seeded(5)
    np.random.rand()
    lam = np.random.beta(1.0, 1.0)
    seeded(5)
    mixing = draw()
    plain = finished(images)
    torch.testing.assert_close(finished(images, None, mixing), lam * plain + (1 - lam) * plain.flip(0))
    # Smoothing 0.1 over 4 classes: 0.925 on the label, 0.025 elsewhere.
    first, second = torch.tensor([0.925, 0.025, 0.025, 0.025]), torch.tensor([0.025, 0.025, 0.025, 0.925])
    torch.testing.assert_close(
        mixed_targets(labels, mixing, 4, 0.1),
        torch.stack([lam * first + (1 - lam) * second, lam * second + (1 - lam) * first]),
    )


def test_cutmix_targets_follow_the_area():
    draw = mixing_drawer(config_of("augment.mixup=0", "augment.cutmix=1.0").augment, 2, 16)
    assert draw is not None
    black_and_white = torch.stack([torch.zeros(16, 16, 3), torch.full((16, 16, 3), 255)]).to(torch.uint8)
    finish = Finish(config_of("data.mean=[0,0,0]", "data.std=[1,1,1]").data, "pixel", CPU)
    for seed in range(10):
        seeded(seed)
        mixing = draw()
        share = mixed_targets(torch.tensor([0, 1]), mixing, 2, 0.0)[0, 1].item()
        assert finish(black_and_white, None, mixing)[0].mean().item() == pytest.approx(share, abs=1e-6)


def test_without_mixing_nothing_is_drawn():
    assert mixing_drawer(config_of("augment.mixup=0", "augment.cutmix=0").augment, 10, 8) is None
    assert mixing_drawer(config_of("augment.mix_prob=0").augment, 10, 8) is None


COMPILED = """
import torch
from test_finish import BOXES, CPU, DATA, MIXINGS, batch, by_whole_tensors, constants, fused, numbers_of
from torch._dynamo.utils import counters
compiled = torch.compile(fused, dynamic=False)
for mixing in (*MIXINGS.values(), MIXINGS["blend"]._replace(lam=0.77)):
    got = compiled(batch(), constants(DATA, "pixel", CPU), BOXES, numbers_of(mixing), "pixel")
    torch.testing.assert_close(got, by_whole_tensors(batch(), BOXES, mixing, "pixel"), rtol=0, atol=2e-6)
print(counters["stats"]["unique_graphs"], sum(counters["graph_break"].values()))
"""


@pytest.mark.slow
@pytest.mark.native
def test_compiled_it_is_one_graph_whatever_is_drawn():
    """In a process of its own: the hook that checks shapes here cannot be compiled."""
    done = subprocess.run([sys.executable, "-c", COMPILED], capture_output=True, text=True, timeout=550, check=False,
                          env=os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)})  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == ["1", "0"]
