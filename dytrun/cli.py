"""The only file that knows Hydra: verb, compose, validate, go.

Nothing heavy is imported before a configuration is composed and valid.
"""

import itertools
import os
import re
import sys
import tempfile
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NoReturn

from dytrun import __version__
from dytrun.errors import UserError
from dytrun.usage import COMMANDS, CONF, command_help, config_dir_of, flag_name, is_bare, usage

DONE, FAILED, WRONG_INPUT, STOPPED = 0, 1, 2, 75

# Flags with which Hydra shows something instead of running.
_SHOW = ("--cfg", "-c", "--info", "-i", "--hydra-help", "--shell-completion", "-sc")
_MULTIRUN = ("--multirun", "-m")


def main() -> int:
    """Run the command line; return the exit code: 0 done, 1 failed, 2 wrong input, 75 stopped."""
    try:
        return _main(sys.argv[1:])
    except UserError as error:
        for problem in error.problems:
            print(f"dytrun: {problem}", file=sys.stderr)
        return WRONG_INPUT
    except BrokenPipeError:  # dytrun … | head
        sys.stdout = None
        return DONE
    except KeyboardInterrupt:
        print("dytrun: stopped", file=sys.stderr)
        return STOPPED


def _main(args: list[str]) -> int:
    if args[:1] in (["--shell-completion"], ["-sc"]):
        return _complete(args) if any(arg.startswith("query=") for arg in args) else _hydra("train", args, _no_task)
    if not args or args[0] in ("--help", "-h", "help"):
        print(usage())
        return DONE
    if args[0] in ("--version", "-V"):
        print(f"dytrun {__version__}")
        return DONE
    verb, *rest = args
    if verb not in COMMANDS:
        from dytrun.validation import near

        raise UserError(
            f"'{verb}' is no command{near(verb, list(COMMANDS)) or ';'} the commands are {', '.join(COMMANDS)}"
        )
    if "--help" in rest or "-h" in rest:
        print(command_help(verb, config_dir_of(rest)))
        return DONE
    if rest and "=" not in rest[0] and not rest[0].startswith("-"):
        if verb == "train":
            raise UserError(f"'{rest[0]}' is no key=value; see dytrun train --help")
        rest[0] = "dir='{}'".format(rest[0].replace("\\", "\\\\").replace("'", "\\'"))
    if len(rest) > 1 and verb != "train" and (extra := [arg for arg in rest[1:] if arg in _MULTIRUN or is_bare(arg)]):
        raise UserError(f"{extra[0]}: dytrun {verb} takes one directory and key=value, and does not sweep")
    return {"train": _train, "eval": _eval, "report": _report}[verb](rest)


def _train(args: list[str]) -> int:
    if any(flag_name(arg) in _SHOW for arg in args):
        return _hydra("train", [arg for arg in args if arg not in _MULTIRUN], _no_task)
    configs = list(_expand(args))
    names = {config.run_name for config in configs}  # of every job, so that a missing init_from stops all of them
    if len(configs) > 1 and "RANK" in os.environ:
        raise UserError("-m: several runs under one torchrun cannot be told apart; leave torchrun out, dytrun starts "
                        "its own ranks, or start one torchrun a run")  # fmt: skip
    from dytrun import commands

    args = [_addable(arg) for arg in args]
    # Hydra writes every sweep down; a run's identity is its science, so nobody needs that.
    with tempfile.TemporaryDirectory() as scratch:
        code = _hydra("train", [f"hydra.sweep.dir={scratch}", *args], train_task, is_sweep=len(configs) > 1)
    if len(configs) > 1 and code != STOPPED and not configs[0].dry_run:
        commands.close_sweep(Path(configs[0].runs_dir), len(names))
    return code


def train_task(cfg: Any) -> str:
    """Train one composed configuration and return its status; what Hydra's launchers call."""
    from dytrun import commands

    config = _validated("train", cfg)
    return commands.train(config, config.published and _page(cfg, config.published.page))


def _page(cfg: Any, name: str) -> Any:
    """Return what an experiment's page says by itself, at the place in its own sweep where this job stands."""
    from hydra import compose
    from omegaconf import OmegaConf

    try:
        page = compose("train", [f"experiment={name}"], return_hydra_config=True)
    except Exception as error:
        _raise_composition(error)
    for key in page.hydra.sweeper.params or {}:
        OmegaConf.update(page, key, OmegaConf.select(cfg, key), merge=False, force_add=True)
    return _validated("train", page)


def _eval(args: list[str]) -> int:
    if any(flag_name(arg) in _SHOW for arg in args):
        return _hydra("eval", args, _no_task)
    config = next(_expand(args, "eval"))
    from dytrun import commands

    commands.evaluate(config)
    return DONE


def _report(args: list[str]) -> int:
    if any(flag_name(arg) in _SHOW for arg in args):
        return _hydra("report", args, _no_task)
    config = next(_expand(args, "report"))
    from dytrun import commands

    commands.show_report(Path(config.dir), config.baseline, config.confidence)
    return DONE


def _no_task(cfg: Any) -> None:
    """Stand in for a command while Hydra only shows something."""


def _hydra(verb: str, args: list[str], task: Callable[[Any], Any], is_sweep: bool = False) -> int:
    """Give the rest to Hydra and turn what its jobs came to into an exit code."""
    import hydra
    from hydra.core.global_hydra import GlobalHydra

    statuses: list[str] = []
    failures: list[Exception] = []

    def recorded(cfg: Any) -> None:
        # A job never raises: the ones after it go on, and Hydra prints nothing of its own.
        if any(type(error).__name__ == "Stopped" for error in failures):
            return
        try:
            statuses.append(str(task(cfg)))
        except Exception as error:
            failures.append(error)

    GlobalHydra.instance().clear()
    options = _version_base()
    # Hydra's parser wants the overrides in one piece; what a flag takes has no '='.
    overrides = [arg for arg in args if arg.startswith("~") or ("=" in arg and not arg.startswith("-"))]
    sys.argv = ["dytrun", *overrides, *(arg for arg in args if arg not in overrides)]
    try:
        with _raw_errors():
            hydra.main(config_path=str(CONF), config_name=verb, **options)(recorded)()
    except Exception as error:
        _raise_composition(error)
    if not failures:
        return FAILED if not is_sweep and statuses == ["diverged"] else DONE
    return _failed(failures, len(statuses))


def _failed(failures: list[Exception], num_done: int) -> int:
    """Print what went wrong, a bug with its traceback, and return the exit code."""
    kinds = {type(error).__name__ for error in failures}
    for error in failures:
        if type(error).__name__ not in ("UserError", "Failed", "Stopped"):
            traceback.print_exception(error)
        for line in getattr(error, "problems", (str(error),)):
            print(f"dytrun: {line}", file=sys.stderr)
    if "Stopped" in kinds:
        print("dytrun: type the command again to go on from the last checkpoint", file=sys.stderr)
        return STOPPED
    if len(failures) + num_done > 1:
        print(f"dytrun: {len(failures)} of {len(failures) + num_done} runs failed", file=sys.stderr)
    return WRONG_INPUT if kinds == {"UserError"} else FAILED


def _expand(args: Sequence[str], verb: str = "train") -> Iterator[Any]:
    """Yield the typed configuration of every run that a command line stands for.

    All of them are validated before the first run starts.

    Raises:
        UserError: all that is wrong with the first wrong one.
    """
    from hydra import compose, initialize_config_dir
    from hydra._internal.core_plugins.basic_sweeper import BasicSweeper
    from hydra.core.override_parser.overrides_parser import OverridesParser

    flags = [arg for arg in args if arg.startswith("-")]
    search = config_dir_of(args)
    overrides = [_addable(arg) for arg in args if arg not in flags and arg != search]
    for flag in flags:
        if flag not in _MULTIRUN and not re.match(r"(--config-dir|-cd)\b", flag):
            raise UserError(f"{flag}: no such option; see dytrun {verb} --help")
    if search is not None:
        if not Path(search).is_dir():
            raise UserError(f"--config-dir: {search} is no directory; give one that holds configuration groups")
        overrides.append(f"hydra.searchpath=[file://{Path(search).resolve()}]")
    with _raw_errors(), initialize_config_dir(str(CONF), **_version_base()):
        try:
            parse = OverridesParser.create().parse_overrides
            first = _composed(compose, verb, [one[0] for one in _sweep(BasicSweeper, parse, overrides, [])])
            is_sweep = any(flag in _MULTIRUN for flag in flags) or str(first.hydra.mode).endswith("MULTIRUN")
            if not is_sweep:
                _refuse_sweep(parse, overrides)
            params = (
                [f"{key}={value}" for key, value in (first.hydra.sweeper.get("params") or {}).items()]
                if is_sweep
                else []
            )
            for job in itertools.product(*_sweep(BasicSweeper, parse, overrides, params)):
                yield _validated(verb, _composed(compose, verb, list(job)))
        except Exception as error:
            if isinstance(error, UserError):
                raise
            _raise_composition(error)


def _sweep(sweeper: Any, parse: Any, overrides: list[str], params: list[str]) -> list[list[str]]:
    """Return, for each key, the `key=value` of each of its values; as Hydra's basic sweeper, later keys win."""
    by_key: dict[str, list[str]] = {}
    for override in parse([*params, *overrides]):
        if not override.key_or_group:
            raise UserError(f"{override.input_line}: no key before the '='; say key=value")
        batches = sweeper.split_arguments([override], None)
        by_key[override.get_key_element()] = [job[0] for batch in batches for job in batch]
    return list(by_key.values())


def _refuse_sweep(parse: Any, overrides: list[str]) -> None:
    for text, override in zip(overrides, parse(overrides), strict=True):
        if override.is_sweep_override():
            raise UserError(f"{text}: several values need a sweep; add -m")


def _composed(compose: Any, verb: str, overrides: list[str]) -> Any:
    """Compose; a key that Hydra does not know is added, so that validation can name all of them at once."""
    from hydra.errors import ConfigCompositionException

    for _ in overrides:
        try:
            return compose(config_name=verb, overrides=overrides, return_hydra_config=True)
        except ConfigCompositionException as error:
            unknown = re.search(r"Could not override '([^']+)'", str(error))
            index = next((i for i, text in enumerate(overrides) if unknown and text.startswith(f"{unknown[1]}=")), None)
            if index is None:
                raise
            overrides = [f"++{text}" if i == index else text for i, text in enumerate(overrides)]
    return compose(config_name=verb, overrides=overrides, return_hydra_config=True)


def _validated(verb: str, cfg: Any) -> Any:
    """Turn Hydra's configuration into ours; nothing past this line knows Hydra or OmegaConf."""
    from omegaconf import OmegaConf, open_dict
    from omegaconf.errors import OmegaConfBaseException

    from dytrun.config import EvalConfig, ReportConfig, RunConfig
    from dytrun.validation import validate

    with open_dict(cfg):
        cfg.pop("hydra", None)
        cfg.pop("experiment", None)
    missing = sorted(OmegaConf.missing_keys(cfg))
    if missing:
        raise UserError(*(f"{key}: a value is needed; say {key}=…" for key in missing))
    try:
        values: Any = OmegaConf.to_container(cfg, resolve=True)
    except OmegaConfBaseException as error:
        raise UserError(f"{error.full_key}: {str(error).splitlines()[0]}") from None
    if verb == "eval" and values.get("dir") is None:
        raise UserError("dir: which run? say dytrun eval DIR")
    return validate({"train": RunConfig, "eval": EvalConfig, "report": ReportConfig}[verb], values)


def _addable(arg: str) -> str:
    """Let a key be new without a `+`: the model's own arguments are free, and what a norm takes depends on the norm.

    Validation names those that a norm does not take.
    """
    if arg.startswith("norm.name="):
        raise UserError(f"{arg}: an option brings its own settings; say norm={arg.partition('=')[2]}")
    return f"++{arg}" if re.match(r"model\.kwargs[.=]|norm\.\w", arg) else arg


def _raise_composition(error: Exception) -> NoReturn:
    """Turn what Hydra says of a command line into one line; raise anything else as it is."""
    from hydra.errors import HydraException, MissingConfigException
    from omegaconf.errors import OmegaConfBaseException

    from dytrun.validation import near

    if isinstance(error, MissingConfigException) and error.missing_cfg_file:
        group, _, option = str(error.missing_cfg_file).rpartition("/")
        options = [str(item) for item in error.options or [] if not str(item).startswith("_")]
        raise UserError(
            f"{group}={option}: no such option{near(option, options)}; there are {', '.join(options)}"
        ) from None
    if isinstance(error, HydraException | OmegaConfBaseException):
        cause = f" ({str(error.__cause__).splitlines()[0]})" if error.__cause__ else ""
        raise UserError(f"{str(error).splitlines()[0].rstrip('.')}{cause}; see dytrun train --help") from None
    raise error


def _version_base() -> dict[str, Any]:
    """Return the argument that Hydra 1.3 needs and 1.4 warns of."""
    import hydra

    return {"version_base": "1.3"} if hydra.__version__.startswith("1.3") else {}


@contextmanager
def _raw_errors() -> Iterator[None]:
    """While it lasts Hydra raises instead of printing and leaving."""
    before = os.environ.get("HYDRA_FULL_ERROR")
    os.environ["HYDRA_FULL_ERROR"] = "1"
    try:
        yield
    finally:
        os.environ.pop("HYDRA_FULL_ERROR") if before is None else os.environ.update(HYDRA_FULL_ERROR=before)


def _complete(args: list[str]) -> int:
    """Complete a shell's line: the command first, then what Hydra knows of that command."""
    line = os.environ.get("COMP_LINE", "")
    words = line.split()
    if len(words) < 2 or (len(words) == 2 and not line.endswith(" ")):
        print(" ".join(COMMANDS))
        return DONE
    verb = words[1]
    if verb in COMMANDS:
        os.environ["COMP_LINE"] = line.replace(f" {verb}", "", 1)
        os.environ["COMP_POINT"] = str(len(os.environ["COMP_LINE"]))
        return _hydra(verb, args, _no_task)
    return DONE
