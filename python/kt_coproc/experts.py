"""The experts module of a model, served by the daemon.

A loaded model's experts modules keep their names and become instances of a subclass of ours *and* of their own class,
so isinstance, attributes and matching by name stay true. Their two parameters are placeholders (remote.py).
"""

from __future__ import annotations

import contextlib
import copy
import functools
import re
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import nn
from torch.nn import functional

from . import distributed, errors, remote, replay
from .adapter import PARAMETER_NAMES, Adapter, Binding
from .client import Client, Connection, default_client

_LAYER_NAME = re.compile(r"(?:^|\.)layers\.(\d+)\.")
# _native's modes of the op.
_PLAIN, _RECORD, _REPLAY = 0, 1, 2


def without_compilation(function: Callable[..., Any]) -> Callable[..., Any]:
    """torch.compiler.disable, applied at the first call: it imports the compiler, and this module is imported during
    `import torch`."""
    disabled: list[Callable[..., Any]] = []

    @functools.wraps(function)
    def call(*args: Any, **kwargs: Any) -> Any:
        if not disabled:
            disabled.append(torch.compiler.disable(function))
        return disabled[0](*args, **kwargs)

    return call


class RemoteExperts(nn.Module):
    """What a swapped experts module and MoEExperts have in common."""

    _kt_binding: Binding
    _kt_layer: int
    _kt_shapes: dict[str, tuple[torch.Size, torch.dtype]]

    @without_compilation  # Which adapter is active, and whether a checkpointed function is replayed, is Python state.
    def forward(
        self,
        hidden_states: torch.Tensor,
        top_k_index: torch.Tensor,
        top_k_weights: torch.Tensor,
        *,
        kt_adapter: Adapter | None = None,
        kt_trainable: bool = False,
    ) -> torch.Tensor:
        """Runs the experts of this layer.

        Args:
            hidden_states: [num_tokens, hidden_size], any float dtype, any device.
            top_k_index: [num_tokens, top_k] int64; an index of num_experts or above contributes zero.
            top_k_weights: [num_tokens, top_k].
            kt_adapter: the LoRA adapter to apply; our PEFT hook passes it.
            kt_trainable: whether backward adds to the adapter's gradients.

        Returns:
            [num_tokens, hidden_size] of hidden_states' dtype, on its device.

        Raises:
            CoprocDied: the daemon is gone.
            RankDied: another rank of this job is gone.
            ActivationLimit: no memory for activations in the daemon.
        """
        connection = self._kt_binding.client.connection
        connection.collect()
        adapter_id, anchor = 0, None
        if kt_adapter is not None:
            kt_adapter.ensure()
            adapter_id = kt_adapter.required_id
            if kt_trainable and torch.is_grad_enabled():
                anchor = self._kt_anchor(connection, hidden_states.device)
        layer, shape = self._kt_layer, tuple(hidden_states.shape)
        replayed = replay.replayed(layer, shape)
        ticket = replayed.ticket if replayed is not None else None
        recording = replay.recording()
        mode = _REPLAY if ticket is not None else _RECORD if recording else _PLAIN
        output, kept = torch.ops.kt_coproc.experts(
            hidden_states,
            top_k_index,
            top_k_weights,
            anchor,
            ticket,
            connection.session.handle,
            layer,
            adapter_id,
            mode,
        )
        if recording:
            replay.record(layer, shape, output, kept)
        return output

    def _kt_anchor(self, connection: Connection, device: torch.device) -> torch.Tensor:
        """A leaf that takes part in the op: it gives the first layer a backward when only experts train, and its being
        accumulated tells that this is .backward() and not autograd.grad()."""
        anchor: torch.Tensor | None = self.__dict__.get("_kt_ddp_anchor")
        if anchor is None:
            anchor = torch.zeros((), device=device, requires_grad=True)
            if distributed.launched_without_process_group(connection):
                anchor.register_hook(lambda gradient: distributed.require_membership(connection, "backward"))
        return anchor

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        # The base weights are there as placeholders: whoever writes them to a file gets an error instead of a
        # checkpoint that lacks its experts.
        if not remote.are_hidden():
            super()._save_to_state_dict(destination, prefix, keep_vars)

    def _load_from_state_dict(
        self,
        state_dict: Any,
        prefix: str,
        local_metadata: Any,
        strict: bool,
        missing_keys: list[str],
        unexpected_keys: list[str],
        error_msgs: list[str],
    ) -> None:
        for name in self._kt_shapes:
            value = state_dict.get(prefix + name)
            if value is not None and not remote.is_remote(value):
                error_msgs.append(
                    f"{prefix}{name} cannot be loaded: the weights of the routed experts are in the co-process. "
                    "Start kt-coproc with the checkpoint they should come from."
                )

    def __reduce_ex__(self, protocol: Any) -> Any:
        raise errors.weights_are_remote(f"a model with {type(self).__name__} cannot be pickled or saved as a whole")

    def __deepcopy__(self, memo: dict[int, Any]) -> RemoteExperts:
        new = self.__class__.__new__(self.__class__)
        memo[id(self)] = new
        new.__dict__ = copy.deepcopy(self.__dict__, memo)
        return new

    def _kt_register_placeholders(self, device: torch.device, dtype: torch.dtype | None = None) -> None:
        for name, (shape, own_dtype) in self._kt_shapes.items():
            source = remote.FrozenWeight(self._kt_layer, name)
            parameter = remote.placeholder(shape, dtype or own_dtype, device, source, requires_grad=True)
            parameter._is_hf_initialized = True  # transformers: nothing to initialise here.
            self.register_parameter(name, parameter)


class MoEExperts(RemoteExperts):
    """The routed experts of one layer, with the call of transformers v5.

    Args:
        layer_idx: number of the decoder layer in the daemon's model.
        client: from `connect()`; without it the one that KT_COPROC names.

    Raises:
        CoprocError: no daemon, or the layer has no routed experts.
    """

    def __init__(self, layer_idx: int, client: Client | None = None) -> None:
        super().__init__()
        client = client or default_client()
        model = client.connection.model
        if layer_idx not in model["moe_layers"]:
            raise errors.refusal(
                f"layer {layer_idx} has no routed experts",
                f"the daemon's model has them in layers {list(model['moe_layers'])}",
                "use one of those layers",
            )
        self.num_experts = int(model["num_experts"])
        self.hidden_dim = int(model["hidden_size"])
        self.intermediate_dim = int(model["intermediate_size"])
        self._kt_binding = Binding(client)
        self._kt_layer = layer_idx
        self._kt_shapes = _shapes(model, torch.get_default_dtype())
        self._kt_register_placeholders(torch.device("cpu"))


def _shapes(model: dict[str, Any], dtype: torch.dtype) -> dict[str, tuple[torch.Size, torch.dtype]]:
    experts, hidden, intermediate = model["num_experts"], model["hidden_size"], model["intermediate_size"]
    return {
        "gate_up_proj": (torch.Size([experts, 2 * intermediate, hidden]), dtype),
        "down_proj": (torch.Size([experts, hidden, intermediate]), dtype),
    }


_swapped_classes: dict[type, type] = {}


def _swapped(cls: type) -> type:
    if cls not in _swapped_classes:
        # The original forward must not be found before ours: RemoteExperts comes first.
        _swapped_classes[cls] = type("KtCoproc" + cls.__name__, (RemoteExperts, cls), {"__module__": cls.__module__})
    return _swapped_classes[cls]


def is_swappable(module: nn.Module) -> bool:
    """The layout of transformers v5: gate_up_proj and down_proj, stacked over experts."""
    parameters = [module._parameters.get(name) for name in PARAMETER_NAMES]
    return all(p is not None and p.dim() == 3 and not remote.is_remote(p) for p in parameters)


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


def remote_modules(model: nn.Module) -> list[tuple[str, RemoteExperts]]:
    return [(name, module) for name, module in model.named_modules() if isinstance(module, RemoteExperts)]


def _is_silu(activation: Any) -> bool:
    return (
        activation is functional.silu
        or isinstance(activation, nn.SiLU)
        or type(activation).__name__ in ("SiLUActivation", "SiLU")
    )


def _differences(module: nn.Module, model: dict[str, Any]) -> list[str]:
    """What a module does that the daemon does not."""
    if not is_swappable(module):
        return ["its parameters are not a stacked gate_up_proj and down_proj"]
    from transformers.integrations.moe import _default_apply_gate

    found = [
        reason
        for reason, there in (
            ("biases", getattr(module, "has_bias", False)),
            ("transposed weights", getattr(module, "is_transposed", False)),
            ("interleaved gate and up", not getattr(module, "is_concatenated", True)),
            ("no gate", not getattr(module, "has_gate", True)),
            ("a norm after each expert", getattr(module, "has_post_expert_norm", False)),
            ("its own gating", getattr(type(module), "_apply_gate", _default_apply_gate) is not _default_apply_gate),
            ("an activation other than silu", not _is_silu(getattr(module, "act_fn", None))),
            ("expert parallelism", getattr(module, "_is_expert_parallel", False)),
        )
        if there
    ]
    for name, (shape, _) in _shapes(model, torch.float32).items():
        if module._parameters[name].shape != shape:
            found.append(f"{name} of shape {list(module._parameters[name].shape)}, the daemon serves {list(shape)}")
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
        parameters = {name: module._parameters[name] for name in PARAMETER_NAMES}
        module._kt_shapes = {name: (p.shape, p.dtype) for name, p in parameters.items()}
        for name in parameters:
            del module._parameters[name]
        module._kt_binding, module._kt_layer = binding, layer
        module._is_hf_initialized = True
        module.__class__ = _swapped(type(module))
    return len(modules)


def add_placeholders(model: nn.Module, dtype: torch.dtype | None = None) -> None:
    """Gives remote modules their placeholder parameters: PEFT looks for them, and parameter counts include them. Not
    earlier than after loading: transformers' device maps and loader must not see them."""
    for name, module in remote_modules(model):
        if all(parameter in module._parameters for parameter in module._kt_shapes):
            continue
        parent = model.get_submodule(name.rpartition(".")[0])
        beside: Sequence[torch.Tensor] = [p for p in parent.parameters() if not remote.is_remote(p)]
        device = next((p.device for p in beside), None) or next(
            (p.device for p in model.parameters() if not remote.is_remote(p)), torch.device("cpu")
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
