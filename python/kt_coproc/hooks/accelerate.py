"""accelerate: FSDP2 preparation, and the engines that cannot work with remote experts.

AcceleratedOptimizer needs nothing: it is a wrapper, our hooks act on the optimizer inside; its state_dict round trip at
construction finds no expert state before the first step."""

from __future__ import annotations

from types import ModuleType
from typing import Any

from torch import nn

from .. import errors, scopes
from ..experts import remote_modules
from ..patching import Function, wrap
from ..placeholder import is_remote


def patch(accelerator: ModuleType) -> None:
    # accelerate.accelerator binds the function at import: its own name is the one that counts. No public hook.
    wrap(accelerator, "fsdp2_prepare_model", _fsdp2_prepare_model)
    # Parameters are identified by data_ptr() while the optimizer's are exchanged for sharded ones.
    wrap(accelerator.Accelerator, "_prepare_fsdp2", _with_names_for_pointers)
    wrap(accelerator.Accelerator, "_prepare_deepspeed", _refuse("DeepSpeed"))
    wrap(accelerator.Accelerator, "_prepare_megatron_lm", _refuse("Megatron-LM"))


def _fsdp2_prepare_model(original: Function) -> Function:
    def fsdp2_prepare_model(accelerator: Any, model: nn.Module, *args: Any, **kwargs: Any) -> Any:
        places = [
            (module, name, parameter)
            for module in model.modules()
            for name, parameter in module._parameters.items()
            if is_remote(parameter)
        ]
        if not places:
            return original(accelerator, model, *args, **kwargs)
        # cpu_ram_efficient_loading moves the model to meta and broadcasts a state_dict of DTensors: remote parameters
        # take no part in it, and come back as they were.
        with scopes.hidden_from_state_dicts():
            result = original(accelerator, model, *args, **kwargs)
        for module, name, parameter in places:
            module._parameters[name] = parameter
        return result

    return fsdp2_prepare_model


def _with_names_for_pointers(original: Function) -> Function:
    def _prepare_fsdp2(self: Any, *args: Any, **kwargs: Any) -> Any:
        with scopes.pointers_are_names():
            return original(self, *args, **kwargs)

    return _prepare_fsdp2


def _refuse(engine: str) -> Any:
    def make(original: Function) -> Function:
        def prepare(self: Any, *args: Any, **kwargs: Any) -> Any:
            if any(isinstance(arg, nn.Module) and remote_modules(arg) for arg in args):
                raise errors.refusal(
                    f"{engine} is not supported with experts in the co-process",
                    "it partitions and steps parameters by itself",
                    "use DDP or FSDP2",
                )
            return original(self, *args, **kwargs)

        return prepare

    return make
