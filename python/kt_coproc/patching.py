"""How a function of another project is wrapped, and what went wrong while that was done."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

Function = Callable[..., Any]

# The first exception that a patch raised. Kept, because an import of torch must survive it.
failure: BaseException | None = None


def wrap(owner: Any, name: str, make: Callable[[Function], Function]) -> None:
    """Replaces owner.name by make(original), which keeps the original's name and documentation. Once only."""
    original = getattr(owner, name)
    if getattr(original, "_kt_coproc", False):
        return
    wrapped = functools.wraps(original)(make(original))
    wrapped._kt_coproc = True  # type: ignore[attr-defined]
    setattr(owner, name, wrapped)


def keep_failure(error: BaseException) -> None:
    global failure
    failure = failure or error


def raise_failure() -> None:
    """Raises what went wrong while patching, if anything did."""
    if failure is not None:
        from .errors import refusal

        raise refusal(
            "kt-coproc could not be installed in this process",
            f"{type(failure).__name__}: {failure}",
            "use the tested versions of torch, transformers, peft and accelerate (README), or unset KT_COPROC",
        ) from failure
