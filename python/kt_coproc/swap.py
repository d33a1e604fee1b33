"""Which modules of a model hold routed experts, what they compute that the daemon does not, and the swap.

A loaded model's experts modules keep their names and become instances of a subclass of RemoteExperts *and* of their own
class, so isinstance, attributes and matching by name stay true. Their two parameters are placeholders (placeholder.py).
"""

from __future__ import annotations

import contextlib
import re
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import nn

from . import errors, gating, placeholder
from .adapter import PARAMETER_NAMES, Binding
from .experts import RemoteExperts, expert_shapes, remote_modules

_LAYER_NAME = re.compile(r"(?:^|\.)layers\.(\d+)\.")
_swapped_classes: dict[type, type] = {}


def _swapped(cls: type) -> type:
    if cls not in _swapped_classes:
        # The original forward must not be found before ours: RemoteExperts comes first.
        _swapped_classes[cls] = type("KtCoproc" + cls.__name__, (RemoteExperts, cls), {"__module__": cls.__module__})
    return _swapped_classes[cls]


def is_swappable(module: nn.Module) -> bool:
    """The layout of transformers v5: gate_up_proj and down_proj, stacked over experts."""
    parameters = _stacked(module)
    stacked = all(p.dim() == 3 and not placeholder.is_remote(p) for p in parameters.values())
    return stacked and len(parameters) == len(PARAMETER_NAMES)


def _stacked(module: nn.Module) -> dict[str, nn.Parameter]:
    """Those of gate_up_proj and down_proj that the module has."""
    return {name: p for name in PARAMETER_NAMES if (p := module._parameters.get(name)) is not None}


def routed_experts(model: nn.Module) -> list[tuple[str, nn.Module]]:
    """Modules that hold routed experts in any layout: stacked parameters, or a list of per-expert layers."""
    found = []
    for name, module in model.named_modules():
        last = name.rpartition(".")[2]
        stacked = any(p is not None and p.dim() == 3 for p in module._parameters.values())
        listed = isinstance(module, (nn.ModuleList, nn.ModuleDict)) and len(module) > 1
        if (
            last == "experts"
            and (stacked or listed)
            and not isinstance(module, RemoteExperts)
            or is_swappable(module)
            and not isinstance(module, RemoteExperts)
        ):
            found.append((name, module))
    return found


def layer_number(name: str) -> int:
    """Of a module's name, "model.layers.3.mlp.experts"; -1 where it has none."""
    match = _LAYER_NAME.search(name)
    return int(match[1]) if match else -1


def _differences(module: nn.Module, model: dict[str, Any]) -> list[str]:
    """What a module does that the daemon does not."""
    if not is_swappable(module):
        return ["its parameters are not a stacked gate_up_proj and down_proj"]
    found = [
        reason
        for reason, there in (
            ("biases", getattr(module, "has_bias", False)),
            ("transposed weights", getattr(module, "is_transposed", False)),
            ("interleaved gate and up", not getattr(module, "is_concatenated", True)),
            ("no gate", not getattr(module, "has_gate", True)),
            ("a norm after each expert", getattr(module, "has_post_expert_norm", False)),
            ("expert parallelism", getattr(module, "_is_expert_parallel", False)),
        )
        if there
    ]
    if not found and (gating_difference := gating.difference(module, model)):
        found.append(gating_difference)
    parameters = _stacked(module)
    for name, (shape, _) in expert_shapes(model, torch.float32).items():
        if parameters[name].shape != shape:
            found.append(f"{name} of shape {list(parameters[name].shape)}, the daemon serves {list(shape)}")
    return found


def swap(model: nn.Module, binding: Binding) -> int:
    """Makes the experts modules of a model remote; they lose their parameters. Returns how many there were.

    Raises:
        CoprocError: a module computes something else than the daemon would. Nothing was changed.
    """
    served = binding.client.connection.model
    modules = []
    for name, module in routed_experts(model):
        wrong = _differences(module, served)
        layer = layer_number(name)
        if not wrong and layer not in served["moe_layers"]:
            wrong = [f"layer {layer} where the daemon has layers {list(served['moe_layers'])}"]
        if wrong:
            raise errors.refusal(
                f"the experts {name} ({type(module).__name__}) cannot run in the co-process",
                "they have " + ", ".join(wrong),
                "set KT_COPROC_OTHER_MODELS=plain to run models the daemon does not serve in this process",
            )
        modules.append((module, layer))
    for module, layer in modules:
        parameters = _stacked(module)
        for name in parameters:
            del module._parameters[name]
        module.__class__ = _swapped(type(module))
        assert isinstance(module, RemoteExperts)
        module._kt_bind(binding, layer, {name: (p.shape, p.dtype) for name, p in parameters.items()})
    return len(modules)


def add_placeholders(model: nn.Module, dtype: torch.dtype | None = None) -> None:
    """Gives remote modules their placeholder parameters: PEFT looks for them, and parameter counts include them. Not
    earlier than after loading: transformers' device maps and loader must not see them."""
    for name, module in remote_modules(model):
        if all(parameter in module._parameters for parameter in module._kt_shapes):
            continue
        parent = model.get_submodule(name.rpartition(".")[0])
        beside: Sequence[torch.Tensor] = [p for p in parent.parameters() if not placeholder.is_remote(p)]
        device = next((p.device for p in beside), None) or next(
            (p.device for p in model.parameters() if not placeholder.is_remote(p)), torch.device("cpu")
        )
        module._kt_register_placeholders(device, dtype)


@contextlib.contextmanager
def without_base_weights(*models: nn.Module) -> Iterator[None]:
    """Inside, the models do not have the placeholders of their experts' base weights."""
    taken = []
    for model in models:
        for _, module in remote_modules(model):
            taken += [(module, name, module._parameters.pop(name)) for name in module._kt_shapes]
    try:
        yield
    finally:
        for module, name, parameter in taken:
            module._parameters[name] = parameter
