"""What arms and runs are called, the same in the table, on the page and in W&B."""

from collections.abc import Mapping
from typing import Any

# Settings of a norm that need no mention in the name of an arm.
_USUAL: dict[str, Any] = {
    "rules": [], "shift_init": None, "learn_alpha": True, "per_channel_alpha": False, "affine": True,
    "types": ["layernorm"], "include": None, "exclude": [],
}  # fmt: skip
# W&B refuses a run's name that is longer.
_MOST_CHARS = 128


def arm_label(science: Mapping[str, Any]) -> str:
    """Name an arm by its norm and those of its settings that are not the usual ones of its model."""
    norm, usual = science["norm"], dict(_USUAL)
    if science.get("model", {}).get("name") == "llama":
        usual["types"] = ["rmsnorm"]
    settings = {key: value for key, value in norm.items() if key != "name" and usual.get(key, ...) != value}
    return " ".join([norm["name"], *(f"{key}={value:g}" if isinstance(value, float) else f"{key}={value}"
                                     for key, value in settings.items())])  # fmt: skip


def run_label(science: Mapping[str, Any]) -> str:
    """Name a run by what a reader of a list looks for: arm and seed first, then model and data."""
    arm = arm_label(science).replace("alpha_init=", "α0=")
    label = f"{arm} s{science['seed']} · {science['model']['name']} {science['data']['name']}"
    return label if len(label) <= _MOST_CHARS else f"{label[: _MOST_CHARS - 1]}…"


def pair_label(science: Mapping[str, Any], pair_id: str) -> str:
    """Name the comparison that a run belongs to."""
    return f"{science['model']['name']}-{science['data']['name']}-{pair_id}"
