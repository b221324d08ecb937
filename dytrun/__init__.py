"""dytrun: what happens to a vision model when its normalization layers become Dynamic Tanh.

As a library: `from dytrun import convert_norms`; see `dytrun.library`.
"""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from dytrun.library import (
        Derf,
        DynamicTanh,
        PointWise,
        Site,
        UserError,
        convert_norms,
        end_zero_init,
        llama_rules,
        scale_embedding,
    )

__version__ = "0.1.0"
__all__ = [
    "Derf", "DynamicTanh", "PointWise", "Site", "UserError", "convert_norms", "end_zero_init", "llama_rules",
    "scale_embedding",
]  # fmt: skip


def __getattr__(name: str) -> Any:
    """Import the library, and torch with it, when something of it is asked for: the command line answers without."""
    if name not in __all__:
        raise AttributeError(f"module 'dytrun' has no attribute '{name}'")
    from dytrun import library

    return getattr(library, name)
