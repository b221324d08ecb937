"""Exact accuracy over an unpadded split: integer counts, every image once, whatever the ranks and the batch.

What is said of images holds for windows of text, in each of which many bytes are predicted.
"""

from collections.abc import Callable, Iterable, Iterator

import torch
import torch.nn.functional as F
from torch import nn

from dytrun.batch import NO_TARGET, Batch, aligned
from dytrun.distributed import all_sum, gather, is_first
from dytrun.errors import UserError
from dytrun.records import Accuracy

# Batches between two agreements of the ranks on whether to go on.
_AGREE_EVERY = 8


class Halted(Exception):
    """Stopped on request in mid-evaluation, on every rank alike; nothing has changed."""


def _never() -> bool:
    return False


@torch.no_grad()
def evaluate(
    model: nn.Module,
    batches: Iterable[Batch],
    num: int,
    autocast: torch.autocast,
    is_stopped: Callable[[], bool] = _never,
) -> Accuracy:
    """Count top-1 and top-5 hits of `model` over a split of `num` images that the ranks share out.

    Args:
        model: not wrapped in DDP; its training flag is put back at the end.
        batches: this rank's, with labels as targets and positions in the split as indices, on the device of the
            model; any number, also none.
        num: images of the whole split; every one must be in exactly one batch of one rank.
        autocast: the precision of the run.
        is_stopped: asked at every batch; one rank's yes ends the evaluation of all.

    The counts are the same for every number of ranks and every batch size, as long as the logits are.

    Raises:
        Halted: one rank was told to stop.
        UserError: images cannot be read: names them on the first rank, and says nothing on the others.
    """
    device = next(model.parameters()).device
    # One row an image: seen, predictions, top-1 hits, top-5 hits. Nothing is read from the device before the end.
    hits = torch.zeros(num, 4, dtype=torch.int32, device=device)
    loss = torch.zeros((), dtype=torch.float64, device=device)
    was_training = model.training
    model.eval()
    try:
        for batch in _together(batches, is_stopped, device):
            images, labels, positions = batch.images, batch.targets, batch.indices
            with autocast:
                logits = model(images)
            rows, goals = aligned(logits, labels)
            top = rows.topk(min(5, rows.shape[1]), dim=1).indices == goals[:, None]
            counts = torch.stack([goals != NO_TARGET, top[:, 0], top.any(dim=1)], dim=1).int()
            hits[positions, 0] += 1
            hits[positions, 1:] += counts.view(len(positions), -1, 3).sum(1, dtype=torch.int32)
            loss += F.cross_entropy(rows, goals, reduction="sum").double()
    finally:
        model.train(was_training)
    hits, loss = all_sum(hits).cpu(), all_sum(loss).item()
    assert bool((hits[:, 0] == 1).all()), "an image of the split was not seen exactly once"
    predictions, top1, top5 = hits[:, 1:].sum(0).tolist()
    return Accuracy(
        num=predictions,
        top1_count=top1,
        top5_count=top5,
        loss=loss / predictions,
        correct=hits[:, 2].bool().numpy() if predictions == num else None,
    )


def _together(batches: Iterable[Batch], is_stopped: Callable[[], bool], device: torch.device) -> Iterator[Batch]:
    """Go through this rank's batches; leave, whatever the reason, at the same time as all other ranks."""
    waiting, is_done, wrong = iter(batches), False, None
    while True:
        for _ in range(_AGREE_EVERY):
            try:
                if is_done or wrong is not None or is_stopped():
                    break
                yield next(waiting)
            except StopIteration:
                is_done = True
            except UserError as error:
                wrong = error
        word = torch.tensor([is_stopped(), wrong is not None, not is_done], dtype=torch.int32).to(device)
        stopped, wrongs, unfinished = all_sum(word).tolist()
        if wrongs:
            problems = [line for lines in gather(() if wrong is None else tuple(wrong.problems)) for line in lines]
            raise UserError(*problems) if is_first() else UserError()
        if stopped:
            raise Halted
        if not unfinished:
            return
