"""Exact accuracy over an unpadded split: integer counts, every image once, whatever the ranks and the batch."""

from collections.abc import Iterable

import torch
import torch.nn.functional as F
from torch import nn

from dytrun.batch import Batch
from dytrun.distributed import all_sum
from dytrun.records import Accuracy


@torch.no_grad()
def evaluate(
    model: nn.Module,
    batches: Iterable[Batch],
    num: int,
    autocast: torch.autocast,
) -> Accuracy:
    """Count top-1 and top-5 hits of `model` over a split of `num` images that the ranks share out.

    Args:
        model: not wrapped in DDP; its training flag is put back at the end.
        batches: this rank's, with labels and positions in the split, on the device of the model; any number, also none.
        num: images of the whole split; every one must be in exactly one batch of one rank.
        autocast: the precision of the run.

    The counts are the same for every number of ranks and every batch size, as long as the logits are.
    """
    device = next(model.parameters()).device
    # One row an image: seen, top-1 hit, top-5 hit. Nothing is read from the device before the end.
    hits = torch.zeros(num, 3, dtype=torch.int32, device=device)
    loss = torch.zeros((), dtype=torch.float64, device=device)
    was_training = model.training
    model.eval()
    for images, labels, positions, _ in batches:
        with autocast:
            logits = model(images)
        logits = logits.float()
        top = logits.topk(min(5, logits.shape[1]), dim=1).indices == labels[:, None]
        hits[positions, 0] += 1
        hits[positions, 1] += top[:, 0].int()
        hits[positions, 2] += top.any(dim=1).int()
        loss += F.cross_entropy(logits, labels, reduction="sum").double()
    model.train(was_training)
    hits, loss = all_sum(hits).cpu(), all_sum(loss).item()
    assert bool((hits[:, 0] == 1).all()), "an image of the split was not seen exactly once"
    return Accuracy(
        num=num,
        top1_count=int(hits[:, 1].sum()),
        top5_count=int(hits[:, 2].sum()),
        loss=loss / num,
        correct=hits[:, 1].bool().numpy(),
    )
