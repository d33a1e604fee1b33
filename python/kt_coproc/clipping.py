"""Gradient clipping over parameters in this process and in the daemon together."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from . import job
from .adapter import Adapter, LoraTensor
from .errors import refusal
from .placeholder import is_remote, lora_tensor
from .step import in_order, is_trained


def clip_grad_norm(
    original: Callable[..., torch.Tensor],
    parameters: Any,
    max_norm: float,
    norm_type: float = 2.0,
    error_if_nonfinite: bool = False,
    foreach: bool | None = None,
) -> torch.Tensor:
    """torch.nn.utils.clip_grad_norm_ over parameters here and in the daemon together: N = sqrt(N_here² + ‖S‖²/W²)."""
    everything = [parameters] if isinstance(parameters, torch.Tensor) else list(parameters)
    chosen: dict[Adapter, dict[LoraTensor, int]] = {}
    for parameter in everything:
        tensor = lora_tensor(parameter)
        if tensor is not None and parameter.requires_grad:
            chosen.setdefault(tensor.adapter, {})[tensor] = 0
    if not in_order(chosen):
        return original(everything, max_norm, norm_type, error_if_nonfinite, foreach)
    if float(norm_type) != 2.0:
        raise refusal(
            "cannot clip the gradients of expert adapters with this norm",
            f"norm_type is {norm_type}, the co-process computes the 2-norm",
            "use norm_type=2",
        )
    with torch.no_grad():
        here = [parameter for parameter in everything if not is_remote(parameter)]
        gradients = [parameter.grad for parameter in here if parameter.grad is not None]
        norm_here = torch.nn.utils.get_total_norm(gradients, 2.0, False, foreach)
        full = norm_here.full_tensor() if hasattr(norm_here, "full_tensor") else norm_here
        squared = sum(_squared_norm(adapter, chosen[adapter]) for adapter in in_order(chosen))
        norm_there = torch.tensor(squared**0.5, dtype=torch.float32, device=full.device)
        total: torch.Tensor = torch.linalg.vector_norm(torch.stack([full.float(), norm_there]), 2.0)
        if error_if_nonfinite and not bool(torch.isfinite(total)):
            raise RuntimeError(
                "The total norm of order 2.0 for gradients from `parameters` is non-finite, so it cannot be clipped."
            )
        _clip_here(norm_here, here, max_norm, total, foreach)
        coefficient = float(torch.clamp(float(max_norm) / (total + 1e-6), max=1.0))
        if coefficient != 1.0:
            for adapter in in_order(chosen):
                _require_all_tensors(adapter, chosen[adapter])
                adapter.coefficient *= coefficient
        return total


def _clip_here(
    norm_here: torch.Tensor, here: list[Any], max_norm: float, total: torch.Tensor, foreach: bool | None
) -> None:
    if hasattr(norm_here, "full_tensor"):
        from torch.distributed.tensor import DTensor

        assert isinstance(norm_here, DTensor)
        total = DTensor.from_local(total, norm_here.device_mesh)
    torch.nn.utils.clip_grads_with_norm_(here, max_norm, total, foreach)


def _squared_norm(adapter: Adapter, tensors: dict[LoraTensor, int]) -> float:
    job.require_membership(adapter.connection, "clipping")
    job.reduce_gradients(adapter)
    squared = adapter.session.squared_norm(adapter.required_id, adapter.group_of(tensors))
    return squared * (adapter.coefficient / job.world_size(adapter.connection)) ** 2


def _require_all_tensors(adapter: Adapter, tensors: dict[LoraTensor, int]) -> None:
    missing = [tensor for tensor in adapter.tensors() if tensor not in tensors and is_trained(tensor)]
    if missing:
        raise refusal(
            f"cannot clip a part of adapter {adapter.name!r}",
            f"{len(missing)} of its tensors that an optimizer trains are not among the parameters; one coefficient "
            "scales the whole adapter",
            "give clip_grad_norm_ all parameters of the model",
        )


def refuse_remote(parameters: Any, function: str) -> None:
    """For torch functions that change gradients in place, which these parameters do not have here."""
    everything = [parameters] if isinstance(parameters, torch.Tensor) else list(parameters)
    for parameter in everything:
        if lora_tensor(parameter) is not None and parameter.requires_grad:
            raise refusal(
                f"{function} cannot include expert adapters",
                "their gradients are in the co-process",
                "use torch.nn.utils.clip_grad_norm_, called through its module and not imported before "
                "kt_coproc was installed",
            )
