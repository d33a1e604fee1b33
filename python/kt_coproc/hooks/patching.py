"""How a function of another project is wrapped."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

Function = Callable[..., Any]


def wrap(owner: Any, name: str, make: Callable[[Function], Function]) -> None:
    """Replaces owner.name by make(original), which keeps the original's name and documentation. Once only."""
    original = getattr(owner, name)
    if getattr(original, "_kt_coproc", False):
        return
    wrapped = functools.wraps(original)(make(original))
    wrapped._kt_coproc = True  # type: ignore[attr-defined]
    setattr(owner, name, wrapped)
