"""What a module of experts computes between its gate and up and its down projection, compared with the daemon's."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from torch.nn import functional


def _swiglu(gate: torch.Tensor, up: torch.Tensor, limit: float) -> torch.Tensor:
    return functional.silu(gate) * up


def _clamped_swiglu(gate: torch.Tensor, up: torch.Tensor, limit: float) -> torch.Tensor:
    return functional.silu(gate.clamp(max=limit)) * up.clamp(min=-limit, max=limit)


# By the name that the daemon gives them: kActivations in shm/base/activation.h.
_FUNCTIONS: dict[str, Callable[[torch.Tensor, torch.Tensor, float], torch.Tensor]] = {
    "swiglu": _swiglu,
    "clamped_swiglu": _clamped_swiglu,
}


def difference(module: nn.Module, model: dict[str, Any]) -> str | None:
    """Tries the gating of a module's class on numbers, small ones and ones beyond every usual limit.

    Args:
        module: a module of experts as transformers has them; its parameters may be on meta.
        model: Client.model.

    Returns:
        None where it is the daemon's, else what is not.
    """
    from transformers.integrations.moe import _default_apply_gate

    limit = float(model.get("activation_limit", 0))
    function = _FUNCTIONS.get(model["activation"])
    served = model["activation"] + (f" with limit {limit:g}" if limit else "")
    if function is None:
        return f"an activation that this kt_coproc does not know, {served}"
    near = limit or 1.0
    sizes = (0.0, 0.3, 1.0, 3.0, 7.0, 30.0, 1e3, 0.99 * near, 1.01 * near)
    values = [sign * size for size in sizes for sign in (1, -1)]
    # Explicit: a model is built under torch.device("meta") and with its own default dtype.
    numbers = torch.tensor(values, dtype=torch.float32, device="cpu")
    gate, up = (grid.flatten() for grid in torch.meshgrid(numbers, numbers, indexing="ij"))
    apply_gate = getattr(type(module), "_apply_gate", _default_apply_gate)
    try:
        with torch.no_grad():
            computed = apply_gate(module, torch.stack((gate, up), dim=-1)).flatten()
        expected = function(gate, up, limit)
        wrong = ~torch.isclose(computed, expected, rtol=1e-5, atol=1e-6)
    except Exception as error:
        return f"a gating that cannot be compared with the daemon's {served} ({type(error).__name__}: {error})"
    if not wrong.any():
        return None
    at = int(wrong.nonzero()[0])
    return (
        f"another activation than the daemon's {served}: of gate {gate[at]:g} and up {up[at]:g} "
        f"it makes {computed[at]:g}, the daemon {expected[at]:g}"
    )
