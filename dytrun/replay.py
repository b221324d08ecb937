"""The step at which a run diverged: kept when it happens, and done again to see where the numbers leave the finite.

What is kept is the weights before that step; images, mixing and drop-path are functions of the step's number.
"""

import math
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dytrun.agreement import Diverged
from dytrun.batch import Batch, aligned
from dytrun.checkpoint import NotSaved, Store
from dytrun.compute import train_loss
from dytrun.config import RunConfig
from dytrun.data import RankShare
from dytrun.distributed import Place, all_sum, broadcast_tensors, from_first, gather
from dytrun.errors import UserError
from dytrun.feed import AnyData, train_feed
from dytrun.optim import Plan
from dytrun.records import write_json
from dytrun.sources import fingerprint_difference
from dytrun.surroundings import Surroundings

_FOLDER = "diverged"
# Of many parameters the ones with the largest gradients are shown.
_MOST = 8


def keep(directory: Path, model: nn.Module, around: Surroundings, error: Diverged) -> str:
    """Write `diverged/` into a run's directory: the step, its images on each rank, its numbers, and the weights.

    Every rank must call it. Returns what a person is told.
    """
    ranks = [{"rank": rank, "images": images} for rank, images in enumerate(gather(error.samples))]
    found = {
        "step": error.step,
        "epoch": error.step // around.plan.steps_per_epoch,
        "why": str(error),
        "numbers": error.numbers,
        "world": around.place.world,
        "data": around.facts.get("data"),
        "command": f"dytrun replay {directory}",
        "ranks": ranks,
    }

    def write() -> str:
        shutil.rmtree(directory / _FOLDER, ignore_errors=True)  # of an earlier try
        try:
            Store(directory / _FOLDER, keep=2).save(error.step, {"model": model.state_dict()}, found, is_best=False)
            write_json(directory / _FOLDER / "step.json", found)
        except (NotSaved, OSError) as wrong:
            return f"its step could not be kept ({wrong})"
        return f"do that step again: {found['command']}"

    return from_first(write)


def again(
    config: RunConfig, directory: Path, data: AnyData, arm: tuple[nn.Module, Plan], place: Place
) -> dict[str, Any]:
    """Do the kept step again, up to its gradients.

    Args:
        config: of the run.
        directory: of the run.
        data: as the run's.
        arm: the model, on its device, which gets the kept weights; and the plan of the run.
        place: one of as many ranks as the run had.

    Returns:
        step, recorded and found numbers, for each rank its loss, the images whose loss is not finite and the first
        module whose output is not; the parameters with the largest gradients.

    Raises:
        UserError: nothing was kept, it is damaged, or the ranks are not as many.
    """
    model, plan = arm
    kept: list[dict[str, Tensor]] = []

    def head() -> tuple[int, dict[str, Any]]:
        if not (directory / _FOLDER).is_dir():
            raise UserError(f"{directory}: no step was kept there; only a run that diverged has one")
        saved = Store(directory / _FOLDER, keep=2).look_up("LATEST")
        kept.append(saved.tensors["model"])
        return saved.step, saved.state

    step, found = from_first(head)
    if found["world"] != place.world:
        raise UserError(f"devices: the run had {found['world']} rank(s), and here are {place.world}; say devices="
                        f"{found['world']}")  # fmt: skip
    if found["data"] != data.facts:
        raise UserError(f"data_root: not the data of the run ({fingerprint_difference(found['data'], data.facts)})")
    model.load_state_dict(broadcast_tensors(kept[0] if kept else None, place.device))
    counts = plan.batch_per_rank, plan.accumulation, plan.steps_per_epoch
    share = RankShare(place.rank, place.world, *counts, step, step + 1)
    model.train()
    loss, images = torch.zeros(()), []
    with _Watch(model) as watch:
        # One after the other: what the model draws is keyed when its micro-batch is handed over.
        for batch in train_feed(config, data, share, place.device, 0):
            loss += watch.backward(batch, config, plan.accumulation)
            images.append(batch.indices.tolist())
    grads = {name: all_sum(p.grad) / place.world for name, p in model.named_parameters() if p.grad is not None}
    norms = {name: float(grad.norm()) for name, grad in grads.items()}
    worst = sorted(norms, key=lambda name: norms[name] if math.isfinite(norms[name]) else math.inf, reverse=True)
    ranks = gather({"rank": place.rank, "loss": float(loss), "images": images,
                    "images_not_finite": watch.images, "first_module": watch.module})  # fmt: skip
    seen = {
        "step": step,
        "recorded": found["numbers"],
        "loss": sum(one["loss"] for one in ranks) / place.world,
        "grad_norm": math.sqrt(sum(norm**2 for norm in norms.values())),
        "same_images": [one["images"] for one in ranks] == [one["images"] for one in found["ranks"]],
        "ranks": ranks,
        "gradients": {name: norms[name] for name in worst[:_MOST]},
    }
    return seen | {"is_reproduced": _is_reproduced(seen)}


def _is_reproduced(found: Mapping[str, Any]) -> bool:
    """Whether a step done again has the loss and the gradient norm that were recorded, on the same images."""
    recorded = found["recorded"]
    return bool(found["same_images"]) and all(
        name not in recorded or _is_same(recorded[name], found[name]) for name in ("loss", "grad_norm")
    )


def _is_same(before: float | None, now: float) -> bool:
    """JSON has no numbers that are not finite: they were written as null."""
    if before is None or not math.isfinite(before) or not math.isfinite(now):
        return (before is None or not math.isfinite(before)) and not math.isfinite(now)
    return math.isclose(before, now, rel_tol=1e-4)


class _Watch:
    """Sees where a model's numbers leave the finite, while it lasts."""

    def __init__(self, model: nn.Module):
        self._model = model
        self.module: str | None = None
        self.images: list[int] = []
        self._logits = torch.empty(0)
        self._hooks: list[Any] = []

    def __enter__(self) -> "_Watch":
        for name, module in self._model.named_modules():
            if not list(module.children()):
                self._hooks.append(module.register_forward_hook(self._seer(name)))
        self._hooks.append(self._model.register_forward_hook(self._keep_logits))
        return self

    def __exit__(self, *_: object) -> None:
        for hook in self._hooks:
            hook.remove()

    def backward(self, batch: Batch, config: RunConfig, accumulation: int) -> Tensor:
        """Add the gradients of one of a step's micro-batches; return its share of the loss."""
        loss = train_loss(self._model, batch, config) / accumulation
        loss.backward()
        losses = F.cross_entropy(*aligned(self._logits, batch.targets), reduction="none").view(len(batch.indices), -1)
        self.images += batch.indices[~torch.isfinite(losses).all(1).cpu()].tolist()
        return loss.detach().cpu()

    def _seer(self, name: str) -> Any:
        def see(module: nn.Module, inputs: Any, output: Any) -> None:
            if self.module is None and isinstance(output, Tensor) and not bool(torch.isfinite(output).all()):
                self.module = name

        return see

    def _keep_logits(self, module: nn.Module, inputs: Any, output: Tensor) -> None:
        self._logits = output.detach()
