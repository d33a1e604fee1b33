"""kt-coproc: the routed experts of a mixture-of-experts model, computed by one co-process per node.

With `KT_COPROC=auto` (or `unix:/path/kt.sock`) in the environment an unchanged training script needs nothing of this
package. Without it, importing the package changes nothing, and torch is not even imported.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from .errors import ActivationLimit, CoprocDied, CoprocError, CoprocModelMismatch, Disagreement, RankDied

if TYPE_CHECKING:
    from .api import attach, connect, expert_gradients, join, stats
    from .connection import Client
    from .layer import MoEExperts

    __version__: str

__all__ = [
    "ActivationLimit",
    "Client",
    "CoprocDied",
    "CoprocError",
    "CoprocModelMismatch",
    "Disagreement",
    "MoEExperts",
    "RankDied",
    "attach",
    "connect",
    "expert_gradients",
    "join",
    "stats",
]

_HOMES = {
    "Client": ".connection",
    "MoEExperts": ".layer",
    "attach": ".api",
    "connect": ".api",
    "expert_gradients": ".api",
    "join": ".api",
    "stats": ".api",
}


def __getattr__(name: str) -> Any:
    if name == "__version__":
        from importlib import metadata

        return metadata.version("kt-coproc")
    home = _HOMES.get(name)
    if home is None:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    # First torch, whose last line calls our entry point: that must not happen while one of our modules is half
    # imported.
    importlib.import_module("torch")
    value = getattr(importlib.import_module(home, __name__), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted(set(globals()) | set(__all__))
