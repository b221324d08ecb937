"""What --help says, read from conf/ so that it cannot drift from it; what a word of a command line is. No imports."""

from collections.abc import Sequence
from pathlib import Path

_PACKAGE = Path(__file__).resolve().parent
# Inside the package where it is installed, beside it in a checkout.
CONF = _PACKAGE / "conf" if (_PACKAGE / "conf").is_dir() else _PACKAGE.parent / "conf"

COMMANDS = {
    "train": "train one run, or with -m a sweep",
    "eval": "evaluate a run's checkpoint exactly: dytrun eval DIR",
    "replay": "do the step again at which a run diverged, and say where: dytrun replay DIR",
    "bench": "measure speed: one layer, a model, this loop, the loader: dytrun bench=norm",
    "data": "pack a data set into a few files, and verify such a pack: dytrun data pack SRC out=DIR",
    "probe": "say what the norms of a trained model do: dytrun probe DIR",
    "report": "pair the runs of a directory, print the table, write the page: dytrun report [DIR]",
}
# The second word of dytrun data.
DATA = {
    "pack": "class folders, ImageNet's tars or parquet files → a few files to train from: dytrun data pack SRC out=DIR",
    "verify": "read every byte of a pack and say what is damaged: dytrun data verify DIR",
}
EXAMPLES = {
    "train": (
        "dytrun train experiment=quickstart",
        "dytrun train model=vit_b norm=dyt data.root=/data/imagenet",
        "dytrun train -m model=vit_b norm=ln,dyt seed=0,1,2 precision=bf16",
        "dytrun train -m model=vit_b norm=dyt norm.alpha_init=0.1,0.3,0.5,0.8 hydra/launcher=local_pool",
        "dytrun train model=vit_b norm=dyt init_from=ln.safetensors norm.calibrate=true epochs=30",
    ),
    "eval": (
        "dytrun eval runs/NAME",
        "dytrun eval runs/NAME checkpoint=best",
        "dytrun eval runs/NAME data_root=/mnt/imagenet",
        "dytrun eval runs/NAME devices=2",
        "dytrun eval runs/NAME batch_per_rank=256 workers=8",
    ),
    "replay": (
        "dytrun replay runs/NAME",
        "dytrun replay runs/NAME data_root=/mnt/imagenet",
        "dytrun replay runs/NAME devices=2",
        "dytrun replay runs/NAME devices=[0,1]",
        "dytrun replay dir=runs/NAME --cfg job",
    ),
    "bench": (
        "dytrun bench=norm",
        "dytrun bench=norm precision=bf16 bench.shapes=[256x197x768] bench.modes=[eager]",
        "dytrun bench=model model=vit_b precision=bf16 bench.batch=256",
        "dytrun bench=data data.root=/data/imagenet model=vit_b precision=bf16 bench.peer=timm bench.workers=[8,16]",
        "dytrun bench=llama bench.passes=[infer]",
    ),
    "data": (
        "dytrun data pack /data/imagenet out=/fast/imagenet",
        "dytrun data pack /data/imagenet out=/fast/imagenet256 short_side=256 quality=90",
        "dytrun data pack /downloads out=/fast/imagenet val_labels=/downloads/LOC_val_solution.csv",
        "dytrun data pack /data/imagenet-1k out=/fast/imagenet workers=16",
        "dytrun data verify /fast/imagenet",
    ),
    "probe": (
        "dytrun probe runs/NAME",
        "dytrun probe runs/NAME checkpoint=best weights=ema",
        "dytrun probe runs/NAME checkpoint=18720 out=figures-of-epoch-60",
        "dytrun probe runs/NAME batches=16 batch=64 data_root=/mnt/imagenet",
        "dytrun probe runs/NAME wandb=true",
    ),
    "report": (
        "dytrun report",
        "dytrun report runs",
        "dytrun report /shared/runs confidence=0.99",
        "dytrun report baseline=dyt margin=0.1",
        "dytrun report watch=true",
    ),
}


def usage() -> str:
    """Say which commands there are."""
    lines = ["dytrun: what happens to a vision model when its normalization layers become Dynamic Tanh", "",
             "usage: dytrun COMMAND [DIR] key=value …", ""]  # fmt: skip
    lines += [f"  {name:<8} {text}" for name, text in COMMANDS.items()]
    lines += ["", "dytrun COMMAND --help lists the command's keys. To start: dytrun train experiment=quickstart"]
    return "\n".join(lines)


def command_help(verb: str, config_dir: str | None) -> str:
    """Say a command's groups with their options, its keys with their values, and examples; read from conf/."""
    folders = [CONF, *([Path(config_dir)] if config_dir and Path(config_dir).is_dir() else [])]
    main, _, second = verb.partition(" ")
    said = DATA[second] if second else COMMANDS[verb]
    lines = [f"dytrun {verb}: {said}", "", "Examples:", *(f"  {text}" for text in EXAMPLES[main])]
    if verb == "data":
        for word in DATA:
            lines += ["", f"Keys of dytrun data {word}:", *_keys_of(f"data {word}")]
        return "\n".join(lines)
    if verb == "bench":
        lines += ["", "What is measured:", *_benches()]
        lines += ["", "The model, its norm and precision, and the machine: the keys of dytrun train, see its --help."]
    if verb == "train":
        lines += ["", "Groups (group=option):", *_groups(folders)]
        lines += ["", "Launchers (with -m, hydra/launcher=option; without one, one run after the other):"]
        for path in sorted((CONF / "hydra" / "launcher").glob("*.yaml")):
            names = [line.partition(":")[0] for line in path.read_text().splitlines() if line[:1].isalpha()]
            lines += [f"  {path.stem:<10}  {_summary(path)}", f"    keys: hydra.launcher.{{{' '.join(names)}}}"]
    lines += ["", "Keys (key=value, section.key=value):", *_keys_of(verb)]
    sweeps = "-m sweeps over comma-separated values; " if verb == "train" else ""
    lines += ["", f"{sweeps}--cfg job prints the whole configuration;",
              "--config-dir DIR adds groups of your own; dytrun -sc install=bash sets up completion."]  # fmt: skip
    return "\n".join(lines)


def config_name(verb: str) -> str:
    """Return the name of a command's file in conf/."""
    return verb.replace(" ", "_")


def _keys_of(verb: str) -> list[str]:
    """List the keys of a command, with values and comments."""
    text = (CONF / f"{config_name(verb)}.yaml").read_text()
    body = text.partition("hydra_logging: none\n")[2].partition("\nhydra:")[0]
    return [f"  {line}" if line else "" for line in body.strip().splitlines()]


def _keys(group: Path) -> list[str]:
    """Return the dotted keys that the options of a group set."""
    texts = [path.read_text() for path in sorted(group.glob("*.yaml")) if "@package" not in path.read_text()]
    found = (line.partition(":")[0] for text in texts for line in text.splitlines() if line[:1].isalpha())
    found = (key for key in found if key != "defaults")
    return [f"{group.name}.{key}" for key in dict.fromkeys(found)]


def _groups(folders: Sequence[Path]) -> list[str]:
    """List the groups of dytrun train with their options and keys."""
    lines = []
    for folder in folders:
        for group in sorted(path for path in folder.iterdir() if path.is_dir() and path.name not in ("hydra", "bench")):
            lines.append(f"  {group.name}=")
            options = sorted(group.glob("[!_]*.yaml"))
            width = max((len(path.stem) for path in options), default=0)
            lines += [f"    {path.stem:<{width}}  {_summary(path)}" for path in options]
            if group.name != "experiment":
                lines.append(f"    keys: {' '.join(_keys(group))}")
    return lines


def _benches() -> list[str]:
    """List what can be measured, with its keys and values."""
    lines = []
    for path in sorted((CONF / "bench").glob("*.yaml")):
        texts = path.read_text().splitlines()
        keys = [line for line in texts if line[:1].isalpha() and not line.startswith(("name:", "defaults:"))]
        lines += [f"  bench={path.stem}  {_summary(path)}", *(f"    bench.{line}" for line in keys)]
    return lines


def _summary(path: Path) -> str:
    comments = [line[2:] for line in path.read_text().splitlines() if line.startswith("# ") and "@package" not in line]
    return comments[0] if comments else ""


def config_dir_of(args: Sequence[str]) -> str | None:
    """Return the directory that --config-dir names, if it is there."""
    for index, arg in enumerate(args):
        name, _, value = arg.partition("=")
        if name in ("--config-dir", "-cd"):
            return value or (args[index + 1] if index + 1 < len(args) else "")
    return None


def flag_name(arg: str) -> str:
    """Return a flag without its value."""
    return arg.partition("=")[0]


def is_bare(arg: str) -> bool:
    """Say whether an argument is neither a flag nor a key=value."""
    return "=" not in arg and not arg.startswith("-")
