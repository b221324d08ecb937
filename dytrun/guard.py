"""What no command line and no configuration may hold: keys and passwords, names of things to build, boundless text.

Whatever is said on a command line or in a configuration is written down: in config.json, in Hydra's and submitit's
files, in W&B's. A key has no place there, so a command line with one is refused before anything else is done.
"""

import os
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from dytrun.errors import UserError

# Hydra's grammar takes four seconds a million characters.
_MOST_CHARS = 10_000
_MOST_FILE_CHARS, _MOST_NODES, _MOST_REFERENCES = 65_536, 10_000, 20
_MOST_SAID = 1_000

# Words that name a secret; as parts of a name, so that `monkey` is none.
_NAMED = re.compile(r"(?<![a-z])(api_?key|key|token|secret|passw(or)?d?|passphrase)s?(?![a-z])", re.IGNORECASE)
# A model has key_dim and reg_tokens, and a site may be called so: among those only what can be nothing else.
_NAMED_AMONG_FREE = re.compile(r"((api|access|auth|hf|hub|wandb)_?(key|token)|secret|passw)s?(?![a-z])", re.IGNORECASE)
_FREE = re.compile(r"(model\.kwargs|norm)\b")
# W&B's old, new and newest keys, and Hugging Face's; not a part of a path, as the hub's cache is full of 40 digits.
_KEY = re.compile(
    r"(?<![\w/.-])([0-9a-f]{40}|[0-9a-f]{86}|wandb_v\d+_\w{8,}|hf_[a-z0-9]{16,})(?![\w/.-])", re.IGNORECASE
)
# NAME=value, as in a line of shell; a value that the shell has yet to look up is none.
_ASSIGNED = re.compile(rf"\w*{_NAMED.pattern}\w*=[\"']?(?![\"'$\s])\S", re.IGNORECASE)
_SECRET_VARIABLE = re.compile("KEY|TOKEN|SECRET|PASSW", re.IGNORECASE)
_LEAST_SECRET = 8

_BUILDS = re.compile(r"(?<![A-Za-z0-9])_(target|partial|args|convert|recursive)_(?![A-Za-z0-9])")
_KEEP_OUT = "keys and passwords come from the environment alone: set WANDB_API_KEY there, or run wandb login"
_NO_HUB = "dytrun fetches nothing from a hub; say an architecture's name, and give weights with init_from=FILE"
# What timm.create_model takes besides the model's own arguments, all of it to find weights.
_FETCHING = ("pretrained", "pretrained_cfg", "pretrained_cfg_overlay", "checkpoint_path", "cache_dir")


def check_arguments(args: Sequence[str]) -> None:
    """Refuse a command line that holds a secret, builds something by its name, or is too long to be read.

    Raises:
        UserError: all that is refused, without its value.
    """
    problems = []
    for arg in args:
        name, has_value, value = arg.lstrip("+~-").partition("=")
        label = name if has_value and not _holds_key(name) and len(name) < 100 else "an argument"
        if len(arg) > _MOST_CHARS:
            problems.append(f"{label}: {len(arg):,} characters are too many; {_MOST_CHARS:,} are read")
        elif "\0" in arg:
            problems.append(f"{label}: it holds a zero byte; leave it out")
        elif held := (has_value and _names_secret(name, value)) or _holds_key(arg) or _sets_secret(value):
            problems.append(f"{label}: {held}; {_KEEP_OUT}")
        elif built := _BUILDS.search(arg):
            where = name if built[0] in name else f"{name}.{built[0]}"
            problems.append(f"{where}: {built[0]} is refused; nothing is built from a name in a configuration")
    if problems:
        raise UserError(*problems)


def check_values(values: Any, prefix: str = "") -> None:
    """Refuse a composed configuration that holds a secret or boundless text, or would fetch weights.

    Args:
        values: plain and resolved.
        prefix: dotted path of `values` in the configuration.

    Raises:
        UserError: all that is refused, without its value where that is a secret.
    """
    problems = []
    for path, text in _texts(values, prefix):
        if held := _holds_key(text) or _sets_secret(text):
            problems.append(f"{path}: {held}; {_KEEP_OUT}")
        elif len(text) > _MOST_CHARS:
            problems.append(f"{path}: {len(text):,} characters are too many; {_MOST_CHARS:,} are read")
        elif re.match(r"(data\.root|init_from|init_part|model\.kwargs)\b", path) and not text.isprintable():
            problems.append(f"{path}: {text!r} holds a line break or another character that cannot be printed")
    kwargs = (values.get("model") or {}).get("kwargs") if isinstance(values, Mapping) and not prefix else None
    if isinstance(kwargs, Mapping):
        problems += [f"model.kwargs.{name}: {_NO_HUB}" for name in _FETCHING if name in kwargs]
    if problems:
        raise UserError(*problems)


def check_yaml(text: str, path: str) -> None:
    """Refuse a file of a user's configuration that is too large, or becomes so when its aliases are followed.

    Raises:
        UserError: it is, or it is no YAML.
    """
    import yaml

    if len(text) > _MOST_FILE_CHARS:
        raise UserError(f"{path}: {len(text):,} characters are too many for a configuration; {_MOST_FILE_CHARS:,} "
                        "are read")  # fmt: skip
    if (count := text.count("${")) > _MOST_REFERENCES:
        raise UserError(f"{path}: {count} references are too many; {_MOST_REFERENCES} are followed")
    sizes: dict[int, float] = {}

    def size(node: yaml.Node | None) -> float:
        """Count the nodes below one, each alias in full; one that holds itself has no end."""
        if id(node) not in sizes:
            sizes[id(node)] = float("inf")
            inner = node.value if isinstance(node, yaml.CollectionNode) else []
            parts = [part for item in inner for part in (item if isinstance(item, tuple) else (item,))]
            sizes[id(node)] = 1.0 + sum(map(size, parts))
        return sizes[id(node)]

    try:
        if size(yaml.compose(text, Loader=yaml.SafeLoader)) > _MOST_NODES:
            raise UserError(f"{path}: its aliases stand for more than {_MOST_NODES:,} values; write out what is needed")
    except yaml.YAMLError as error:
        raise UserError(f"{path}: is no YAML ({' '.join(str(error).split())}); mend it") from None
    except RecursionError:
        raise UserError(f"{path}: is nested too deeply; write it flatter") from None


def hub_problem(name: Any) -> str | None:
    """Return what is wrong with a model's name if it is that of a place to fetch from, else None."""
    if isinstance(name, str) and re.match(r"[\w-]*[:/]", name):
        return f"model.name: {name[:100]!r} is no architecture; {_NO_HUB}"
    return None


def printable(text: str) -> str:
    """Return a message as one line, with the secrets of the environment struck out."""
    for name, value in _secrets().items():
        text = text.replace(value, f"<{name}>")
    text = "".join(mark if mark.isprintable() else repr(mark)[1:-1] for mark in text[: _MOST_SAID + 1])
    return text if len(text) <= _MOST_SAID else f"{text[:_MOST_SAID]}…"


def struck(text: str) -> str:
    """Return a text of several lines with the secrets of the environment struck out."""
    return "\n".join(printable(line) for line in text.splitlines())


def build_names(values: Any, path: str) -> Iterator[tuple[str, str, str]]:
    """Yield (dotted path, key, value) of all that tells Hydra to build something."""
    for key, value in _items(values):
        here = f"{path}.{key}"
        if _BUILDS.fullmatch(str(key)):
            yield here, str(key), str(value)
        yield from build_names(value, here)


def _names_secret(key: str, value: str) -> str:
    """Say whether a key, or one of a mapping that is its value, is called like a secret; nothing if not."""
    pattern = _NAMED_AMONG_FREE if _FREE.match(key) else _NAMED
    inner = re.findall(r"[{,]\s*[\"']?([\w.-]+)[\"']?\s*:", value)
    return "it is called like a secret" if any(pattern.search(name) for name in (key, *inner)) else ""


def _holds_key(text: str) -> str:
    """Say what is secret in a text; nothing if nothing is."""
    for name, value in _secrets().items():
        if value in text:
            return f"it holds the value of the environment's {name}"
    return "it holds what looks like a key" if _KEY.search(text) else ""


def _sets_secret(text: str) -> str:
    """Say that a text is a line of shell which sets a secret; nothing if it is not."""
    return "it sets what is called like a secret" if _ASSIGNED.search(text) else ""


def _secrets() -> dict[str, str]:
    """Return the variables of the environment that are called like secrets; a path to one is none."""
    return {
        name: value
        for name, value in os.environ.items()
        if _SECRET_VARIABLE.search(name)
        and len(value) >= _LEAST_SECRET
        and not (value.startswith("/") and os.path.exists(value))
    }


def _texts(values: Any, path: str) -> Iterator[tuple[str, str]]:
    """Yield (dotted path, text) of every text, names of keys included."""
    if isinstance(values, str):
        yield path, values
    for key, value in _items(values):
        here = f"{path}.{key}" if path else str(key)
        if isinstance(key, str):
            yield path or "a key", key
        yield from _texts(value, here)


def _items(values: Any) -> list[tuple[Any, Any]]:
    if isinstance(values, Mapping):
        return list(values.items())
    return list(enumerate(values)) if isinstance(values, list | tuple) else []
