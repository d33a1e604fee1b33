"""The optimizer step of expert adapters: which optimizer owns what, STEP and DISCARD.

torch's optimizers skip the placeholders (their .grad is None); what they would have done is done by the daemon, at the
same points of the program and with the hyperparameters of the same parameter group.
"""

from __future__ import annotations

import inspect
import weakref
from collections.abc import Iterable
from typing import Any

import torch
from torch.optim import Optimizer

from . import job
from .adapter import Adapter, LoraTensor
from .errors import refusal
from .placeholder import is_remote, lora_tensor
from .scopes import are_steps_suppressed
from .wire import EXP_AVG, EXP_AVG_SQ, NUM_GROUPS_MAX

# Which optimizer a tensor was last given to.
_owners: weakref.WeakKeyDictionary[LoraTensor, weakref.ref[Optimizer]] = weakref.WeakKeyDictionary()


def _is_decoupled(optimizer: Optimizer, group: dict[str, Any]) -> bool | None:
    """AdamW's weight decay (True), Adam's (False), or None: an optimizer the daemon does not have."""
    cls = type(optimizer)
    if isinstance(optimizer, torch.optim.Adam) and inspect.unwrap(cls.step) is inspect.unwrap(torch.optim.Adam.step):
        return bool(group.get("decoupled_weight_decay", isinstance(optimizer, torch.optim.AdamW)))
    name = cls.__name__
    if cls.__module__.startswith("bitsandbytes.") and name.removeprefix("Paged").startswith("Adam"):
        return None if "AdEMA" in name else True  # Its kernels decouple the decay under both names.
    if cls.__module__.startswith("torchao.") and name.startswith("Adam"):
        return bool(getattr(optimizer, "is_adamw", name.startswith("AdamW")))
    return None


def _unsupported(optimizer: Optimizer, group: dict[str, Any]) -> str | None:
    if _is_decoupled(optimizer, group) is None:
        return f"{type(optimizer).__name__} is neither Adam nor AdamW"
    for option in ("amsgrad", "maximize", "differentiable"):
        if group.get(option):
            return f"{type(optimizer).__name__} with {option}=True is not implemented there"
    return None


def check_group(optimizer: Optimizer, group: dict[str, Any]) -> None:
    """Refuses, when an optimizer is made, what the daemon could not do at its first step.

    Raises:
        CoprocError: the optimizer is not Adam or AdamW, or the group holds base weights of experts.
    """
    for parameter in group["params"]:
        if not is_remote(parameter) or not parameter.requires_grad:
            continue
        tensor = lora_tensor(parameter)
        if tensor is None:
            raise refusal(
                "the base weights of routed experts cannot be trained",
                "they are read-only in the co-process, and one of them was given to an optimizer",
                "train LoRA adapters (peft), or freeze the experts: parameter.requires_grad_(False)",
            )
        reason = _unsupported(optimizer, group)
        if reason is not None:
            raise refusal(
                "cannot train expert adapters with this optimizer",
                f"they are stepped in the co-process, and {reason}",
                "use torch.optim.AdamW or Adam (TrainingArguments(optim='adamw_torch'))",
            )
        _owners[tensor] = weakref.ref(optimizer)


def trained_by(optimizer: Optimizer) -> dict[Adapter, dict[LoraTensor, int]]:
    """adapter -> tensor -> number of its parameter group, for what this optimizer trains."""
    found: dict[Adapter, dict[LoraTensor, int]] = {}
    for number, group in enumerate(optimizer.param_groups):
        for parameter in group["params"]:
            tensor = lora_tensor(parameter)
            if tensor is not None and parameter.requires_grad:
                found.setdefault(tensor.adapter, {})[tensor] = number
    return found


def number_of(value: Any) -> float:
    return float(value.item()) if isinstance(value, torch.Tensor) else float(value)


def _hyperparameters(optimizer: Optimizer, group: dict[str, Any]) -> tuple[float, float, float, float, float, bool]:
    beta1, beta2 = group["betas"][:2]
    return (
        number_of(group["lr"]),
        number_of(beta1),
        number_of(beta2),
        number_of(group["eps"]),
        number_of(group["weight_decay"]),
        bool(_is_decoupled(optimizer, group)),
    )


def take_state(optimizer: Optimizer, adapter: Adapter) -> None:
    """Moments belong to an optimizer in torch, and to the adapter in the daemon: another optimizer starts afresh."""
    before = adapter.optimizer() if adapter.optimizer is not None else None
    if before is optimizer:
        return
    if optimizer in adapter.former_optimizers:
        raise refusal(
            f"two optimizers step adapter {adapter.name!r} in turn",
            "the co-process keeps one set of moments for an adapter",
            "use one optimizer for an adapter",
        )
    if before is not None:
        adapter.former_optimizers.add(before)
    if adapter.optimizer is not None:
        for tensor in adapter.tensors():
            reset_state(tensor)
    adapter.optimizer = weakref.ref(optimizer)


def reset_state(tensor: LoraTensor) -> None:
    if tensor.t > 0:
        tensor.write(torch.zeros(tensor.shape), EXP_AVG)
        tensor.write(torch.zeros(tensor.shape), EXP_AVG_SQ)
        tensor.write_t(0)


def _require_whole_adapter(optimizer: Optimizer, adapter: Adapter, tensors: dict[LoraTensor, int]) -> None:
    for tensor in adapter.tensors():
        owner = _owners.get(tensor)
        other = owner() if owner is not None else None
        if tensor not in tensors and other is not None and other is not optimizer:
            raise refusal(
                f"adapter {adapter.name!r} is spread over several optimizers",
                "the co-process steps an adapter as a whole, and consumes all its gradients",
                "put the adapter's tensors into parameter groups of one optimizer",
            )


def before_step(optimizer: Optimizer, args: Any, kwargs: Any) -> None:
    """The pre-hook of every optimizer's step(): blocks until the daemon has stepped, so that an error is raised before
    any other parameter changed.

    Raises:
        CoprocError: refused, see the message; CoprocDied, RankDied and Disagreement are among them.
    """
    if are_steps_suppressed() or isinstance(getattr(optimizer, "optimizer", None), Optimizer):
        return  # A wrapper around an optimizer (accelerate): the inner one's step() comes here by itself.
    trained = trained_by(optimizer)
    if not trained:
        return
    if kwargs.get("closure") is not None or (len(args) > 1 and args[1] is not None):
        raise refusal(
            "optimizer.step(closure) refused",
            "its backward would come after the co-process has stepped",
            "call backward() first and then step() without a closure",
        )
    for adapter in in_order(trained):
        _step(optimizer, adapter, trained[adapter])


def in_order(adapters: Iterable[Adapter]) -> list[Adapter]:
    """Those that exist in the daemon, in the same order on every rank."""
    return sorted((a for a in adapters if a.id is not None), key=lambda adapter: adapter.required_id)


def _step(optimizer: Optimizer, adapter: Adapter, tensors: dict[LoraTensor, int]) -> None:
    connection = adapter.connection
    connection.collect()
    job.require_membership(connection, "a step")
    if job.world_size(connection) == 1 and adapter.id not in adapter.session.accumulated:
        return  # As torch with gradients None. With more ranks every one of them has to come.
    _require_whole_adapter(optimizer, adapter, tensors)
    numbers = sorted(set(tensors.values()))
    if len(numbers) > NUM_GROUPS_MAX:
        raise refusal(
            "too many parameter groups hold expert adapters",
            f"{len(numbers)}, the limit is {NUM_GROUPS_MAX}",
            "merge parameter groups with equal hyperparameters",
        )
    for number in numbers:
        reason = _unsupported(optimizer, optimizer.param_groups[number])
        if reason is not None:
            raise refusal("cannot step expert adapters", reason, "use torch.optim.AdamW or Adam")
    take_state(optimizer, adapter)
    job.reduce_gradients(adapter)
    adapter.session.step(
        adapter.required_id,
        adapter.coefficient / job.world_size(connection),
        [_hyperparameters(optimizer, optimizer.param_groups[number]) for number in numbers],
        adapter.group_of({tensor: numbers.index(number) for tensor, number in tensors.items()}),
    )
    adapter.coefficient, adapter.reduced = 1.0, False


def discard(parameters: Iterable[Any]) -> None:
    """zero_grad() of these parameters: gradients that were summed since the last step are dropped. Nothing is sent when
    there are none, so a zero_grad() right after step() cannot race with another rank's next backward."""
    adapters = {tensor.adapter for tensor in map(lora_tensor, parameters) if tensor is not None}
    for adapter in in_order(adapters):
        adapter.discard()


def is_trained(tensor: LoraTensor) -> bool:
    """Whether an optimizer was given the tensor."""
    return tensor in _owners
