"""Whether a model that was loaded here is the one that the daemon serves, by the files of its checkpoint."""

from __future__ import annotations

import os

import torch
from torch import nn

from . import errors, fingerprint, swap
from .connection import Client
from .expert_names import expert_names


def require_loaded_from(client: Client, model: nn.Module, directory: str, files: list[str]) -> None:
    """A model that was built from a config, or trained, has the checkpoint's name and not its weights."""
    rows = fingerprint.first_rows(files, expert_names(client.connection.model))
    dtypes = {"BF16": torch.bfloat16, "F16": torch.float16, "F32": torch.float32}
    for name, module in swap.routed_experts(model):
        layer = swap.layer_number(name)
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
    ours = fingerprint.fingerprint(directory, files, expert_names(served))
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
