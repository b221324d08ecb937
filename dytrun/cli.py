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
from typing import Any

from dytrun import __version__
from dytrun.errors import UserError
from dytrun.usage import COMMANDS, CONF, command_help, usage

DONE, FAILED, WRONG_INPUT, STOPPED = 0, 1, 2, 75

# Flags with which Hydra shows something instead of running.
_SHOW = ("--cfg", "-c", "--info", "-i", "--hydra-help", "--shell-completion", "-sc")
_MULTIRUN = ("--multirun", "-m")


def main() -> int:
    """Run the command line; return the exit code (DESIGN: 0 done, 1 failed, 2 wrong input, 75 stopped)."""
    try:
        return _main(sys.argv[1:])
    except UserError as error:
        for problem in error.problems:
            print(f"dytrun: {problem}", file=sys.stderr)
        return WRONG_INPUT
    except KeyboardInterrupt:
        print("dytrun: stopped", file=sys.stderr)
        return STOPPED


def _main(args: list[str]) -> int:
    if args[:1] in (["--shell-completion"], ["-sc"]):
        return _complete(args)
    if not args or args[0] in ("--help", "-h", "help"):
        print(usage())
        return DONE
    if args[0] in ("--version", "-V"):
        print(f"dytrun {__version__}")
        return DONE
    verb, *rest = args
    if verb not in COMMANDS:
        from dytrun.config import near

        raise UserError(
            f"'{verb}' is no command{near(verb, list(COMMANDS)) or ';'} the commands are {', '.join(COMMANDS)}"
        )
    if "--help" in rest or "-h" in rest:
        print(command_help(verb, _config_dir(rest)))
        return DONE
    if rest and "=" not in rest[0] and not rest[0].startswith("-"):
        if verb == "train":
            raise UserError(f"'{rest[0]}' is no key=value; see dytrun train --help")
        rest[0] = f"dir='{rest[0]}'"
    return {"train": _train, "eval": _eval, "report": _report}[verb](rest)


# ------------------------------------------------------------------------------------------ commands


def _train(args: list[str]) -> int:
    from dytrun import terminal

    if any(arg in _SHOW for arg in args):
        return _hydra("train", args, _no_task)
    args = [_addable(arg) for arg in args]
    configs = list(_expand(args))
    if any(config.dry_run for config in configs):
        # Hydra writes down every sweep that it runs; a dry run touches nothing.
        with tempfile.TemporaryDirectory() as scratch:
            return _hydra("train", [*args, f"hydra.sweep.dir={scratch}"], train_task)
    code = _hydra("train", args, train_task, is_sweep=len(configs) > 1)
    if len(configs) > 1 and code != STOPPED and os.environ.get("RANK", "0") == "0":
        from dytrun import report

        found = report.build(Path(configs[0].runs_dir), "ln", 0.95)
        _show_report(found, report)
        terminal.line(f"{len(configs)} runs asked for; all runs of {configs[0].runs_dir} are in the table")
    return code


def train_task(cfg: Any) -> str:
    """Train one composed configuration; what Hydra's launchers call, here or in a process of their own.

    Returns the run's status.
    """
    from dytrun import launch, terminal

    config = _validated("train", cfg)
    is_first = os.environ.get("RANK", "0") == "0"
    if not config.dry_run and (result := launch.previous(config)) is not None:
        if is_first:
            terminal.line(f"{config.run_dir}: {result.status} already; remove the directory to train it again")
            terminal.result(result)
        return result.status
    rows = launch.plan(config)
    if is_first:
        terminal.pairs("plan (nothing was touched)" if config.dry_run else "plan", rows)
    if config.dry_run:
        return "planned"
    result = launch.train(config)
    if is_first:
        terminal.result(result)
    return result.status


def _eval(args: list[str]) -> int:
    if any(arg in _SHOW for arg in args):
        return _hydra("eval", args, _no_task)
    config = next(_expand(args, "eval"))
    from dytrun import launch, terminal

    found = launch.evaluate(config)
    if found:
        title = f"{config.dir}, {config.checkpoint} checkpoint (step {found['step']:,})"
        terminal.accuracies(title, found["accuracy"])
    return DONE


def _report(args: list[str]) -> int:
    if any(arg in _SHOW for arg in args):
        return _hydra("report", args, _no_task)
    config = next(_expand(args, "report"))
    from dytrun import report

    _show_report(report.build(Path(config.dir), config.baseline, config.confidence), report)
    return DONE


def _show_report(found: Any, report: Any) -> None:
    from dytrun import terminal

    columns, rows = found.table()
    terminal.table(f"runs in {found.directory}", columns, rows, report.notes(found))
    terminal.line(f"{found.directory}/report.html and report.json written")


def _no_task(cfg: Any) -> None:
    """Stand in for a command while Hydra only shows something."""


# ------------------------------------------------------------------------------------------ Hydra


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
    options: dict[str, Any] = {} if hydra.__version__ >= "1.4" else {"version_base": "1.3"}
    sys.argv = ["dytrun", *args]
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
    search = _config_dir(args)
    overrides = [_addable(arg) for arg in args if arg not in flags and arg != search]
    for flag in flags:
        if flag not in _MULTIRUN and not re.match(r"(--config-dir|-cd)\b", flag):
            raise UserError(f"{flag}: no such option; see dytrun {verb} --help")
    if search is not None:
        if not Path(search).is_dir():
            raise UserError(f"--config-dir: {search} is no directory; give one that holds configuration groups")
        overrides.append(f"hydra.searchpath=[file://{Path(search).resolve()}]")
    with _raw_errors(), initialize_config_dir(str(CONF), version_base="1.3"):
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

    from dytrun.config import EvalConfig, ReportConfig, RunConfig, validate

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
    """The model's own arguments are free, so a new one needs no `+`."""
    return f"++{arg}" if re.match(r"model\.kwargs[.=]", arg) else arg


def _raise_composition(error: Exception) -> None:
    """Turn what Hydra says of a command line into one line; raise anything else as it is."""
    from hydra.errors import HydraException, MissingConfigException
    from omegaconf.errors import OmegaConfBaseException

    from dytrun.config import near

    if isinstance(error, MissingConfigException) and error.missing_cfg_file:
        group, _, option = str(error.missing_cfg_file).rpartition("/")
        options = [str(item) for item in error.options or []]
        raise UserError(
            f"{group}={option}: no such option{near(option, options)}; there are {', '.join(options)}"
        ) from None
    if isinstance(error, HydraException | OmegaConfBaseException):
        cause = f" ({str(error.__cause__).splitlines()[0]})" if error.__cause__ else ""
        raise UserError(f"{str(error).splitlines()[0].rstrip('.')}{cause}; see dytrun train --help") from None
    raise error


@contextmanager
def _raw_errors() -> Iterator[None]:
    """While it lasts Hydra raises instead of printing and leaving."""
    before = os.environ.get("HYDRA_FULL_ERROR")
    os.environ["HYDRA_FULL_ERROR"] = "1"
    try:
        yield
    finally:
        os.environ.pop("HYDRA_FULL_ERROR") if before is None else os.environ.update(HYDRA_FULL_ERROR=before)


def _config_dir(args: Sequence[str]) -> str | None:
    for index, arg in enumerate(args):
        name, _, value = arg.partition("=")
        if name in ("--config-dir", "-cd"):
            return value or (args[index + 1] if index + 1 < len(args) else "")
    return None


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
