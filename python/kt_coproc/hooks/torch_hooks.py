"""torch: optimizer step and state, zero_grad, clipping, DDP and FSDP2, activation checkpointing, refusals."""

from __future__ import annotations

import inspect
from collections.abc import Iterable
from types import ModuleType
from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer

from .. import distributed, experts, remote, replay, training
from ..adapter import Adapter
from ..errors import refusal
from .patching import Function, wrap


def patch() -> None:
    """Called as the last lines of `import torch` (see _autoload)."""
    import torch.nn.parallel.distributed as ddp
    import torch.optim.swa_utils
    import torch.utils.checkpoint as checkpointing
    from torch.optim.optimizer import register_optimizer_step_pre_hook

    # Public and made for this: a pre-hook of every optimizer.
    register_optimizer_step_pre_hook(training.before_step)

    # No public hook exists for these. Refusals at construction rather than at the first step.
    wrap(Optimizer, "add_param_group", _add_param_group)
    # zero_grad of both: plain loops call the optimizer's, HF Trainer the model's.
    wrap(Optimizer, "zero_grad", _optimizer_zero_grad)
    wrap(nn.Module, "zero_grad", _module_zero_grad)
    # register_state_dict_post_hook and register_load_state_dict_pre_hook exist, but per optimizer object only.
    wrap(Optimizer, "state_dict", _optimizer_state_dict)
    wrap(Optimizer, "load_state_dict", _optimizer_load_state_dict)
    _patch_clipping()
    # torch.utils.checkpoint has no hook around the function it runs.
    wrap(checkpointing, "checkpoint", replay.wrap_checkpoint)
    # Parameters to leave out have a (private, stable) attribute, _ddp_params_and_buffers_to_ignore; that wrapping joins
    # the ranks has no hook.
    wrap(ddp.DistributedDataParallel, "__init__", _ddp_init)
    wrap(nn.DataParallel, "__init__", _refuse_wrapper("nn.DataParallel", "DistributedDataParallel"))
    # Averages every parameter, frozen ones too.
    wrap(torch.optim.swa_utils.AveragedModel, "update_parameters", _update_parameters)
    wrap(torch.amp.GradScaler, "step", _scaler("step"))
    wrap(torch.amp.GradScaler, "unscale_", _scaler("unscale_"))


# ------------------------------------------------------------------------------------------------------------
# optimizers
def _add_param_group(original: Function) -> Function:
    def add_param_group(self: Optimizer, param_group: dict[str, Any]) -> None:
        original(self, param_group)
        group = self.param_groups[-1]
        if any(remote.is_remote(parameter) for parameter in group["params"]):
            training.check_group(self, group)
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
        training.discard(parameter for group in self.param_groups for parameter in group["params"])

    return zero_grad


def _module_zero_grad(original: Function) -> Function:
    def zero_grad(self: nn.Module, *args: Any, **kwargs: Any) -> None:
        original(self, *args, **kwargs)
        training.discard(self.parameters())

    return zero_grad


def _optimizer_state_dict(original: Function) -> Function:
    def state_dict(self: Optimizer, *args: Any, **kwargs: Any) -> dict[str, Any]:
        state = original(self, *args, **kwargs)
        training.export_state(self, state)
        return state

    return state_dict


def _optimizer_load_state_dict(original: Function) -> Function:
    def load_state_dict(self: Optimizer, state_dict: dict[str, Any], *args: Any, **kwargs: Any) -> None:
        original(self, training.import_state(self, state_dict), *args, **kwargs)

    return load_state_dict


def _update_parameters(original: Function) -> Function:
    def update_parameters(self: nn.Module, model: nn.Module) -> None:
        with experts.without_base_weights(self, model):
            original(self, model)

    return update_parameters


def _scaler(name: str) -> Any:
    def make(original: Function) -> Function:
        def refuse(self: Any, optimizer: Optimizer, *args: Any, **kwargs: Any) -> Any:
            groups = getattr(optimizer, "param_groups", [])
            if self.is_enabled() and any(remote.lora_tensor(p) for group in groups for p in group["params"]):
                raise refusal(
                    f"GradScaler.{name} refused",
                    "gradients of expert adapters are in the co-process, which knows no loss scale",
                    "train in bf16, which needs no loss scaling (TrainingArguments(bf16=True))",
                )
            return original(self, optimizer, *args, **kwargs)

        return refuse

    return make


# --------------------------------------------------------------------------------------------------------------
# clipping
def _patch_clipping() -> None:
    import torch.nn.utils as utils
    import torch.nn.utils.clip_grad as clip_grad

    def clip_norm(original: Function) -> Function:
        def clip_grad_norm_(parameters: Any, *args: Any, **kwargs: Any) -> torch.Tensor:
            return training.clip_grad_norm(original, parameters, *args, **kwargs)

        return clip_grad_norm_

    def refuse(function: str) -> Any:
        def make(original: Function) -> Function:
            def checked(parameters: Any, *args: Any, **kwargs: Any) -> Any:
                parameters = [parameters] if isinstance(parameters, torch.Tensor) else list(parameters)
                training.refuse_remote(parameters, function)
                return original(parameters, *args, **kwargs)

            return checked

        return make

    # clip_grad_norm_ is bound under two names. The functions with a total norm that somebody else computed
    # (get_total_norm sees gradients, never parameters) would leave the experts out: they are refused, also below a
    # clip_grad_norm_ that a script imported by name before we came.
    wrap(clip_grad, "_clip_grads_with_norm_", refuse("clipping"))
    wrap(clip_grad, "clip_grad_norm_", clip_norm)
    wrap(clip_grad, "clip_grad_value_", refuse("clip_grad_value_"))
    utils.clip_grad_norm_ = clip_grad.clip_grad_norm_
    utils.clip_grad_value_ = clip_grad.clip_grad_value_
    wrap(utils, "clip_grads_with_norm_", refuse("clip_grads_with_norm_"))
    if hasattr(clip_grad, "clip_grads_with_norm_"):
        clip_grad.clip_grads_with_norm_ = utils.clip_grads_with_norm_


# ----------------------------------------------------------------------------------------------------------- DDP, FSDP2
class _Anchor(nn.Module):
    """One number for DDP, which refuses a module without gradients: there is none when only experts are trained. In no
    state_dict."""

    def __init__(self, device: torch.device) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros((), device=device))

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        pass

    def _load_from_state_dict(self, *args: Any) -> None:
        pass


def _adapters(module: nn.Module) -> list[Adapter]:
    found = []
    for parameter in module.parameters():
        tensor = remote.lora_tensor(parameter)
        if tensor is not None and tensor.adapter not in found:
            found.append(tensor.adapter)
    return found


def _join(modules: Iterable[nn.Module], group: Any) -> None:
    """Joins the ranks, if one of the modules has remote experts; their adapters exist in the daemon afterwards."""
    connections = []
    for module in modules:
        for adapter in _adapters(module):
            adapter.ensure()
        for _, remote_module in experts.remote_modules(module):
            connection = remote_module._kt_binding.client.connection
            if connection not in connections:
                connections.append(connection)
    for connection in connections:
        distributed.join(connection, group)


def _ddp_init(original: Function) -> Function:
    signature = inspect.signature(original)

    def __init__(self: Any, module: nn.Module, *args: Any, **kwargs: Any) -> None:
        modules = [m for _, m in experts.remote_modules(module)]
        if modules:
            given = signature.bind(self, module, *args, **kwargs).arguments
            mesh = given.get("device_mesh")
            _join([module], mesh.get_group() if mesh is not None else given.get("process_group"))
            names = {name for name, parameter in module.named_parameters() if remote.is_remote(parameter)}
            ignored = set(getattr(module, "_ddp_params_and_buffers_to_ignore", ())) | names
            module._ddp_params_and_buffers_to_ignore = ignored  # type: ignore[assignment]
            if not any(p.requires_grad for name, p in module.named_parameters() if name not in ignored):
                device = next((p.device for _, p in module.named_parameters()), torch.device("cpu"))
                module.add_module("_kt_ddp_anchor", _Anchor(device))
                for experts_module in modules:
                    experts_module.__dict__["_kt_ddp_anchor"] = module._kt_ddp_anchor.weight
        original(self, module, *args, **kwargs)

    return __init__


def _refuse_wrapper(name: str, instead: str) -> Any:
    def make(original: Function) -> Function:
        def __init__(self: Any, module: nn.Module, *args: Any, **kwargs: Any) -> None:
            if experts.remote_modules(module):
                raise refusal(
                    f"{name} cannot wrap a model whose experts are in the co-process",
                    "it copies or flattens parameters that have no storage in this process",
                    f"use {instead}",
                )
            original(self, module, *args, **kwargs)

        return __init__

    return make


def patch_fsdp(fsdp: ModuleType) -> None:
    """FSDP2 leaves remote parameters out (its own ignored_params), and joins the ranks of its mesh; FSDP1 is
    refused."""

    def make(original: Function) -> Function:
        def fully_shard(module: Any, *args: Any, **kwargs: Any) -> Any:
            modules = list(module) if isinstance(module, (list, tuple)) else [module]
            found = {p for m in modules for p in m.parameters() if remote.is_remote(p)}
            if found:
                kwargs["ignored_params"] = set(kwargs.get("ignored_params") or ()) | found
                _join(modules, _mesh_group(kwargs.get("mesh")))
            return original(module, *args, **kwargs)

        return fully_shard

    wrap(fsdp, "fully_shard", make)
    wrap(
        fsdp.FullyShardedDataParallel,
        "__init__",
        _refuse_wrapper("FullyShardedDataParallel (FSDP1)", "FSDP2 (fully_shard) or DDP"),
    )


def _mesh_group(mesh: Any) -> Any:
    """The process group over all ranks of a mesh; None: the default group."""
    if mesh is None:
        return None
    return mesh.get_group() if mesh.ndim == 1 else mesh._flatten().get_group()


def patch_distributed_checkpoint(state_dict: ModuleType) -> None:
    """torch makes an optimizer's state exist by stepping it with zero gradients and lr 0. In the daemon that would
    count as a step: the remote parameters are out of sight for its duration."""

    def make(original: Function) -> Function:
        def _init_optim_state(optim: Optimizer, *args: Any, **kwargs: Any) -> Any:
            kept = [list(group["params"]) for group in optim.param_groups]
            for group in optim.param_groups:
                group["params"] = [p for p in group["params"] if not remote.is_remote(p)]
            try:
                with training.without_steps():
                    return original(optim, *args, **kwargs)
            finally:
                for group, parameters in zip(optim.param_groups, kept, strict=True):
                    group["params"] = parameters

        return _init_optim_state

    wrap(state_dict, "_init_optim_state", make)
