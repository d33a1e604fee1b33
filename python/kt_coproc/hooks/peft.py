"""PEFT: adapters on experts. PEFT builds and initialises its own tensors, in its own layout and from torch's RNG; then
their values go to the daemon. Saving, loading, naming, switching and disabling adapters stay PEFT's code."""

from __future__ import annotations

from types import ModuleType
from typing import Any

import torch
from torch import nn

from .. import errors, lora_linear
from ..adapter import PARAMETER_NAMES, SIDE_A, SIDE_B, Adapter
from ..experts import RemoteExperts, without_compilation
from ..patching import Function, wrap
from ..placeholder import lora_tensor


def patch_layer(layer: ModuleType) -> None:
    """lora.ParamWrapper is what LoraConfig(target_parameters=…) makes; it has no hooks of its own."""
    wrapper = layer.ParamWrapper
    wrap(wrapper, "update_layer", _update_layer)
    wrap(wrapper, "forward", _forward)
    for name in ("merge", "unmerge", "get_delta_weight", "get_delta_factors"):
        if hasattr(wrapper, name):
            wrap(wrapper, name, _refuse)
    # Inherited from LoraLayer: our version goes to ParamWrapper only.
    wrapper.delete_adapter = _delete_adapter(wrapper.delete_adapter)


def patch_tuners(tuners_utils: ModuleType) -> None:
    """After PEFT has added an adapter to a whole model, what could not be sent layer by layer is sent."""
    wrap(tuners_utils.BaseTuner, "inject_adapter", _inject_adapter)


def _experts_of(wrapper: Any) -> RemoteExperts | None:
    base = wrapper.get_base_layer()
    return base if isinstance(base, RemoteExperts) else None


def _update_layer(original: Function) -> Function:
    def update_layer(self: Any, adapter_name: str, *args: Any, **kwargs: Any) -> None:
        original(self, adapter_name, *args, **kwargs)
        experts = _experts_of(self)
        if experts is None:
            return
        layer, half = experts._kt_layer, PARAMETER_NAMES[self.parameter_name]
        spec = lora_linear.half_spec(self.r[adapter_name], self.scaling[adapter_name])
        adapter = experts._kt_binding.adapter_for(adapter_name, layer, half)
        for side, linears in ((SIDE_A, self.lora_A), (SIDE_B, self.lora_B)):

            def tensor_of(shape: torch.Size, values: torch.Tensor | None, side: str = side) -> Any:
                return adapter.add(layer, half, side, spec, shape, values)

            lora_linear.take_over(linears[adapter_name], tensor_of)
        if adapter.is_complete(layer):
            adapter.ensure([layer])  # At once: the values of one layer in this process, not of all.

    return update_layer


def _inject_adapter(original: Function) -> Function:
    def inject_adapter(self: Any, model: nn.Module, adapter_name: str, *args: Any, **kwargs: Any) -> Any:
        result = original(self, model, adapter_name, *args, **kwargs)
        found: list[Adapter] = []
        for module in model.modules():
            if isinstance(module, RemoteExperts):
                adapter = module._kt_binding.adapters.get(adapter_name)
                if adapter is not None and adapter not in found:
                    found.append(adapter)
        for adapter in found:
            adapter.ensure()
        return result

    return inject_adapter


def _active(wrapper: Any) -> dict[str, dict[str, Any]]:
    """adapter name -> parameter name -> the wrapper that applies it, along the chain of nested wrappers."""
    found: dict[str, dict[str, Any]] = {}
    while hasattr(wrapper, "parameter_name"):
        if not wrapper.disable_adapters:
            for name in wrapper.active_adapters:
                if name in wrapper.lora_A:
                    found.setdefault(name, {})[wrapper.parameter_name] = wrapper
        wrapper = wrapper.base_layer
    return found


def _forward(original: Function) -> Function:
    @without_compilation  # As RemoteExperts.forward.
    def remote_forward(self: Any, experts: RemoteExperts, x: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        self._check_forward_args(x, *args, **kwargs)
        kwargs.pop("adapter_names", None)
        active = _active(self)
        if len(active) > 1:
            raise errors.refusal(
                f"two adapters are active at once on the experts of layer {experts._kt_layer}: {', '.join(active)}",
                "the co-process applies one adapter per request",
                "activate one with model.set_adapter(name)",
            )
        adapter, trainable = None, False
        for name, wrappers in active.items():
            adapter, trainable = _checked(name, wrappers, experts)
        output: torch.Tensor = experts(x, *args, kt_adapter=adapter, kt_trainable=trainable, **kwargs)
        return output

    def forward(self: Any, x: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        experts = _experts_of(self)
        output: torch.Tensor = (
            original(self, x, *args, **kwargs) if experts is None else remote_forward(self, experts, x, *args, **kwargs)
        )
        return output

    return forward


def _checked(name: str, wrappers: dict[str, Any], experts: RemoteExperts) -> tuple[Adapter, bool]:
    """The daemon's adapter that these wrappers stand for, and whether any of its tensors wants a gradient."""
    weights = [w for wrapper in wrappers.values() for w in (wrapper.lora_A[name].weight, wrapper.lora_B[name].weight)]
    tensors = [lora_tensor(weight) for weight in weights]
    adapters = {tensor.adapter for tensor in tensors if tensor is not None}
    if len(adapters) != 1 or None in tensors:
        raise errors.refusal(
            f"adapter {name!r} of layer {experts._kt_layer} is not one adapter of the co-process",
            "its tensors come from different adapters, or were replaced",
            "add the adapter anew under another name",
        )
    adapter = adapters.pop()
    expected = adapter.specs[experts._kt_layer]
    for parameter_name, wrapper in wrappers.items():
        spec = expected[PARAMETER_NAMES[parameter_name]]
        if float(wrapper.scaling[name]) != spec.scaling:
            raise errors.refusal(
                f"the scaling of adapter {name!r} on {parameter_name} was changed",
                f"from {spec.scaling} to {wrapper.scaling[name]}; the co-process has the first",
                "choose lora_alpha in LoraConfig",
            )
    if len(wrappers) != len(expected):
        raise errors.refusal(
            f"adapter {name!r} is active on one of gate_up_proj and down_proj only",
            "the co-process applies an adapter to a layer as a whole",
            "activate and disable adapters through the model",
        )
    return adapter, any(weight.requires_grad for weight in weights)


def _refuse(original: Function) -> Function:
    def refuse(self: Any, *args: Any, **kwargs: Any) -> Any:
        if _experts_of(self) is not None:
            raise errors.refusal(
                f"{original.__name__} refused on {self.parameter_name} of the experts",
                "the weights of the routed experts are in the co-process and cannot be merged here",
                errors.MERGE,
            )
        return original(self, *args, **kwargs)

    return refuse


def _delete_adapter(original: Function) -> Function:
    def delete_adapter(self: Any, adapter_name: str) -> None:
        experts = _experts_of(self)
        adapter = experts._kt_binding.adapters.get(adapter_name) if experts is not None else None
        connection = adapter.connection if adapter is not None else None
        number = adapter.id if adapter is not None else None
        del adapter  # It must be able to go.
        original(self, adapter_name)
        if connection is not None and number is not None:
            connection.delete(number)

    return delete_adapter
