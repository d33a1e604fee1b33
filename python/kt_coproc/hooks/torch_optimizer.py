"""torch's optimizers: step, zero_grad and state; what averages parameters or scales the loss."""

from __future__ import annotations

from typing import Any

from torch import nn
from torch.optim import Optimizer

from .. import optimizer_state, step
from ..errors import refusal
from ..patching import Function, wrap
from ..placeholder import is_remote, lora_tensor
from ..swap import without_base_weights


def patch() -> None:
    import torch.optim.swa_utils
    from torch.optim.optimizer import register_optimizer_step_pre_hook

    # Public and made for this: a pre-hook of every optimizer.
    register_optimizer_step_pre_hook(step.before_step)

    # No public hook exists for these. Refusals at construction rather than at the first step.
    wrap(Optimizer, "add_param_group", _add_param_group)
    # zero_grad of both: plain loops call the optimizer's, HF Trainer the model's.
    wrap(Optimizer, "zero_grad", _optimizer_zero_grad)
    wrap(nn.Module, "zero_grad", _module_zero_grad)
    # register_state_dict_post_hook and register_load_state_dict_pre_hook exist, but per optimizer object only.
    wrap(Optimizer, "state_dict", _optimizer_state_dict)
    wrap(Optimizer, "load_state_dict", _optimizer_load_state_dict)
    # Averages every parameter, frozen ones too.
    wrap(torch.optim.swa_utils.AveragedModel, "update_parameters", _update_parameters)
    wrap(torch.amp.GradScaler, "step", _scaler("step"))
    wrap(torch.amp.GradScaler, "unscale_", _scaler("unscale_"))


def _add_param_group(original: Function) -> Function:
    def add_param_group(self: Optimizer, param_group: dict[str, Any]) -> None:
        original(self, param_group)
        group = self.param_groups[-1]
        if any(is_remote(parameter) for parameter in group["params"]):
            step.check_group(self, group)
            _wrap_overrides(type(self))

    return add_param_group


def _wrap_overrides(cls: type) -> None:
    """An optimizer class that has its own version of a wrapped method (bitsandbytes) is wrapped when it is first
    used."""
    makers = {
        "zero_grad": _optimizer_zero_grad,
        "state_dict": _optimizer_state_dict,
        "load_state_dict": _optimizer_load_state_dict,
    }
    for base in cls.__mro__:
        if base is Optimizer:
            return
        for name in makers.keys() & vars(base).keys():
            wrap(base, name, makers[name])


def _optimizer_zero_grad(original: Function) -> Function:
    def zero_grad(self: Optimizer, *args: Any, **kwargs: Any) -> None:
        original(self, *args, **kwargs)
        step.discard(parameter for group in self.param_groups for parameter in group["params"])

    return zero_grad


def _module_zero_grad(original: Function) -> Function:
    def zero_grad(self: nn.Module, *args: Any, **kwargs: Any) -> None:
        original(self, *args, **kwargs)
        step.discard(self.parameters())

    return zero_grad


def _optimizer_state_dict(original: Function) -> Function:
    def state_dict(self: Optimizer, *args: Any, **kwargs: Any) -> dict[str, Any]:
        state: dict[str, Any] = original(self, *args, **kwargs)
        optimizer_state.export_state(self, state)
        return state

    return state_dict


def _optimizer_load_state_dict(original: Function) -> Function:
    def load_state_dict(self: Optimizer, state_dict: dict[str, Any], *args: Any, **kwargs: Any) -> None:
        original(self, optimizer_state.import_state(self, state_dict), *args, **kwargs)

    return load_state_dict


def _update_parameters(original: Function) -> Function:
    def update_parameters(self: nn.Module, model: nn.Module) -> None:
        with without_base_weights(self, model):
            original(self, model)

    return update_parameters


def _scaler(name: str) -> Any:
    def make(original: Function) -> Function:
        def refuse(self: Any, optimizer: Optimizer, *args: Any, **kwargs: Any) -> Any:
            groups = getattr(optimizer, "param_groups", [])
            if self.is_enabled() and any(lora_tensor(p) for group in groups for p in group["params"]):
                raise refusal(
                    f"GradScaler.{name} refused",
                    "gradients of expert adapters are in the co-process, which knows no loss scale",
                    "train in bf16, which needs no loss scaling (TrainingArguments(bf16=True))",
                )
            return original(self, optimizer, *args, **kwargs)

        return refuse

    return make
