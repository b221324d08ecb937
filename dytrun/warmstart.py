"""What a run starts from that does not draw its weights: a file, and point-wise layers fitted to its trained norms."""

import json
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from dytrun.arm import build_plain
from dytrun.calibrate import calibrate
from dytrun.config import PointWiseConfig, RunConfig
from dytrun.data import ValBatches, epoch_order
from dytrun.digest import file_digest
from dytrun.distributed import Place, broadcast_weights
from dytrun.errors import UserError
from dytrun.records import Accuracy
from dytrun.sites import norm_sites
from dytrun.sources import Data
from dytrun.weights import Loaded, brings_alphas, classifier_names, load_weights, read_weights

# Images of a batch: no matter of the machine, because rows are drawn from each.
_CALIBRATION_BATCH = 64
# A model → its accuracy over the validation images; collective.
Evaluate = Callable[[nn.Module], Accuracy]


@dataclass(frozen=True)
class Start:
    """A file and the model that it goes into, found to fit."""

    path: Path
    part: str | None
    weights: dict[str, Tensor]
    loaded: Loaded
    alpha_from: str | None
    """`file` or `fit` where norm.alpha_init and norm.rules have no effect."""

    def facts(self) -> dict[str, Any]:
        """Return what init.json holds."""
        where = {"file": str(self.path), "part": self.part, "digest": file_digest(str(self.path))}
        return where | asdict(self.loaded) | {"alpha_from": self.alpha_from}


def load_start(config: RunConfig, model: nn.Module) -> Start | None:
    """Copy the weights of `init_from` into the model of a run; None where weights are drawn.

    On the meta device it is a check without a copy.

    Raises:
        UserError: the file cannot be read, is of another model, or is not what calibration needs.
    """
    if config.init_from is None:
        return None
    path = Path(config.init_from)
    weights = read_weights(path, config.init_part)
    is_converted = brings_alphas(model, weights)
    if is_converted:
        _check_function(config, path)
    if wants_calibration(config):
        _check_trained(config, weights, path, is_converted)
    alpha_from = "file" if is_converted else None
    if isinstance(config.norm, PointWiseConfig) and config.norm.calibrate and "alpha" in config.norm.fitted_parts:
        alpha_from = "fit"
    return Start(path, config.init_part, weights, load_weights(model, weights, path), alpha_from)


def calibrate_start(
    config: RunConfig, start: Start, model: nn.Module, data: Data, place: Place, evaluate: Evaluate
) -> dict[str, Any]:
    """Fit the point-wise layers of `model`, on its device, to the norms of the file that it was started from.

    Returns the accuracy of the file's own model, of the converted one before and after, and the fit of each site. Every
    rank fits alike, and then takes the first one's result.
    """
    assert isinstance(config.norm, PointWiseConfig)
    teacher = build_plain(config, data.num_classes)
    load_weights(teacher, start.weights, start.path)
    teacher = teacher.to(place.device)
    # With a classifier that is new an accuracy would say nothing.
    is_whole = not any(name in classifier_names(model) for name in start.loaded.new)
    trained, converted = (evaluate(teacher), evaluate(model)) if is_whole else (None, None)
    num = min(config.norm.calibrate_images, len(data.train.labels))
    chosen = epoch_order(len(data.train.labels), config.seed, 0)[:num]
    seen = ValBatches(config.images, data.train.part(chosen), _CALIBRATION_BATCH, 0, (0, 1, place.device))
    was_training = model.training
    fits = calibrate(teacher, model, [batch.images for batch in seen()])
    model.train(was_training)
    broadcast_weights(model)
    calibrated = evaluate(model) if is_whole else None
    return {
        "top1_trained": trained and trained.top1,
        "top1_converted": converted and converted.top1,
        "top1_calibrated": calibrated and calibrated.top1,
        "images": num,
        "sites": {name: found._asdict() for name, found in fits.items()},
    }


def wants_calibration(config: RunConfig) -> bool:
    """Say whether a run's point-wise layers are fitted to trained norms."""
    return isinstance(config.norm, PointWiseConfig) and config.norm.calibrate


def _check_function(config: RunConfig, path: Path) -> None:
    """Refuse weights that a run of ours has trained with another function: all of the family have the same names."""
    try:
        trained = json.loads((path.parents[2] / "config.json").read_text())["norm"]["name"]
    except (IndexError, OSError, ValueError, KeyError, TypeError):
        return  # no file of a run; what it was trained with is not written in it
    if trained != config.norm.name:
        raise UserError(
            f"init_from: {path} was trained with norm={trained}, not {config.norm.name}; say norm={trained}"
        )


def _check_trained(config: RunConfig, weights: dict[str, Tensor], path: Path, is_converted: bool) -> None:
    assert isinstance(config.norm, PointWiseConfig)
    if is_converted:
        raise UserError(f"norm.calibrate: {path} is of a converted model; give one that was trained with its own norms")
    plain = build_plain(config, config.images.num_classes or 2)
    drawn = plain.state_dict()
    names = [f"{site.name}.{part}" for site in norm_sites(plain, config.norm.types) for part in ("weight", "bias")]
    known = [name for name in names if name in drawn and name in weights]
    if known and all(torch.equal(drawn[name], weights[name].to(drawn[name].dtype)) for name in known):
        raise UserError(
            f"norm.calibrate: the norms of {path} are as a new model has them, every weight and bias, so its model is "
            "not trained; train it first"
        )
