"""Hydra's own settings: what of them a command line may set, and what Hydra may build."""

import functools
from collections.abc import Mapping
from typing import Any

from dytrun import guard
from dytrun.errors import UserError
from dytrun.usage import CONF

# What of Hydra's own settings a command line may set; the rest would write files, or build things by their names.
_OPEN = ("launcher", "sweeper", "mode", "verbose", "runtime", "overrides", "job", "searchpath")
_OPEN_OF_JOB = ("name", "num", "id", "override_dirname", "config_name")


def check(hydra: Any, of_conf: Any, parts: Mapping[str, Any]) -> None:
    """Refuse settings that would write files, or build things by their names.

    Args:
        hydra: what was composed, Hydra's own node.
        of_conf: the same without the command line.
        parts: the settings of `launcher` and `sweeper`, plain and resolved.

    Raises:
        UserError: the first one that is refused.
    """
    settled = _settled(hydra)
    for key, value in _settled(of_conf).items():
        if settled.get(key) != value:
            hint = "say runs_dir=DIR" if key in ("run", "sweep", "output_subdir") else "leave it out"
            raise UserError(f"hydra.{key}: dytrun sets it, and nothing is built from a name in a configuration; {hint}")
    known = _buildable()
    for part, values in parts.items():
        guard.check_values(values, f"hydra.{part}")
        for path, key, value in guard.build_names(values, f"hydra.{part}"):
            if (key, value) not in known:
                raise UserError(f"{path}: {value} belongs to no launcher or sweeper that is installed here; say "
                                "hydra/launcher=… or hydra/sweeper=…")  # fmt: skip
        if isinstance(values, dict) and values.get("custom_search_space") is not None:
            raise UserError("hydra.sweeper.custom_search_space: it names a function, and nothing is called by a name "
                            "in a configuration; list the space in the overrides")  # fmt: skip


def _settled(hydra: Any) -> dict[str, Any]:
    """Return Hydra's own settings without those that a command line may set."""
    from omegaconf import OmegaConf

    values: Any = OmegaConf.to_container(hydra)
    job = {key: value for key, value in values["job"].items() if key not in _OPEN_OF_JOB}
    return {key: value for key, value in values.items() if key not in _OPEN} | {"job": job}


@functools.cache
def _buildable() -> set[tuple[str, str]]:
    """Return (key, value) of all that the launchers and sweepers installed here have Hydra build."""
    from hydra.core.config_store import ConfigStore
    from omegaconf import OmegaConf

    found = set()

    def look(tree: dict[str, Any]) -> None:
        for entry in tree.values():
            if isinstance(entry, dict):
                look(entry)
            else:
                found.update(guard.build_names(OmegaConf.to_container(entry.node), ""))

    store = ConfigStore.instance().repo.get("hydra", {})
    for group in ("launcher", "sweeper"):
        look(store.get(group, {}))
    for path in (CONF / "hydra" / "launcher").glob("*.yaml"):
        found.update(guard.build_names(OmegaConf.to_container(OmegaConf.load(path)), ""))
    return {(key, value) for _, key, value in found}
