"""The daemon's optimizer state in torch's own format: state_dict() and load_state_dict()."""

from __future__ import annotations

from typing import Any

import torch
from torch.optim import Optimizer

from .adapter import LoraTensor
from .errors import CoprocError, refusal
from .placeholder import lora_tensor
from .step import in_order, number_of, reset_state, take_state, trained_by
from .wire import EXP_AVG, EXP_AVG_SQ


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
    for adapter in in_order(trained_by(optimizer)):
        take_state(optimizer, adapter)
    state = dict(state_dict["state"])
    for number, parameter in zip(saved, mine, strict=True):
        tensor = lora_tensor(parameter)
        if tensor is not None:
            _import_tensor(tensor, state.pop(number, None), number)
    return {**state_dict, "state": state}


def _import_tensor(tensor: LoraTensor, state: dict[str, Any] | None, number: int) -> None:
    if not state:
        reset_state(tensor)  # The state that is loaded knows nothing of it: back to the beginning.
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
    tensor.write_t(int(number_of(state["step"])))
