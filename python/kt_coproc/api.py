"""The public functions; see the package's text and python/README.md."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from . import _autoload, connection, errors, experts, job, patching, same_model, swap
from .adapter import Binding
from .connection import Client
from .placeholder import lora_tensor
from .wire import GRAD

_WORLD: Any = object()


def connect(address: str | None = None) -> Client:
    """Connects to the daemon, or shares the connection this process already has.

    Args:
        address: "auto" or "unix:/path/kt.sock"; None: KT_COPROC, else "auto".

    Returns:
        A Client, also usable in a `with` statement. The session ends when the last user of it in this process closes.

    Raises:
        CoprocError: no daemon there, it is still loading, or the address is invalid (it is quoted).
    """
    _install()
    return connection.open_client(address)


def stats(client: Client | None = None) -> dict[str, Any]:
    """The daemon's status: the object that `kt-coproc status --json` prints."""
    return (client or default()).stats()


def default() -> Client:
    _install()
    return connection.default_client()


def attach(model: nn.Module, client: Client | None = None) -> nn.Module:
    """Moves the routed experts of a loaded model to the daemon: the line of code for people who do not want to set
    KT_COPROC. Call it before get_peft_model, and before DistributedDataParallel.

    Args:
        model: a transformers model that was loaded from the checkpoint the daemon serves. Changed in place; its own
            expert weights are freed.
        client: from `connect()`; default: the one KT_COPROC names, else "auto".

    Returns:
        model.

    Raises:
        CoprocModelMismatch: the model was not loaded from the daemon's checkpoint. Names both.
        CoprocError: there is nothing to attach, or the experts compute something the daemon does not.
    """
    client = client or default()
    if not swap.routed_experts(model):
        if experts.remote_modules(model):
            return model  # KT_COPROC was set, or this is the second call.
        raise errors.refusal(
            f"{type(model).__name__} has no routed experts",
            "no module holds stacked expert weights",
            "attach a mixture-of-experts model",
        )
    if any(type(module).__name__ == "ParamWrapper" for module in model.modules()):
        raise errors.refusal(
            "cannot attach a model that has adapters on its experts",
            "PEFT's parameters would stay behind in this process",
            "call kt_coproc.attach(model) before get_peft_model",
        )
    path = str(getattr(getattr(model, "config", None), "name_or_path", ""))
    files = same_model.checkpoint_files(path)
    same_model.require_same_model(client, type(model).__name__, path, files)
    same_model.require_loaded_from(client, model, path, files)
    dtype = next((p.dtype for p in model.parameters() if p.is_floating_point()), None)
    swap.swap(model, Binding(client))
    swap.add_placeholders(model, dtype)
    return model


def join(process_group: Any = _WORLD) -> None:
    """Tells the daemon which ranks train together, for scripts that use neither DDP nor FSDP2. Collective.

    Args:
        process_group: a torch.distributed process group; left out: the default group. None: this rank trains alone on
            purpose, although torch.distributed has several ranks.

    Raises:
        Disagreement: the ranks' adapters differ, or gradients or activations are pending.
        CoprocError: torch.distributed is not initialised.
    """
    for session in connection.live_connections() or [default().connection]:
        if process_group is None:
            session.solo = True
            continue
        if not (torch.distributed.is_available() and torch.distributed.is_initialized()):
            raise errors.refusal(
                "kt_coproc.join() needs torch.distributed",
                "no process group is initialised",
                "call torch.distributed.init_process_group() first",
            )
        job.join(session, None if process_group is _WORLD else process_group)


def expert_gradients(model: nn.Module) -> dict[str, torch.Tensor]:
    """The daemon's gradient sums of a model's expert adapters, for tests and debugging.

    Args:
        model: a PeftModel, or anything that contains one.

    Returns:
        Parameter name (as in model.named_parameters()) -> float32 CPU tensor of PEFT's shape. The sum over
        micro-batches and over the job's ranks since the last optimizer step or zero_grad: neither averaged over ranks
        nor clipped.
    """
    found = {}
    for name, parameter in model.named_parameters():
        tensor = lora_tensor(parameter)
        if tensor is not None:
            found[name] = tensor.read(GRAD)
    return found


def _install() -> None:
    """What scripts do with remote experts goes through the hooks, also where KT_COPROC is not set."""
    _autoload.install()
    patching.raise_failure()
