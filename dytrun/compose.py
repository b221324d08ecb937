"""Hydra's half of the command line: overrides → composed → typed configurations.

Every run of a sweep is composed and validated before the first one starts; nothing behind this file knows Hydra or
OmegaConf, but for the launchers.
"""

import functools
import itertools
import os
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

from dytrun import guard
from dytrun.errors import UserError
from dytrun.usage import CONF, config_dir_of, config_name

MULTIRUN = ("--multirun", "-m")
# What a command cannot do without, and what is said where it is missing.
_NEEDED = {
    "eval": {"dir": "dir: which run? say dytrun eval DIR"},
    "replay": {"dir": "dir: which run? say dytrun replay DIR"},
    "probe": {"dir": "dir: which run? say dytrun probe DIR"},
    "data pack": {"source": "source: pack what? say dytrun data pack SRC out=DIR", "out": "out: where to? say out=DIR"},
    "data verify": {"dir": "dir: which pack? say dytrun data verify DIR"},
}


@dataclass(frozen=True)
class Expanded:
    """What a command line stands for."""

    configs: list[Any]
    """The typed configuration of every run; of the first alone, where the sweeper chooses values as it goes."""
    is_sweep: bool
    is_open: bool
    """Whether the sweeper chooses values as it goes."""
    launcher: dict[str, Any]
    """The settings of hydra.launcher; `_target_` names it."""


def expand(args: Sequence[str], verb: str = "train") -> Expanded:
    """Compose and validate every run that a command line stands for.

    Raises:
        UserError: all that is wrong with the first wrong one.
    """
    from hydra import compose, initialize_config_dir
    from hydra._internal.core_plugins.basic_sweeper import BasicSweeper
    from hydra.core.override_parser.overrides_parser import OverridesParser

    guard.check_arguments(args)
    flags = [arg for arg in args if arg.startswith("-")]
    search = config_dir_of(args)
    overrides = [addable(arg) for arg in args if arg not in flags and arg != search]
    for flag in flags:
        if flag not in MULTIRUN and not re.match(r"(--config-dir|-cd)\b", flag):
            raise UserError(f"{flag}: no such option; see dytrun {verb} --help")
    overrides += _searchpath(search)
    with raw_errors(), initialize_config_dir(str(CONF), **version_base()):
        try:
            parse = OverridesParser.create().parse_overrides
            parsed = parse(overrides)
            _check_keys(parsed)
            first = _composed(compose, verb, [values[0] for _, values in _values(BasicSweeper, parsed)])
            is_sweep = any(flag in MULTIRUN for flag in flags) or str(first.hydra.mode).endswith("MULTIRUN")
            is_open = is_sweep and not str(first.hydra.sweeper._target_).endswith(".BasicSweeper")
            jobs: Any = [[values[0] for _, values in _values(BasicSweeper, parsed)]]
            if is_sweep and not is_open:
                params = [f"{key}={value}" for key, value in (first.hydra.sweeper.get("params") or {}).items()]
                jobs = itertools.product(*dict(_values(BasicSweeper, [*parse(params), *parsed])).values())
            if not is_open:
                _refuse_sweeps(overrides, parsed, is_sweep)
            configs = [validated(verb, _composed(compose, verb, list(job))) for job in jobs]
            return Expanded(configs, is_sweep, is_open, plain(first.hydra.launcher))
        except Exception as error:
            raise_composition(error)


def check_shown(args: Sequence[str], verb: str) -> None:
    """Refuse what Hydra would be asked to show as if it were to be run.

    Raises:
        UserError: it holds what no configuration may.
    """
    from hydra import compose, initialize_config_dir
    from hydra._internal.core_plugins.basic_sweeper import BasicSweeper
    from hydra.core.override_parser.overrides_parser import OverridesParser

    guard.check_arguments(args)
    overrides = [*map(addable, overrides_of(args)), *_searchpath(config_dir_of(args))]
    with raw_errors(), initialize_config_dir(str(CONF), **version_base()):
        try:
            parsed = OverridesParser.create().parse_overrides(overrides)
            _check_keys(parsed)
            cfg = _composed(compose, verb, [values[0] for _, values in _values(BasicSweeper, parsed)])
            guard.check_values(plain(_without_hydra(cfg)))
        except Exception as error:
            raise_composition(error)


def overrides_of(args: Sequence[str]) -> list[str]:
    """Return the arguments that are overrides; what a flag takes has no '='."""
    return [arg for arg in args if arg.startswith("~") or ("=" in arg and not arg.startswith("-"))]


def page_of(cfg: Any, name: str, config_dir: str | None) -> Any:
    """Return what an experiment's page says by itself, at the place in its own sweep where the job `cfg` stands."""
    from hydra import compose, initialize_config_dir
    from hydra.core.global_hydra import GlobalHydra
    from omegaconf import OmegaConf

    around, GlobalHydra.instance().hydra = GlobalHydra.instance().hydra, None  # that of the command line, if here
    try:
        with initialize_config_dir(str(CONF), **version_base()):
            page = compose("train", [f"experiment={name}", *_searchpath(config_dir)], return_hydra_config=True)
    except Exception as error:
        raise_composition(error)
    finally:
        GlobalHydra.instance().hydra = around
    for key in page.hydra.sweeper.params or {}:
        OmegaConf.update(page, key, OmegaConf.select(cfg, key), merge=False, force_add=True)
    return validated("train", page)


def validated(verb: str, cfg: Any) -> Any:
    """Turn Hydra's configuration of a command into ours."""
    from omegaconf import OmegaConf

    from dytrun.config import EvalConfig, ProbeConfig, ReplayConfig, ReportConfig, RunConfig
    from dytrun.pack_config import PackConfig, VerifyConfig
    from dytrun.validation import validate

    cfg = _without_hydra(cfg)
    missing = sorted(OmegaConf.missing_keys(cfg))
    if missing:
        raise UserError(*(f"{key}: a value is needed; say {key}=…" for key in missing))
    values = plain(cfg)
    guard.check_values(values)
    if verb in _NEEDED and (lacking := [said for key, said in _NEEDED[verb].items() if values.get(key) is None]):
        raise UserError(*lacking)
    if verb == "bench":
        return _bench(values)
    types = {"train": RunConfig, "eval": EvalConfig, "replay": ReplayConfig, "report": ReportConfig,
             "probe": ProbeConfig, "data pack": PackConfig, "data verify": VerifyConfig}  # fmt: skip
    return validate(types[verb], values)


def _bench(values: dict[str, Any]) -> Any:
    """Validate what `dytrun bench` is told: its own group, and the configuration of a run."""
    from dytrun.bench_config import BenchConfig, BenchOptions
    from dytrun.config import RunConfig
    from dytrun.validation import validate

    found, problems = [], []
    for schema, part in ((BenchOptions, {"bench": values.pop("bench", {})}), (RunConfig, values)):
        try:
            found.append(validate(schema, part))
        except UserError as error:
            problems += error.problems
    if not problems and found[1].data.name == "text":
        problems.append("bench: times models of images and their loaders; for a language model's blocks say "
                        "bench=llama without model and data")  # fmt: skip
    if problems:
        raise UserError(*problems)
    return BenchConfig(found[0].bench, found[1])


def _without_hydra(cfg: Any) -> Any:
    from omegaconf import open_dict

    cfg = cfg.copy()
    with open_dict(cfg):
        cfg.pop("hydra", None)
        cfg.pop("experiment", None)
    return cfg


def plain(cfg: Any) -> Any:
    """Turn a piece of Hydra's configuration into plain Python values."""
    from omegaconf import OmegaConf
    from omegaconf.errors import OmegaConfBaseException

    try:
        return OmegaConf.to_container(cfg, resolve=True)
    except OmegaConfBaseException as error:
        raise UserError(f"{error.full_key}: {str(error).splitlines()[0]}") from None


def quoted(text: object) -> str:
    """Quote a path for Hydra's grammar, in which commas, brackets and the like mean something."""
    escaped = str(text).replace("\\", "\\\\").replace("'", "\\'").replace("${", "\\${")
    return f"'{escaped}'"


def addable(arg: str) -> str:
    """Let a key be new without a `+`: the model's own arguments are free, and what a norm takes depends on the norm.

    Validation names those that a norm does not take.
    """
    if arg.startswith("norm.name="):
        raise UserError(f"{arg}: an option brings its own settings; say norm={arg.partition('=')[2]}")
    return f"++{arg}" if re.match(r"model\.kwargs[.=]|norm\.\w", arg) else arg


def raise_composition(error: Exception) -> NoReturn:
    """Turn what Hydra says of a command line into one line; raise anything else as it is."""
    from hydra.errors import HydraException, MissingConfigException
    from omegaconf.errors import OmegaConfBaseException

    from dytrun.validation import near

    if isinstance(error, RecursionError):
        raise UserError("the command line is nested too deeply to be read; write it flatter") from None
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


def version_base() -> dict[str, Any]:
    """Return the argument that Hydra 1.3 needs and 1.4 warns of."""
    import hydra

    return {"version_base": "1.3"} if hydra.__version__.startswith("1.3") else {}


@contextmanager
def raw_errors() -> Iterator[None]:
    """While it lasts Hydra raises instead of printing and leaving."""
    before = os.environ.get("HYDRA_FULL_ERROR")
    os.environ["HYDRA_FULL_ERROR"] = "1"
    try:
        yield
    finally:
        os.environ.pop("HYDRA_FULL_ERROR") if before is None else os.environ.update(HYDRA_FULL_ERROR=before)


def _searchpath(config_dir: str | None) -> list[str]:
    if config_dir is None:
        return []
    if not Path(config_dir).is_dir():
        raise UserError(f"--config-dir: {config_dir} is no directory; give one that holds configuration groups")
    _know_checked_files()
    return [f"hydra.searchpath=[{quoted(f'checked://{Path(config_dir).resolve()}')}]"]


def _know_checked_files() -> None:
    """Let Hydra read a user's own files as its others, and look at each before it does."""
    from hydra._internal.core_plugins.file_config_source import FileConfigSource
    from hydra._internal.sources_registry import SourcesRegistry
    from hydra.plugins.config_source import ConfigResult

    class CheckedFiles(FileConfigSource):
        @staticmethod
        def scheme() -> str:
            return "checked"

        def load_config(self, config_path: str) -> ConfigResult:
            path = Path(self.path) / self._normalize_file_name(config_path)
            if path.is_file():
                guard.check_yaml(path.read_text(encoding="utf-8", errors="replace"), str(path))
            return super().load_config(config_path)

    SourcesRegistry.instance().register(CheckedFiles)


def _values(sweeper: Any, parsed: Sequence[Any]) -> list[tuple[str, list[str]]]:
    """Return each override's key, and the `key=value` of each of its values.

    Of a key that is there twice Hydra's basic sweeper takes the later one; in one run it merges what both hold, if that
    is a mapping. A range without steps has no values that could be listed, and is left out.
    """
    found: list[tuple[str, list[str]]] = []
    for override in parsed:
        if not override.key_or_group:
            raise UserError(f"{override.input_line}: no key before the '='; say key=value")
        if override.is_sweep_override() and not override.is_discrete_sweep():
            continue
        batches = sweeper.split_arguments([override], None)
        found.append((override.get_key_element(), [job[0] for batch in batches for job in batch]))
    return found


def _refuse_sweeps(overrides: list[str], parsed: Sequence[Any], is_sweep: bool) -> None:
    """Refuse several values without a sweep, and in a sweep over listed values a range that lists none."""
    for text, override in zip(overrides, parsed, strict=True):
        if override.is_sweep_override() and not is_sweep:
            raise UserError(f"{text}: several values need a sweep; add -m")
        if override.is_sweep_override() and not override.is_discrete_sweep():
            raise UserError(f"{text}: a range without steps needs a sweeper that searches; list values, or install one")


def _check_keys(parsed: Sequence[Any]) -> None:
    """Refuse what would be gone from the composed configuration before it is looked at."""
    for override in parsed:
        if str(override.key_or_group).startswith("hydra.searchpath") and "checked://" not in override.input_line:
            raise UserError("hydra.searchpath: say --config-dir DIR instead")


def _composed(compose: Any, verb: str, overrides: list[str]) -> Any:
    """Compose, and look at what came out before anyone else does."""
    from dytrun import hydra_settings

    cfg = _loose(compose, verb, overrides)
    parts = {part: plain(cfg.hydra[part]) for part in ("launcher", "sweeper")}
    hydra_settings.check(cfg.hydra, _hydra_of_conf(compose, verb), parts)
    return cfg


@functools.cache
def _hydra_of_conf(compose: Any, verb: str) -> Any:
    """Return Hydra's own settings as conf/ has them."""
    return compose(config_name=config_name(verb), return_hydra_config=True).hydra


def _loose(compose: Any, verb: str, overrides: list[str]) -> Any:
    """Compose; a key that Hydra does not know is added, so that validation can name all of them at once."""
    from hydra.errors import ConfigCompositionException

    for _ in overrides:
        try:
            return compose(config_name=config_name(verb), overrides=overrides, return_hydra_config=True)
        except ConfigCompositionException as error:
            unknown = re.search(r"Could not override '([^']+)'", str(error))
            index = next((i for i, text in enumerate(overrides) if unknown and text.startswith(f"{unknown[1]}=")), None)
            if index is None or unknown is None or unknown[1].startswith("hydra"):
                raise
            overrides = [f"++{text}" if i == index else text for i, text in enumerate(overrides)]
    return compose(config_name=config_name(verb), overrides=overrides, return_hydra_config=True)
