"""What a run would do, said before it does it: the whole recipe, and the table of its sites. Touches nothing."""

from pathlib import Path
from typing import NamedTuple

from torch import nn

from dytrun import machine, optim
from dytrun.arm import build_arm, build_plain, conversion, is_scaled
from dytrun.augment import eval_resize
from dytrun.config import PointWiseConfig, RunConfig, TextConfig
from dytrun.convert import chosen_sites
from dytrun.feed import load
from dytrun.model import blocks_of, check_forward, trainable
from dytrun.sites import Site, norm_sites, norms_left
from dytrun.subject_config import LlamaConfig
from dytrun.text import NUM_BYTES, TextData
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
    is_text = isinstance(config.data, TextConfig)
    known = NUM_BYTES if is_text else config.images.num_classes
    model, _ = build_arm(config, known or 2, device="meta")
    num_train, num_classes, what = _found(config)
    steps = optim.plan_steps(config, num_train, world)
    if known is None:
        model, _ = build_arm(config, num_classes, device="meta")
    if not is_text:
        check_forward(model, config.model.name, num_classes, config.images.image_size)
    if config.machine.compile == "blocks":
        blocks_of(model)
    plain = build_plain(config, num_classes, device="meta")
    chosen, left = _sites(config, plain)
    batch = (f"{config.global_batch} = {world} rank(s) × {steps.accumulation} micro-batch(es) × "
             f"{steps.batch_per_rank}")  # fmt: skip
    rows = [
        ("run", f"{config.run_dir}"),
        *_published(config),
        ("model", f"{config.model.name}: {trainable(model):,} parameters, {_built(config)}"),
        ("norm", _norm(config, model, chosen, left)),
        ("arms", f"pair {config.pair_id}, arm {config.norm.name}; {_other_arm(config, plain, trainable(model))}"),
        *_start(config, model, num_train),
        ("data", f"{config.data.name}: {what}"),
        *(_text_recipe(config) if is_text else _image_recipe(config)),
        *_optimizer(config),
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


def _found(config: RunConfig) -> tuple[int, int, str]:
    """Return how many training images or windows there are, the classes, and both in words."""
    data = config.data
    if config.dry_run and data.name == "imagenet" and not (data.root and Path(data.root).is_dir()):
        # A plan can be made where the data is not: ImageNet's counts are known.
        num_train, num_classes = data.num_train or 0, data.num_classes or 0
        missing = f"data.root={data.root} is not on this machine" if data.root else "data.root is not set"
        return (
            num_train,
            num_classes,
            f"{num_train:,} training images, {num_classes} classes ({missing}: needed to train)",
        )
    found = load(config)
    if isinstance(found, TextData):
        where = config.data.root or "docstrings of Python's standard library"
        return (
            found.train.num,
            found.num_classes,
            (
                f"{where}; {len(found.train.content):,} training and {len(found.val.content):,} validation bytes; "
                f"{found.train.num:,} training windows of {found.train.context} bytes"
            ),
        )
    machine.check_loader(config.machine.loader, data.name, bool(found.train.paths))
    what = f"{found.train.num:,} training and {found.val.num:,} validation images, {found.num_classes} classes"
    return found.train.num, found.num_classes, what + (f"; a pack: {found.pack}" if found.pack else "")


def _built(config: RunConfig) -> str:
    """Say how a model is built."""
    model = config.model
    if isinstance(model, LlamaConfig):
        scale = (
            "a learnable scalar after the embedding"
            if is_scaled(model, config.norm)
            else "no scalar after the embedding"
        )
        return f"width {model.width}, {model.depth} layers, {model.heads} heads, feed-forward {model.hidden}, {scale}"
    drop_path = "the model's own" if model.drop_path is None else f"{model.drop_path:g}"
    return f"{config.images.image_size} px, drop-path {drop_path}" + "".join(
        f", {key}={value}" for key, value in model.kwargs.items()
    )


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


def _text_recipe(config: RunConfig) -> list[tuple[str, str]]:
    weights = "raw and EMA" if config.ema.enabled else "raw"
    return [("evaluation", "every validation byte but the first once, from those before it in its window; mean loss in "
             f"nats a byte; {weights} weights")]  # fmt: skip


def _image_recipe(config: RunConfig) -> list[tuple[str, str]]:
    """Say what happens to images."""
    augment, data = config.augment, config.images
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
    weights = "raw and EMA" if config.ema.enabled else "raw"
    return [
        ("augment", f"{crop}; flip {augment.hflip:g}; {policy}; {erase}"),
        ("mixing", f"{mixing}; label smoothing {augment.smoothing:g}"),
        ("evaluation", f"{where}, bicubic; mean {mean}, std {std}; {weights} weights"),
    ]  # fmt: skip


def _optimizer(config: RunConfig) -> list[tuple[str, str]]:
    optimizer = config.optim
    clip = "no clipping" if optimizer.clip_grad is None else f"gradient norm clipped at {optimizer.clip_grad:g}"
    ema = f"decay {config.ema.decay:g}, from the first step" if config.ema.enabled else "none"
    return [
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


def _other_arm(config: RunConfig, plain: nn.Module, mine: int) -> str:
    """Say what the other arm of the pair is."""
    baseline = "rms" if config.data.name == "text" else "ln"
    if config.norm.name != baseline:
        return f"the twin with norm={baseline} has {trainable(plain):,} parameters"
    if config.norm.name == "rms":
        sites = norm_sites(plain, config.norm.types)
        # Each twin has an alpha, and the embedding its scalar unless it is on, or off, in both.
        scalars = len(sites) + (isinstance(config.model, LlamaConfig) and config.model.embedding_scale == "auto")
        return f"the twin with norm=dyt has {mine + scalars:,} parameters"
    sites = norm_sites(plain)
    if not sites or not all(site.has_twin for site in sites):
        return "no twin with norm=dyt (it has no LayerNorm that can be converted)"
    return f"the twin with norm=dyt has {trainable(plain) + len(sites):,} parameters"


def _advice(config: RunConfig, steps: optim.Plan) -> list[tuple[str, str]]:
    rows = []
    if config.ema.enabled and (memory := 1 / (1 - config.ema.decay)) * 3 > steps.total_steps:
        rows.append(("EMA advice", f"ema.decay={config.ema.decay:g} averages over about {memory:,.0f} steps, and this "
                     f"run has {steps.total_steps:,}: it will lag behind; ema=off, or a smaller decay"))  # fmt: skip
    if config.data.name != "text" and config.global_batch != optim.PAPER_BATCH:
        scaled = optim.PAPER_LR * config.global_batch / optim.PAPER_BATCH
        rows.append(("lr rule", f"optim.lr is absolute and does not scale by itself; the paper's {optim.PAPER_LR:g} at "
                     f"{optim.PAPER_BATCH} scaled linearly to {config.global_batch} is {scaled:.3g}"))  # fmt: skip
    if config.precision == "fp32":
        alike = "" if config.data.name == "text" else ", as the paper's ImageNet runs"
        rows.append(("precision", f"fp32 with TF32 products on CUDA{alike}; precision=bf16 is "
                     "the faster choice on a GPU"))  # fmt: skip
    else:
        rows.append(("precision", f"{config.precision} autocast, float32 weights"))
    return rows
