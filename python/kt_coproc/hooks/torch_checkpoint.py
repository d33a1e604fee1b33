"""torch.utils.checkpoint: the function it is given is wrapped in a Replay. torch.distributed.checkpoint: an optimizer's
state is made without a step in the daemon."""

from __future__ import annotations

import functools
from collections.abc import Callable
from types import ModuleType
from typing import Any

import torch
from torch.optim import Optimizer

from ..patching import Function, wrap
from ..placeholder import is_remote
from ..replay import Replay
from ..scopes import without_steps


def patch() -> None:
    import torch.utils.checkpoint as checkpointing

    # torch.utils.checkpoint has no hook around the function it runs.
    wrap(checkpointing, "checkpoint", wrap_checkpoint)


def wrap_checkpoint(original: Callable[..., Any]) -> Callable[..., Any]:
    """torch.utils.checkpoint.checkpoint, with the function it is given wrapped."""

    @functools.wraps(original)
    def checkpoint(function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        if not torch.is_grad_enabled() or torch.compiler.is_compiling():
            return original(function, *args, **kwargs)
        replay = Replay()

        def run(*inner_args: Any, **inner_kwargs: Any) -> Any:
            with replay:
                return function(*inner_args, **inner_kwargs)

        return original(run, *args, **kwargs)

    return checkpoint


def patch_distributed_checkpoint(state_dict: ModuleType) -> None:
    """torch makes an optimizer's state exist by stepping it with zero gradients and lr 0. In the daemon that would
    count as a step: the remote parameters are out of sight for its duration."""

    def make(original: Function) -> Function:
        def _init_optim_state(optim: Optimizer, *args: Any, **kwargs: Any) -> Any:
            kept = [list(group["params"]) for group in optim.param_groups]
            for group in optim.param_groups:
                group["params"] = [p for p in group["params"] if not is_remote(p)]
            try:
                with without_steps():
                    return original(optim, *args, **kwargs)
            finally:
                for group, parameters in zip(optim.param_groups, kept, strict=True):
                    group["params"] = parameters

        return _init_optim_state

    wrap(state_dict, "_init_optim_state", make)
