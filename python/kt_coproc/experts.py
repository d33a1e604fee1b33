"""The experts module of a model, served by the daemon."""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from . import errors, job, placeholder, replay, scopes
from .adapter import Adapter, Binding
from .connection import Connection
from .wire import AUTO, RECORD, REPLAY


def without_compilation(function: Callable[..., Any]) -> Callable[..., Any]:
    """torch.compiler.disable, applied at the first call: it imports the compiler, and this module is imported during
    `import torch`."""
    disabled: list[Callable[..., Any]] = []

    @functools.wraps(function)
    def call(*args: Any, **kwargs: Any) -> Any:
        if not disabled:
            disabled.append(torch.compiler.disable(function))  # type: ignore[no-untyped-call]
        return disabled[0](*args, **kwargs)

    return call


class RemoteExperts(nn.Module):
    """What a swapped experts module and MoEExperts have in common."""

    _kt_binding: Binding
    _kt_layer: int
    _kt_shapes: dict[str, tuple[torch.Size, torch.dtype]]
    _kt_shared_anchor: torch.Tensor | None = None

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
        adapter_id, anchor = 0, None
        if kt_adapter is not None:
            kt_adapter.ensure([self._kt_layer])
            adapter_id = kt_adapter.required_id
            if kt_trainable and torch.is_grad_enabled():
                anchor = self._kt_anchor(connection, hidden_states.device)
        layer, shape = self._kt_layer, tuple(hidden_states.shape)
        replayed = replay.replayed(layer, shape)
        ticket = replayed.ticket if replayed is not None else None
        recording = replay.recording()
        mode = REPLAY if ticket is not None else RECORD if recording else AUTO
        output: torch.Tensor
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

    def use_anchor(self, anchor: torch.Tensor) -> None:
        """Takes a leaf that somebody else owns as the anchor of every forward."""
        self.__dict__["_kt_shared_anchor"] = anchor  # Not setattr: it would become a parameter of this module too.

    def _kt_anchor(self, connection: Connection, device: torch.device) -> torch.Tensor:
        """A leaf that takes part in the op: it gives the first layer a backward when only experts train, and its being
        accumulated tells that this is .backward() and not autograd.grad()."""
        anchor = self._kt_shared_anchor
        if anchor is None:
            anchor = torch.zeros((), device=device, requires_grad=True)
            if job.launched_without_process_group(connection):
                anchor.register_hook(  # type: ignore[no-untyped-call]
                    lambda gradient: job.require_membership(connection, "backward")
                )
        return anchor

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        # The base weights are there as placeholders: whoever writes them to a file gets an error instead of a
        # checkpoint that lacks its experts.
        if not scopes.are_hidden():
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
            if value is not None and not placeholder.is_remote(value):
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

    def _kt_bind(self, binding: Binding, layer: int, shapes: dict[str, tuple[torch.Size, torch.dtype]]) -> None:
        """Which experts this module stands for. shapes: of the parameters it had, by name."""
        self._kt_binding, self._kt_layer, self._kt_shapes = binding, layer, shapes
        self._is_hf_initialized = True  # transformers: nothing to initialise here.

    def _kt_register_placeholders(self, device: torch.device, dtype: torch.dtype | None = None) -> None:
        for name, (shape, own_dtype) in self._kt_shapes.items():
            source = placeholder.FrozenWeight(self._kt_layer, name)
            parameter = placeholder.placeholder(shape, dtype or own_dtype, device, source, requires_grad=True)
            parameter._is_hf_initialized = True  # type: ignore[attr-defined]
            self.register_parameter(name, parameter)


def remote_modules(model: nn.Module) -> list[tuple[str, RemoteExperts]]:
    return [(name, module) for name, module in model.named_modules() if isinstance(module, RemoteExperts)]


def expert_shapes(model: dict[str, Any], dtype: torch.dtype) -> dict[str, tuple[torch.Size, torch.dtype]]:
    experts, hidden, intermediate = model["num_experts"], model["hidden_size"], model["intermediate_size"]
    return {
        "gate_up_proj": (torch.Size([experts, 2 * intermediate, hidden]), dtype),
        "down_proj": (torch.Size([experts, hidden, intermediate]), dtype),
    }
