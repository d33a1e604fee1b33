"""torch's wrappers that train with several ranks: DDP and FSDP2 join them, the others are refused."""

from __future__ import annotations

import inspect
from collections.abc import Iterable
from types import ModuleType
from typing import Any

import torch
from torch import nn

from .. import job
from ..adapter import Adapter
from ..errors import refusal
from ..experts import remote_modules
from ..patching import Function, wrap
from ..placeholder import is_remote, lora_tensor


def patch() -> None:
    import torch.nn.parallel.distributed as ddp

    # Parameters to leave out have a (private, stable) attribute, _ddp_params_and_buffers_to_ignore; that wrapping joins
    # the ranks has no hook.
    wrap(ddp.DistributedDataParallel, "__init__", _ddp_init)
    wrap(nn.DataParallel, "__init__", _refuse_wrapper("nn.DataParallel", "DistributedDataParallel"))


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
        tensor = lora_tensor(parameter)
        if tensor is not None and tensor.adapter not in found:
            found.append(tensor.adapter)
    return found


def _join(modules: Iterable[nn.Module], group: Any) -> None:
    """Joins the ranks, if one of the modules has remote experts; their adapters exist in the daemon afterwards."""
    connections = []
    for module in modules:
        for adapter in _adapters(module):
            adapter.ensure()
        for _, remote_module in remote_modules(module):
            connection = remote_module._kt_binding.client.connection
            if connection not in connections:
                connections.append(connection)
    for connection in connections:
        job.join(connection, group)


def _ddp_init(original: Function) -> Function:
    signature = inspect.signature(original)

    def __init__(self: Any, module: nn.Module, *args: Any, **kwargs: Any) -> None:
        modules = [m for _, m in remote_modules(module)]
        if modules:
            given = signature.bind(self, module, *args, **kwargs).arguments
            mesh = given.get("device_mesh")
            _join([module], mesh.get_group() if mesh is not None else given.get("process_group"))
            names = {name for name, parameter in module.named_parameters() if is_remote(parameter)}
            ignored = set(getattr(module, "_ddp_params_and_buffers_to_ignore", ())) | names
            module._ddp_params_and_buffers_to_ignore = ignored  # type: ignore[assignment]
            if not any(p.requires_grad for name, p in module.named_parameters() if name not in ignored):
                device = next((p.device for _, p in module.named_parameters()), torch.device("cpu"))
                anchor = _Anchor(device)
                module.add_module("_kt_ddp_anchor", anchor)
                for experts_module in modules:
                    experts_module.use_anchor(anchor.weight)
        original(self, module, *args, **kwargs)

    return __init__


def _refuse_wrapper(name: str, instead: str) -> Any:
    def make(original: Function) -> Function:
        def __init__(self: Any, module: nn.Module, *args: Any, **kwargs: Any) -> None:
            if remote_modules(module):
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
            found = {p for m in modules for p in m.parameters() if is_remote(p)}
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
