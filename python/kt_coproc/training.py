"""The optimizer step of expert adapters: STEP, gradient clipping, DISCARD, and optimizer state in torch's own format.

torch's optimizers skip the placeholders (their .grad is None); what they would have done is done by the daemon, at the
same points of the program and with the hyperparameters of the same parameter group.
"""

from __future__ import annotations

import contextlib
import inspect
import weakref
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
from torch.optim import Optimizer

from . import distributed
from .adapter import EXP_AVG, EXP_AVG_SQ, Adapter, LoraTensor
from .errors import CoprocError, refusal
from .remote import is_remote, lora_tensor

_GROUPS_MAX = 64  # shm::kNumGroupsMax.

# Which optimizer a tensor was last given to.
_owners: weakref.WeakKeyDictionary[LoraTensor, weakref.ref[Optimizer]] = weakref.WeakKeyDictionary()
_suppressed = False


@contextlib.contextmanager
def without_steps() -> Iterator[None]:
    """Inside, optimizer.step() sends nothing: somebody only wants the optimizer's state to exist."""
    global _suppressed
    before, _suppressed = _suppressed, True
    try:
        yield
    finally:
        _suppressed = before


# --------------------------------------------------------------------------------------------- which optimizers,
# refusals
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


# -------------------------------------------------------------------------------------------------------------------
# STEP
def _trained_by(optimizer: Optimizer) -> dict[Adapter, dict[LoraTensor, int]]:
    """adapter -> tensor -> number of its parameter group, for what this optimizer trains."""
    found: dict[Adapter, dict[LoraTensor, int]] = {}
    for number, group in enumerate(optimizer.param_groups):
        for parameter in group["params"]:
            tensor = lora_tensor(parameter)
            if tensor is not None and parameter.requires_grad:
                found.setdefault(tensor.adapter, {})[tensor] = number
    return found


def _number(value: Any) -> float:
    return float(value.item()) if isinstance(value, torch.Tensor) else float(value)


def _hyperparameters(optimizer: Optimizer, group: dict[str, Any]) -> tuple[float, float, float, float, float, bool]:
    beta1, beta2 = group["betas"][:2]
    return (
        _number(group["lr"]),
        _number(beta1),
        _number(beta2),
        _number(group["eps"]),
        _number(group["weight_decay"]),
        bool(_is_decoupled(optimizer, group)),
    )


def _take_state(optimizer: Optimizer, adapter: Adapter) -> None:
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
            _reset_state(tensor)
    adapter.optimizer = weakref.ref(optimizer)


def _reset_state(tensor: LoraTensor) -> None:
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
    if _suppressed or isinstance(getattr(optimizer, "optimizer", None), Optimizer):
        return  # A wrapper around an optimizer (accelerate): the inner one's step() comes here by itself.
    trained = _trained_by(optimizer)
    if not trained:
        return
    if kwargs.get("closure") is not None or (len(args) > 1 and args[1] is not None):
        raise refusal(
            "optimizer.step(closure) refused",
            "its backward would come after the co-process has stepped",
            "call backward() first and then step() without a closure",
        )
    for adapter in _in_order(trained):
        _step(optimizer, adapter, trained[adapter])


def _in_order(adapters: Iterable[Adapter]) -> list[Adapter]:
    """Those that exist in the daemon, in the same order on every rank."""
    return sorted((a for a in adapters if a.id is not None), key=lambda adapter: adapter.required_id)


def _step(optimizer: Optimizer, adapter: Adapter, tensors: dict[LoraTensor, int]) -> None:
    connection = adapter.connection
    distributed.require_membership(connection, "a step")
    if distributed.world_size(connection) == 1 and adapter.id not in adapter.session.accumulated:
        return  # As torch with gradients None. With more ranks every one of them has to come.
    _require_whole_adapter(optimizer, adapter, tensors)
    numbers = sorted(set(tensors.values()))
    if len(numbers) > _GROUPS_MAX:
        raise refusal(
            "too many parameter groups hold expert adapters",
            f"{len(numbers)}, the limit is {_GROUPS_MAX}",
            "merge parameter groups with equal hyperparameters",
        )
    for number in numbers:
        reason = _unsupported(optimizer, optimizer.param_groups[number])
        if reason is not None:
            raise refusal("cannot step expert adapters", reason, "use torch.optim.AdamW or Adam")
    _take_state(optimizer, adapter)
    distributed.reduce_gradients(adapter)
    adapter.session.step(
        adapter.required_id,
        adapter.coefficient / distributed.world_size(connection),
        [_hyperparameters(optimizer, optimizer.param_groups[number]) for number in numbers],
        adapter.group_of({tensor: numbers.index(number) for tensor, number in tensors.items()}),
    )
    adapter.coefficient, adapter.reduced = 1.0, False


# ----------------------------------------------------------------------------------------------------------------
# DISCARD
def discard(parameters: Iterable[Any]) -> None:
    """zero_grad() of these parameters: gradients that were summed since the last step are dropped. Nothing is sent when
    there are none, so a zero_grad() right after step() cannot race with another rank's next backward."""
    adapters = {tensor.adapter for tensor in map(lora_tensor, parameters) if tensor is not None}
    for adapter in _in_order(adapters):
        adapter.discard()


# ---------------------------------------------------------------------------------------------------------------
# clipping
def clip_grad_norm(
    original: Callable[..., torch.Tensor],
    parameters: Any,
    max_norm: float,
    norm_type: float = 2.0,
    error_if_nonfinite: bool = False,
    foreach: bool | None = None,
) -> torch.Tensor:
    """torch.nn.utils.clip_grad_norm_ over parameters here and in the daemon together: N = sqrt(N_here² + ‖S‖²/W²)."""
    everything = [parameters] if isinstance(parameters, torch.Tensor) else list(parameters)
    chosen: dict[Adapter, dict[LoraTensor, int]] = {}
    for parameter in everything:
        tensor = lora_tensor(parameter)
        if tensor is not None and parameter.requires_grad:
            chosen.setdefault(tensor.adapter, {})[tensor] = 0
    if not _in_order(chosen):
        return original(everything, max_norm, norm_type, error_if_nonfinite, foreach)
    if float(norm_type) != 2.0:
        raise refusal(
            "cannot clip the gradients of expert adapters with this norm",
            f"norm_type is {norm_type}, the co-process computes the 2-norm",
            "use norm_type=2",
        )
    with torch.no_grad():
        here = [parameter for parameter in everything if not is_remote(parameter)]
        gradients = [parameter.grad for parameter in here if parameter.grad is not None]
        norm_here = torch.nn.utils.get_total_norm(gradients, 2.0, False, foreach)
        full = norm_here.full_tensor() if hasattr(norm_here, "full_tensor") else norm_here
        squared = sum(_squared_norm(adapter, chosen[adapter]) for adapter in _in_order(chosen))
        norm_there = torch.tensor(squared**0.5, dtype=torch.float32, device=full.device)
        total = torch.linalg.vector_norm(torch.stack([full.float(), norm_there]), 2.0)
        if error_if_nonfinite and not bool(torch.isfinite(total)):
            raise RuntimeError(
                "The total norm of order 2.0 for gradients from `parameters` is non-finite, so it cannot be clipped."
            )
        _clip_here(norm_here, here, max_norm, total, foreach)
        coefficient = float(torch.clamp(float(max_norm) / (total + 1e-6), max=1.0))
        if coefficient != 1.0:
            for adapter in _in_order(chosen):
                _require_all_tensors(adapter, chosen[adapter])
                adapter.coefficient *= coefficient
        return total


def _clip_here(
    norm_here: torch.Tensor, here: list[Any], max_norm: float, total: torch.Tensor, foreach: bool | None
) -> None:
    if hasattr(norm_here, "full_tensor"):
        from torch.distributed.tensor import DTensor

        mesh = norm_here.device_mesh
        torch.nn.utils.clip_grads_with_norm_(here, max_norm, DTensor.from_local(total, mesh), foreach)
    else:
        torch.nn.utils.clip_grads_with_norm_(here, max_norm, total, foreach)


def _squared_norm(adapter: Adapter, tensors: dict[LoraTensor, int]) -> float:
    distributed.require_membership(adapter.connection, "clipping")
    distributed.reduce_gradients(adapter)
    squared = adapter.session.squared_norm(adapter.required_id, adapter.group_of(tensors))
    return squared * (adapter.coefficient / distributed.world_size(adapter.connection)) ** 2


def _require_all_tensors(adapter: Adapter, tensors: dict[LoraTensor, int]) -> None:
    missing = [tensor for tensor in adapter.tensors() if tensor not in tensors and tensor in _owners]
    if missing:
        raise refusal(
            f"cannot clip a part of adapter {adapter.name!r}",
            f"{len(missing)} of its tensors that an optimizer trains are not among the parameters; one coefficient "
            "scales the whole adapter",
            "give clip_grad_norm_ all parameters of the model",
        )


def refuse_remote(parameters: Any, function: str) -> None:
    """For torch functions that change gradients in place, which these parameters do not have here."""
    everything = [parameters] if isinstance(parameters, torch.Tensor) else list(parameters)
    for parameter in everything:
        if lora_tensor(parameter) is not None and parameter.requires_grad:
            raise refusal(
                f"{function} cannot include expert adapters",
                "their gradients are in the co-process",
                "use torch.nn.utils.clip_grad_norm_, called through its module and not imported before "
                "kt_coproc was installed",
            )


# -------------------------------------------------------------------------------------------------- optimizer state
def _numbered(param_groups: list[dict[str, Any]]) -> dict[int, Any]:
    """torch's own numbering of an optimizer's parameters: number -> parameter."""
    numbers: dict[int, int] = {}
    ordered: dict[int, Any] = {}
    start = 0
    for group in param_groups:
        for offset, parameter in enumerate(group["params"]):
            if id(parameter) not in numbers:
                numbers[id(parameter)] = start + offset
                ordered[start + offset] = parameter
        start += len(group["params"])
    return ordered


def export_state(optimizer: Optimizer, state_dict: dict[str, Any]) -> None:
    """Adds the daemon's moments to an optimizer's state_dict, exactly as torch.optim.AdamW would have them, so that
    plain PEFT can resume from it. Nothing before the first step."""
    state = state_dict["state"]
    for number, parameter in _numbered(optimizer.param_groups).items():
        tensor = lora_tensor(parameter)
        if tensor is None or tensor.adapter.optimizer is None or tensor.adapter.optimizer() is not optimizer:
            continue
        steps = tensor.t
        if steps == 0:
            continue
        state[number] = {
            "step": torch.tensor(float(steps)),
            "exp_avg": tensor.read(EXP_AVG).to(parameter.device),
            "exp_avg_sq": tensor.read(EXP_AVG_SQ).to(parameter.device),
        }
    if all(isinstance(key, int) for key in state):
        state_dict["state"] = dict(sorted(state.items()))  # The order in which torch would have them.


def import_state(optimizer: Optimizer, state_dict: dict[str, Any]) -> dict[str, Any]:
    """Sends the state of remote parameters to the daemon. Returns the state_dict without them, for torch."""
    saved = [number for group in state_dict["param_groups"] for number in group["params"]]
    mine = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    if len(saved) != len(mine) or not any(lora_tensor(parameter) for parameter in mine):
        return state_dict  # torch says what does not fit.
    for adapter in _in_order(_trained_by(optimizer)):
        _take_state(optimizer, adapter)
    state = dict(state_dict["state"])
    for number, parameter in zip(saved, mine, strict=True):
        tensor = lora_tensor(parameter)
        if tensor is not None:
            _import_tensor(tensor, state.pop(number, None), number)
    return {**state_dict, "state": state}


def _import_tensor(tensor: LoraTensor, state: dict[str, Any] | None, number: int) -> None:
    if not state:
        _reset_state(tensor)  # The state that is loaded knows nothing of it: back to the beginning.
        return
    missing = {"step", "exp_avg", "exp_avg_sq"} - set(state)
    if missing:
        raise refusal(
            f"cannot load the optimizer state of parameter {number}",
            f"it has no {', '.join(sorted(missing))}, so it is not AdamW's",
            "load a state that torch.optim.AdamW or Adam saved",
            CoprocError,
        )
    tensor.write(state["exp_avg"], EXP_AVG)
    tensor.write(state["exp_avg_sq"], EXP_AVG_SQ)
    tensor.write_t(int(_number(state["step"])))
