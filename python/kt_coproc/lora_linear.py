"""PEFT's lora_A and lora_B of an experts module, with their values in the daemon."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from .adapter import HalfSpec, LoraTensor
from .errors import refusal
from .placeholder import RemoteTensor, placeholder
from .scopes import are_hidden


class RemoteLinear(nn.Linear):
    """PEFT's lora_A or lora_B of an experts module. Made by changing the class of the nn.Linear that PEFT made."""

    @property
    def _remote(self) -> RemoteTensor:
        weight = self._parameters["weight"]
        assert isinstance(weight, RemoteTensor)
        return weight

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        raise refusal(
            "an expert adapter's matrix was called as a layer",
            "expert LoRA is computed in the co-process, as part of its experts module",
            "call the model, or its experts module",
        )

    def __setattr__(self, name: str, value: Any) -> None:
        # transformers' own adapter loading assigns Parameters, it does not call load_state_dict().
        if name == "weight" and isinstance(value, torch.Tensor) and not isinstance(value, RemoteTensor):
            self._receive(value)
        else:
            super().__setattr__(name, value)

    def _receive(self, values: torch.Tensor) -> None:
        weight = self._remote
        weight.push(values)
        if weight.is_meta and not values.is_meta:  # PEFT's low_cpu_mem_usage: loading gives it a device.
            self._parameters["weight"] = placeholder(
                weight.shape, values.dtype, values.device, weight.source, weight.requires_grad
            )

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        if not are_hidden():
            destination[prefix + "weight"] = self._remote.fetch()

    def _load_from_state_dict(
        self,
        state_dict: Any,
        prefix: str,
        local_metadata: Any,
        strict: bool,
        missing_keys: list[str],
        unexpected_keys: list[str],
        error_msgs: list[str],
    ) -> None:
        if are_hidden():
            return
        values = state_dict.get(prefix + "weight")
        if values is None:
            if strict:
                missing_keys.append(prefix + "weight")
        elif values.shape != self.weight.shape:
            error_msgs.append(
                f"size mismatch for {prefix}weight: copying a param with shape {tuple(values.shape)} from checkpoint, "
                f"the shape in current model is {tuple(self.weight.shape)}."
            )
        else:
            self._receive(values.fetch() if isinstance(values, RemoteTensor) else values)


def take_over(linear: nn.Linear, tensor_of: Callable[[torch.Size, torch.Tensor | None], LoraTensor]) -> None:
    """Turns an nn.Linear with values into a RemoteLinear without. tensor_of(shape, float32 CPU values or None) makes
    the tensor that gets the values."""
    weight = linear.weight
    values = None if weight.is_meta else weight.detach().to("cpu", torch.float32, copy=True)
    device = weight.device
    source = tensor_of(weight.shape, values)
    linear.__class__ = RemoteLinear
    # Not setattr: PEFT's init_empty_weights (low_cpu_mem_usage) patches register_parameter and would rebuild the class.
    linear._parameters["weight"] = placeholder(weight.shape, weight.dtype, device, source, weight.requires_grad)


def half_spec(r: int, scaling: float) -> HalfSpec:
    if not (r > 0 and math.isfinite(scaling)):
        raise ValueError(f"LoRA rank {r} with scaling {scaling} is not a usable adapter")
    return HalfSpec(int(r), float(scaling))
