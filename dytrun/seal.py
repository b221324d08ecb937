"""JSON that carries its own SHA-256, so that a flipped bit in it is found."""

import hashlib
import json
from collections.abc import Mapping
from typing import Any

_SEAL = "sealed_by"


def sealed(values: Mapping[str, Any]) -> bytes:
    """Return plain values as JSON that carries its own SHA-256."""
    assert _SEAL not in values
    digest = hashlib.sha256(json.dumps(values, separators=(",", ":")).encode()).hexdigest()
    return (json.dumps({_SEAL: digest} | dict(values), indent=1) + "\n").encode()


def unsealed(raw: bytes) -> dict[str, Any]:
    """Return the values of `sealed`.

    Raises:
        ValueError: it is another file, or a damaged one.
    """
    try:
        values = json.loads(raw)
        values.pop(_SEAL)
        is_whole = sealed(values) == raw
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError):
        is_whole, values = False, {}
    if not is_whole:
        raise ValueError("it is damaged: it does not have its own digest")
    return values
