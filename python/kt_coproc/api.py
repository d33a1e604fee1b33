"""The public functions; see the package's text and python/README.md."""

from __future__ import annotations

import os
from typing import Any

import torch
from torch import nn

from . import adapter, client, distributed, errors, experts, fingerprint, remote
from .adapter import Binding
from .client import Client

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
    return client.open_client(address)


def stats(client: Client | None = None) -> dict[str, Any]:
    """The daemon's status: the object that `kt-coproc status --json` prints."""
    return (client or default()).stats()


def default() -> Client:
    return client.default_client()


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
    if not experts.routed_experts(model):
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
    files = checkpoint_files(path)
    require_same_model(client, type(model).__name__, path, files)
    _require_loaded_from(model, path, files)
    dtype = next((p.dtype for p in model.parameters() if p.is_floating_point()), None)
    experts.swap(model, Binding(client))
    experts.add_placeholders(model, dtype)
    return model


def _require_loaded_from(model: nn.Module, directory: str, files: list[str]) -> None:
    """A model that was built from a config, or trained, has the checkpoint's name and not its weights."""
    rows = fingerprint.first_rows(files)
    dtypes = {"BF16": torch.bfloat16, "F16": torch.float16, "F32": torch.float32}
    for name, module in experts.routed_experts(model):
        layer = experts.layer_number(name)
        weights = getattr(module, "gate_up_proj", None)
        if weights is None or layer not in rows or rows[layer][0] not in dtypes:
            continue  # swap() says what is wrong with it.
        expected = torch.frombuffer(bytearray(rows[layer][1]), dtype=dtypes[rows[layer][0]]).to(weights.dtype)
        expert = fingerprint.sampled_expert(layer, weights.shape[0])
        if weights.is_meta or not torch.equal(weights[expert, 0].detach().cpu(), expected):
            raise errors.refusal(
                f"the experts {name} of this {type(model).__name__} are not the co-process's",
                f"their weights differ from those in {directory}",
                "attach a model right after from_pretrained of the daemon's checkpoint",
                errors.CoprocModelMismatch,
            )


def checkpoint_files(directory: str) -> list[str]:
    """The safetensors files in a checkpoint's directory, as transformers would resolve them."""
    single = os.path.join(directory, "model.safetensors")
    if os.path.isfile(single):
        return [single]
    if not os.path.isdir(directory):
        return []
    names = sorted(name for name in os.listdir(directory) if name.endswith(".safetensors"))
    return [os.path.join(directory, name) for name in names]


def require_same_model(client: Client, what: str, directory: str, files: list[str]) -> None:
    """Raises CoprocModelMismatch, naming both, unless the files are the daemon's model."""
    served = client.connection.model
    ours = fingerprint.fingerprint(directory, files)
    if ours == served["fingerprint"]:
        return
    mine = "no fingerprint (not a checkpoint a co-process could serve)" if ours is None else f"fingerprint {ours[:16]}…"
    raise errors.refusal(
        f"{what} from {directory or 'no directory'} is not the model that the co-process serves",
        f"it has {mine}; the daemon serves {served['architecture']} from {served['path']}, "
        f"fingerprint {served['fingerprint'][:16]}…",
        f"run `kt-coproc run --model {directory or 'DIR'}`, or set KT_COPROC_OTHER_MODELS=plain to run other models "
        "in this process",
        errors.CoprocModelMismatch,
    )


def join(process_group: Any = _WORLD) -> None:
    """Tells the daemon which ranks train together, for scripts that use neither DDP nor FSDP2. Collective.

    Args:
        process_group: a torch.distributed process group; left out: the default group. None: this rank trains alone on
            purpose, although torch.distributed has several ranks.

    Raises:
        Disagreement: the ranks' adapters differ, or gradients or activations are pending.
        CoprocError: torch.distributed is not initialised.
    """
    connections = client.live_connections() or [default().connection]
    for connection in connections:
        if process_group is None:
            connection.solo = True
            continue
        if not (torch.distributed.is_available() and torch.distributed.is_initialized()):
            raise errors.refusal(
                "kt_coproc.join() needs torch.distributed",
                "no process group is initialised",
                "call torch.distributed.init_process_group() first",
            )
        distributed.join(connection, None if process_group is _WORLD else process_group)


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
        tensor = remote.lora_tensor(parameter)
        if tensor is not None:
            found[name] = tensor.read(adapter.GRAD)
    return found
