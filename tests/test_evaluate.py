"""Exact accuracy: the same integers for every number of images, ranks and batch size, over real gloo ranks."""

import tempfile
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.multiprocessing as mp
from torch import nn

from dytrun.batch import Batch
from dytrun.distributed import session
from dytrun.evaluate import evaluate

IMAGES, RANKS, BATCHES = range(1, 18), (1, 2, 3), range(1, 6)
CLASSES = 7


def problem(num: int) -> tuple[nn.Module, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(num)
    model = nn.Sequential(nn.Flatten(), nn.Linear(4, CLASSES))
    with torch.no_grad():
        model[1].weight.copy_(torch.randn(CLASSES, 4, generator=generator))
        model[1].bias.zero_()
    images = torch.randn(num, 1, 2, 2, generator=generator)
    return model, images, torch.randint(0, CLASSES, (num,), generator=generator)


def counts(num: int, batch: int, rank: int, world: int) -> tuple[int, int, float, list[bool]]:
    model, images, labels = problem(num)
    mine = torch.arange(num)[rank::world]
    parts = [mine[i : i + batch] for i in range(0, len(mine), batch)]
    batches = [Batch(images[part], labels[part], part) for part in parts]
    found = evaluate(model, batches, num, torch.autocast("cpu", enabled=False))
    return found.top1_count, found.top5_count, found.loss, found.correct.tolist()


def grid(rank: int, world: int, results: str) -> None:
    import os

    os.environ |= {"RANK": str(rank), "WORLD_SIZE": str(world), "LOCAL_RANK": str(rank)}
    os.environ |= {"DYTRUN_RENDEZVOUS": f"{results}/meet", "SLURMD_NODENAME": "localhost", "GLOO_SOCKET_IFNAME": "lo"}
    torch.set_num_threads(1)
    with session(None, timeout_s=300):
        found = {(num, batch): counts(num, batch, rank, world) for num in IMAGES for batch in BATCHES}
    torch.save(found, f"{results}/{rank}.pt")


def expected(num: int) -> tuple[int, int, list[bool]]:
    """Count by hand, with NumPy, one image at a time."""
    model, images, labels = problem(num)
    logits = (images.flatten(1) @ model[1].weight.T).detach().numpy()
    ranks = [int((row > row[label]).sum()) for row, label in zip(logits, labels.tolist(), strict=True)]
    return sum(rank == 0 for rank in ranks), sum(rank < 5 for rank in ranks), [rank == 0 for rank in ranks]


@pytest.mark.slow
@pytest.mark.parametrize("world", RANKS)
def test_counts_are_exact_for_every_split(world):
    with tempfile.TemporaryDirectory() as results:
        context = mp.get_context("forkserver")
        context.set_forkserver_preload(["torch"])
        mp.start_processes(grid, (world, results), nprocs=world, start_method="forkserver")
        for rank in range(world):
            for (num, _), (top1, top5, _, correct) in torch.load(Path(results) / f"{rank}.pt").items():
                assert (top1, top5, correct) == expected(num)


def test_loss_is_the_mean_over_images_not_over_batches():
    model, images, labels = problem(5)
    mean = nn.functional.cross_entropy(model(images), labels).item()
    assert counts(5, 3, 0, 1)[2] == pytest.approx(mean, rel=1e-6)


def test_an_image_seen_twice_or_never_is_noticed():
    model, images, labels = problem(4)
    for part in (torch.tensor([0, 1, 2]), torch.tensor([0, 1, 2, 2])):
        with pytest.raises(AssertionError, match="exactly once"):
            evaluate(model, [Batch(images[part], labels[part], part)], 4, torch.autocast("cpu", enabled=False))


def test_the_training_flag_is_put_back():
    model, images, labels = problem(2)
    model.train()
    evaluate(model, [Batch(images, labels, torch.arange(2))], 2, torch.autocast("cpu", enabled=False))
    assert model.training


def test_percentages_come_from_counts():
    model, images, labels = problem(17)
    found = evaluate(model, [Batch(images, labels, torch.arange(17))], 17, torch.autocast("cpu", enabled=False))
    assert found.top1 == 100 * found.top1_count / 17
    assert found.correct.dtype == np.bool_
