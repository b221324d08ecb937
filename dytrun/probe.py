"""`dytrun probe`: a run's checkpoint and some validation images → what its norms do: numbers, figures, a page."""

import contextlib
import os
import shlex
import shutil
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from dytrun import machine, probe_figures, probe_page, run
from dytrun.activations import undisturbed, watched
from dytrun.arm import build_arm
from dytrun.checkpoint import Checkpoint, Store
from dytrun.compute import autocast
from dytrun.config import ProbeConfig, RunConfig
from dytrun.data import ValBatches
from dytrun.errors import UserError, first_line
from dytrun.model import put_on
from dytrun.probe_sites import Cloud, Correlation, SiteLook, Watch, correlation
from dytrun.processes import end_loaders
from dytrun.records import Table, write_json
from dytrun.sources import Data, Split, fingerprint_difference, load_data

# A smaller share is written as 0.0 %.
_SEEN = 0.0005


@dataclass(frozen=True)
class Probe:
    """What was found."""

    about: dict[str, Any]
    """Which run, step, weights and images, as plain values."""
    sites: list[SiteLook]
    """In the order of the model's modules."""
    clouds: list[Cloud]
    """Of each site."""
    correlation: Correlation | None
    """None without alphas, for fewer than four sites, or where all are the same."""

    def values(self) -> dict[str, Any]:
        """Return all numbers, for a JSON file."""
        sites = [asdict(site) | {"inverse_std": site.inverse_std} for site in self.sites]
        correlation = None if self.correlation is None else asdict(self.correlation)
        return self.about | {"alpha_against_inverse_std": correlation, "sites": sites}

    def verdicts(self) -> list[str]:
        """Say in a sentence or two what the norms do."""
        shapes = [(site.name, site.shape) for site in self.sites if site.shape is not None]
        said = []
        if shapes:
            (lowest, least), (highest, most) = (pick(shapes, key=lambda one: one[1].s_index) for pick in (min, max))
            middle = float(np.median([shape.s_index for _, shape in shapes]))
            said.append(
                f"A tanh removes {100 * least.s_index:.1f} % ({lowest}) to {100 * most.s_index:.1f} % ({highest}) of "
                f"the squared error that the best straight line leaves of a norm's output, the median site's "
                f"{100 * middle:.1f} %: that is how S-shaped the norms are."
            )
        if self.correlation is not None:
            found = self.correlation
            said.append(
                f"Over the {found.num_sites} sites alpha and 1/std of the input have a correlation of "
                f"{found.pearson:+.2f} (Pearson, 95 % interval {found.low:+.2f} to {found.high:+.2f}; Spearman "
                f"{found.spearman:+.2f})."
            )
        saturated = [(site.shares.saturated, site.name) for site in self.sites if site.shares.saturated is not None]
        if saturated:
            share, name = max(saturated)
            most = f"The most saturated site is {name}: {100 * share:.1f} % of its inputs."
            said.append(most if share >= _SEEN else "No site has inputs to speak of in its saturated range.")
        return said

    def table(self) -> Table:
        """Return a row a site; columns in which no site has anything are left out."""
        rows = [_row(site) for site in self.sites]
        used = [name for name in rows[0] if any(row[name] != "–" for row in rows)]
        about = self.about
        title = f"{about['run']}, {about['weights']} weights of step {about['step']:,}, {about['num_images']} images"
        return Table(title, used, [[row[name] for name in used] for row in rows], self.verdicts())


def _row(site: SiteLook) -> dict[str, str]:
    shape, shares = site.shape, site.shares

    def of(value: float | None, style: str) -> str:
        return "–" if value is None else format(value, style)

    return {
        "site": site.name,
        "alpha": of(site.alpha, ".3f"),
        "1/std": of(site.inverse_std, ".3f"),
        "input std": of(site.input_std, ".3f"),
        "S index": of(shape and shape.s_index, ".3f"),
        "R² tanh": of(shape and shape.r2_tanh, ".4f"),
        "R² line": of(shape and shape.r2_line, ".4f"),
        "linear": of(shares.linear, ".1%"),
        "curved": of(shares.curved, ".1%"),
        "saturated": of(shares.saturated, ".1%"),
        "RMS in": of(site.rms_in, ".3g"),
        "RMS out": of(site.rms_out, ".3g"),
        "largest in": of(site.largest_in, ".3g"),
        "outlier channels": str(len(site.outliers)) if site.outliers else "–",
    }


def config_of(config: ProbeConfig) -> RunConfig:
    """Return the configuration of the run that is to be probed.

    Raises:
        UserError: there is no such run, or its norms have nothing to be probed.
    """
    trained = run.load_config(Path(config.dir), config.data_root)
    if trained.data.name == "text":
        raise UserError(f"{config.dir}: trained on text, and dytrun probe looks at images; what its norms did while it "
                        "trained is in metrics.jsonl (tracking.probe_every_steps)")  # fmt: skip
    if trained.norm.name == "identity":
        raise UserError(f"{config.dir}: its norms are straight lines (norm=identity) and have no curve to be seen; "
                        "probe a run with another norm")  # fmt: skip
    return trained


def look(config: ProbeConfig, trained: RunConfig, say: Callable[[str], None]) -> Probe:
    """Send validation images through a run's model on the first device of this machine; return what its norms did.

    Raises:
        UserError: there is no such checkpoint, data or norm; there are fewer images than asked for.
    """
    directory = Path(config.dir)
    name = {"last": "LATEST", "best": "BEST"}.get(str(config.checkpoint), config.checkpoint)
    saved = Store(directory / "checkpoints", trained.checkpoint.keep).look_up(name)
    part = "model" if config.weights == "raw" else "ema"
    if part not in saved.tensors:
        raise UserError(f"weights: the run has no {config.weights} weights; say weights=raw")
    devices, _ = machine.resolve_devices("auto")
    device = torch.device("cpu") if devices is None else torch.device("cuda", devices[0])
    machine.prepare_torch(trained.machine, device)
    data = load_data(trained.images)
    _check_images(saved, data)
    chosen = spread_over_classes(data.val, config.batches, config.batch)
    model, norms = build_arm(trained, data.num_classes)
    sites = [site for site in norms if site.has_twin]
    if not sites:
        raise UserError(f"{directory}: its model has no norm that is known here ({trained.model.name})")
    model = _with_weights(put_on(model, trained, device), saved, part)
    say(f"{len(sites)} sites, {len(chosen)} validation images, on {machine.device_name(device)}")
    workers = machine.worker_count(config.workers, device)
    here = 0, 1, device
    batches = ValBatches(trained.images, data.val.part(chosen), config.batch, workers, here, trained.machine.loader)
    watches = {site.name: Watch(site, model.get_submodule(site.name), config.batches) for site in sites}

    def see(name: str, norm: nn.Module, x: Tensor, _: Tensor) -> None:
        watches[name].take(x)

    with torch.no_grad(), undisturbed(model), watched(model, list(watches), see):
        for batch in batches():
            with autocast(trained, device):
                model(batch.images)
    end_loaders()
    found = [watch.look() for watch in watches.values() if watch.is_seen]
    looks, clouds = [one for one, _ in found], [one for _, one in found]
    about = _about(config, trained, saved, device) | {
        "num_images": len(chosen),
        "num_val": len(data.val.labels),
        "images": chosen.tolist(),
    }
    return Probe(about, looks, clouds, correlation(looks))


def _check_images(saved: Checkpoint, data: Data) -> None:
    """Refuse validation images that are not those of the run; its training images need not be here."""
    before = {name: fact for name, fact in saved.state.get("data", {}).items() if "train" not in name}
    if difference := fingerprint_difference({**data.facts, **before}, data.facts):
        raise UserError(f"data_root: not the validation images of the run ({difference}); give those")


def spread_over_classes(split: Split, batches: int, batch: int) -> np.ndarray:
    """Return the indices of as many images as are asked for, batch by batch: evenly over a split ordered by class.

    Raises:
        UserError: the split has fewer.
    """
    num, there = batches * batch, len(split.labels)
    if num > there:
        raise UserError(f"batches: {batches} of {batch} images are {num}, and the validation split has {there}; lower "
                        "batches or batch")  # fmt: skip
    by_class = np.argsort(split.labels, kind="stable")
    chosen = by_class[np.arange(num) * there // num]
    return chosen.reshape(batch, batches).T.flatten()


def _with_weights(model: nn.Module, saved: Checkpoint, part: str) -> nn.Module:
    try:
        model.load_state_dict(saved.tensors[part])
    except RuntimeError as error:
        said = " ".join(str(error).split())[:300]
        raise UserError(f"checkpoint of step {saved.step}: it does not fit the model of this run ({said})") from None
    return model


def _about(config: ProbeConfig, trained: RunConfig, saved: Checkpoint, device: torch.device) -> dict[str, Any]:
    commit, dirty = machine.commit()
    return {
        "run": Path(config.dir).resolve().name,
        "model": trained.model.name,
        "norm": trained.norm.name,
        "data": trained.data.name,
        "seed": trained.seed,
        "checkpoint": config.checkpoint,
        "step": saved.step,
        "weights": config.weights,
        "precision": trained.precision,
        "device": machine.device_name(device),
        "torch": torch.__version__,
        "commit": commit,
        "dirty": dirty,
    }


def target(config: ProbeConfig) -> Path:
    """Return the folder that what is found goes to, after a look whether it may.

    Raises:
        UserError: it is no folder, holds something else, or cannot be written.
    """
    out = Path(config.out) if config.out is not None else Path(config.dir) / "probe"
    if out.is_symlink() or (out.exists() and not out.is_dir()):
        raise UserError(f"out: {out} is a {'link' if out.is_symlink() else 'file'}; give a folder")
    if Path.cwd().is_relative_to(out.resolve()):  # it is exchanged for another folder of its name
        raise UserError(f"out: {out} is where this command runs; give a folder of its own")
    # What an earlier probe left goes, and so it must have left all that is there.
    if other := _not_ours(out):
        raise UserError(f"out: {out} holds other files ({other}); give a folder of its own, or move them")
    there = next(path for path in (out.absolute().parent, *out.absolute().parents) if path.exists())
    with _partial(there / out.name):
        pass
    return out


def _not_ours(out: Path) -> str | None:
    """Return the name of something in a folder that no probe left there."""
    there = sorted(out.iterdir()) if out.is_dir() else []
    figures = sorted((out / "figures").iterdir()) if (out / "figures").is_dir() else []
    names = [path.name for path in there if path.name not in ("probe.json", "probe.html", "figures", "wandb")]
    names += [f"figures/{path.name}" for path in figures if path.suffix not in (".svg", ".png")]
    return names[0] if names else None


@contextlib.contextmanager
def _partial(out: Path) -> Iterator[Path]:
    """Give a folder beside `out`, which is removed at the end."""
    folder = out.with_name(f".{out.name}.{os.getpid()}.partial")
    try:
        folder.mkdir()
    except OSError as error:
        raise UserError(f"out: {out} cannot be written ({error.strerror}); choose another") from None
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def keep(out: Path, found: Probe) -> dict[str, Path]:
    """Write page, numbers and figures, all of them or none; what an earlier probe left there goes.

    Returns:
        Title → PNG file of each figure.

    Raises:
        UserError: the disk does not take it.
    """
    with contextlib.suppress(OSError):  # the next line says it
        out.parent.mkdir(parents=True, exist_ok=True)
    with _partial(out) as folder:
        try:
            (folder / "figures").mkdir()
            drawn = probe_figures.draw(found.sites, found.clouds)
            for figure in drawn:
                figure.save(folder / "figures")
            write_json(folder / "probe.json", found.values())
            page = probe_page.page(found.about, found.verdicts(), found.table(), drawn)
            (folder / "probe.html").write_text(page, encoding="utf-8")
            _put_in_place(folder, out)
        except OSError as error:
            raise UserError(f"out: {out} cannot be written ({error.strerror or first_line(error)}); make room, or "
                            "choose another") from None  # fmt: skip
    return {figure.title: out / "figures" / f"{figure.name}.png" for figure in drawn if not figure.is_site}


def _put_in_place(folder: Path, out: Path) -> None:
    aside = out.with_name(f".{out.name}.{os.getpid()}.old")
    if out.exists():
        out.rename(aside)
    try:
        folder.rename(out)
    except OSError:
        if aside.exists():
            aside.rename(out)
        raise
    if (aside / "wandb").is_dir():  # what is not uploaded yet
        (aside / "wandb").rename(out / "wandb")
    shutil.rmtree(aside, ignore_errors=True)


def share(out: Path, trained: RunConfig, found: Probe, figures: dict[str, Path]) -> str:
    """Give W&B the numbers, the table and the figures, in the run's project; say where they are now.

    Raises:
        UserError: W&B did not take it, or is forbidden; the files are written.
    """
    from dytrun import wandb_link, wandb_reach

    mode, why = wandb_reach.choose_mode(trained.tracking.model_copy(update={"mode": "auto"}))
    if mode == "off":
        raise UserError(f"wandb: {why} forbids it; unset that, or leave wandb=true out (the files are written)")
    tracking = trained.tracking.model_copy(update={"mode": mode})
    wandb_link.log_once(tracking, out / "probe.json", "probe", found.about, [found.table()], figures)
    if mode == "online":
        return f"W&B: table and figures are in the project {tracking.project}"
    return f"W&B offline: {why}. Upload it: wandb sync {shlex.quote(str(out / 'wandb'))}/offline-run-*"
