"""What a run would do, said before it does it: the whole recipe, and the table of its sites. Touches nothing."""

from pathlib import Path
from typing import NamedTuple

from torch import nn

from dytrun import machine, optim
from dytrun.arm import build_arm, build_plain, conversion
from dytrun.augment import eval_resize
from dytrun.config import PointWiseConfig, RunConfig
from dytrun.convert import chosen_sites
from dytrun.model import check_forward, trainable
from dytrun.sites import Site, norm_sites, norms_left
from dytrun.sources import load_data
from dytrun.warmstart import load_start

_SITE_COLUMNS = ("site", "class", "channels", "layout", "role", "block", "becomes", "alpha_init")


class Outline(NamedTuple):
    """A run, described."""

    rows: list[tuple[str, str]]
    """A name and what it is."""
    site_columns: tuple[str, ...]
    sites: list[list[str]]
    """A row for each norm of the types that conversion looks at."""


def outline(config: RunConfig) -> Outline:
    """Say what a run would do, building its model on the meta device.

    Raises:
        UserError: whatever would stop the run before its first step.
    """
    _, world = machine.resolve_devices(config.machine.devices)
    # The model first: it can be wrong without any data at hand.
    model, _ = build_arm(config, config.data.num_classes or 2, device="meta")
    root = config.data.root
    if config.dry_run and config.data.name == "imagenet" and not (root and Path(root).is_dir()):
        # A plan can be made where the data is not: ImageNet's counts are known.
        num_train, num_classes = config.data.num_train or 0, config.data.num_classes or 0
        missing = f"data.root={root} is not on this machine" if root else "data.root is not set"
        images = f"{num_train:,} training images, {num_classes} classes ({missing}: needed to train)"
    else:
        data = load_data(config.data)
        machine.check_loader(config.machine.loader, config.data.name, bool(data.train.paths))
        num_train, num_classes = len(data.train.labels), data.num_classes
        images = f"{num_train:,} training and {len(data.val.labels):,} validation images, {num_classes} classes"
        images += f"; a pack: {data.pack}" if data.pack else ""
    steps = optim.plan_steps(config, num_train, world)
    if config.data.num_classes is None:
        model, _ = build_arm(config, num_classes, device="meta")
    check_forward(model, config.model.name, num_classes, config.data.image_size)
    plain = build_plain(config, num_classes, device="meta")
    chosen, left = _sites(config, plain)
    drop_path = "the model's own" if config.model.drop_path is None else f"{config.model.drop_path:g}"
    batch = (f"{config.global_batch} = {world} rank(s) × {steps.accumulation} micro-batch(es) × "
             f"{steps.batch_per_rank}")  # fmt: skip
    rows = [
        ("run", f"{config.run_dir}"),
        *_published(config),
        ("model", f"{config.model.name}: {trainable(model):,} parameters, {config.data.image_size} px, drop-path "
         f"{drop_path}" + "".join(f", {key}={value}" for key, value in config.model.kwargs.items())),
        ("norm", _norm(config, model, chosen, left)),
        ("arms", f"pair {config.pair_id}, arm {config.norm.name}; {_other_arm(config, plain)}"),
        *_start(config, model, num_train),
        ("data", f"{config.data.name}: {images}"),
        *_recipe(config),
        ("steps", f"{steps.total_steps:,} = {config.epochs} epochs × {steps.steps_per_epoch}"),
        ("batch", batch),
        ("schedule", f"lr 0 → {config.optim.lr:g} in {steps.warmup_steps:,} steps, cosine → {config.optim.min_lr:g}"
         + (f", layer decay {config.optim.layer_decay:g}" if config.optim.layer_decay < 1 else "")),
        ("seed", f"{config.seed}"),
        *_advice(config, steps),
    ]  # fmt: skip
    places = {name: place for place, (name, _) in enumerate(plain.named_modules())}
    table = [_site_row(site, config.norm.name if site in chosen else "itself")
             for site in sorted([*chosen, *left], key=lambda site: places[site.name])]  # fmt: skip
    return Outline(rows, _SITE_COLUMNS, table)


def _sites(config: RunConfig, plain: nn.Module) -> tuple[list[Site], list[Site]]:
    if config.norm.name == "ln":
        return [], norm_sites(plain)
    return chosen_sites(plain, conversion(config.norm))


def _site_row(site: Site, becomes: str) -> list[str]:
    layout = "channels last" if site.channels_last else "channels first"
    block = "" if site.block is None else str(site.block)
    alpha = "" if site.alpha_init is None else f"{site.alpha_init:g}"
    return [site.name, site.kind, str(site.num_channels), layout, site.role, block, becomes, alpha]


def _norm(config: RunConfig, model: nn.Module, chosen: list[Site], left: list[Site]) -> str:
    """Say how many sites became what, and which norms are still there."""
    kinds = sorted({site.kind for site in (left if config.norm.name == "ln" else chosen)})
    others = norms_left(model)
    if config.norm.name == "ln":
        for kind in kinds:
            others.pop(kind, None)
        text = f"ln: {len(left)} LayerNorm sites kept ({', '.join(kinds) or 'none'})"
    else:
        to = "DyT" if config.norm.name == "dyt" else config.norm.name
        text = f"{config.norm.name}: {len(chosen)} sites converted to {to} ({', '.join(kinds)})"
        alphas = sorted({site.alpha_init for site in chosen if site.alpha_init is not None})
        if alphas:
            text += f", alpha starts at {', '.join(f'{alpha:g}' for alpha in alphas)}"
        options = {
            "num_groups": None,
            "shift_init": None,
            "learn_alpha": True,
            "per_channel_alpha": False,
            "affine": True,
        }
        text += "".join(f", {key}={getattr(config.norm, key)}" for key, usual in options.items()
                        if getattr(config.norm, key, usual) != usual)  # fmt: skip
    return text + "; left alone: " + (", ".join(f"{count} {kind}" for kind, count in others.items()) or "none")


def _recipe(config: RunConfig) -> list[tuple[str, str]]:
    """Say everything of the recipe that is no count."""
    augment, data, optimizer = config.augment, config.data, config.optim
    resized = eval_resize(data)
    crop = "resized, no random crop"
    if augment.scale:
        (smallest, largest), (narrow, wide) = augment.scale, augment.ratio
        crop = f"crop of {smallest:g} to {largest:g} of the area, ratio {narrow:.4g} to {wide:.4g}"
        crop += f", {augment.interpolation}"
    policy = augment.rand_augment or (f"colour jitter {augment.color_jitter:g}" if augment.color_jitter else "none")
    erase = f"{augment.erase_mode} erasing {augment.erase_prob:g}" if augment.erase_prob else "no erasing"
    mixing = (f"mixup {augment.mixup:g}, cutmix {augment.cutmix:g}, probability {augment.mix_prob:g}, switch "
              f"{augment.mix_switch_prob:g}" if augment.mixes else "none")  # fmt: skip
    mean, std = ("/".join(f"{value:g}" for value in values) for values in (data.mean, data.std))
    where = f"resize {resized}, centre crop {data.image_size}" if resized else f"warp to {data.image_size}"
    clip = "no clipping" if optimizer.clip_grad is None else f"gradient norm clipped at {optimizer.clip_grad:g}"
    weights = "raw and EMA" if config.ema.enabled else "raw"
    ema = f"decay {config.ema.decay:g}, from the first step" if config.ema.enabled else "none"
    return [
        ("augment", f"{crop}; flip {augment.hflip:g}; {policy}; {erase}"),
        ("mixing", f"{mixing}; label smoothing {augment.smoothing:g}"),
        ("evaluation", f"{where}, bicubic; mean {mean}, std {std}; {weights} weights"),
        ("optimizer", f"AdamW, betas {optimizer.betas[0]:g} {optimizer.betas[1]:g}, eps {optimizer.eps:g}, weight "
         f"decay {optimizer.weight_decay:g} (not on 1-d parameters: alpha, weight and bias of norms), {clip}"),
        ("EMA", ema),
    ]  # fmt: skip


def _published(config: RunConfig) -> list[tuple[str, str]]:
    page = config.published
    if page is None:
        return []
    top1 = f"top-1 {page.top1:g} %" if page.top1 is not None else "no figure"
    text = f"{page.page}: {top1} ({page.source})" + (f"; {page.note}" if page.note else "")
    if page.differs:
        text += f". This run is not that recipe: {'; '.join(page.differs)}"
    return [("published", text)]


def _start(config: RunConfig, model: nn.Module, num_train: int) -> list[tuple[str, str]]:
    """Say what comes out of the file of weights, having tried it on the meta device."""
    start = load_start(config, model)
    if start is None:
        return []
    text = f"{start.path}{f' ({start.part})' if start.part else ''}: {start.loaded.copied} tensors copied"
    for what, names in (("new", start.loaded.new), ("in the file and not used", start.loaded.unused)):
        if names:
            text += f"; {len(names)} {what}: {', '.join(names[:3])}{', …' if len(names) > 3 else ''}"
    rows = [("start", text)]
    if isinstance(config.norm, PointWiseConfig) and config.norm.calibrate:
        rows.append(("calibrate", f"{', '.join(config.norm.fitted_parts)} of each site fitted to its trained norm, on "
                     f"{min(config.norm.calibrate_images, num_train)} training images"))  # fmt: skip
    if start.alpha_from is not None:
        rows.append(("alpha", f"from the {start.alpha_from}; norm.alpha_init and norm.rules are without effect"))
    return rows


def _other_arm(config: RunConfig, plain: nn.Module) -> str:
    """Say what the other arm of the pair is."""
    if config.norm.name != "ln":
        return f"the twin with norm=ln has {trainable(plain):,} parameters"
    sites = norm_sites(plain)
    if not sites or not all(site.has_twin for site in sites):
        return "no twin with norm=dyt (it has no LayerNorm that can be converted)"
    return f"the twin with norm=dyt has {trainable(plain) + len(sites):,} parameters"


def _advice(config: RunConfig, steps: optim.Plan) -> list[tuple[str, str]]:
    rows = []
    if config.ema.enabled and (memory := 1 / (1 - config.ema.decay)) * 3 > steps.total_steps:
        rows.append(("EMA advice", f"ema.decay={config.ema.decay:g} averages over about {memory:,.0f} steps, and this "
                     f"run has {steps.total_steps:,}: it will lag behind; ema=off, or a smaller decay"))  # fmt: skip
    if config.global_batch != optim.PAPER_BATCH:
        scaled = optim.PAPER_LR * config.global_batch / optim.PAPER_BATCH
        rows.append(("lr rule", f"optim.lr is absolute and does not scale by itself; the paper's {optim.PAPER_LR:g} at "
                     f"{optim.PAPER_BATCH} scaled linearly to {config.global_batch} is {scaled:.3g}"))  # fmt: skip
    if config.precision == "fp32":
        rows.append(("precision", "fp32 with TF32 products on CUDA, as the paper's ImageNet runs; precision=bf16 is "
                     "the faster choice on a GPU"))  # fmt: skip
    else:
        rows.append(("precision", f"{config.precision} autocast, float32 weights"))
    return rows
