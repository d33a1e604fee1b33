"""Every place where torch, transformers, PEFT and accelerate are changed: one module for each project."""

from __future__ import annotations

from collections.abc import Callable
from types import ModuleType

from . import accelerate_hooks, peft_hooks, torch_hooks, transformers_hooks

patch_torch = torch_hooks.patch

# Module -> what is done to it right after its import (or now, when it is imported already).
POST_IMPORT: dict[str, Callable[[ModuleType], None]] = {
    "torch.distributed.checkpoint.state_dict": torch_hooks.patch_distributed_checkpoint,
    "torch.distributed.fsdp": torch_hooks.patch_fsdp,
    "transformers.modeling_utils": transformers_hooks.patch,
    "peft.tuners.lora.layer": peft_hooks.patch_layer,
    "peft.tuners.tuners_utils": peft_hooks.patch_tuners,
    "accelerate.accelerator": accelerate_hooks.patch,
}
