"""LoRA adapters on experts: PEFT's tensors on one side, the daemon's on the other.

PEFT keeps, per experts module, two stacked matrices for each of gate_up_proj and down_proj; the daemon keeps a matrix
per expert (shm/protocol.h, AdapterTensor). With E experts and rank r, e an expert and j a row of its A:

    PEFT                                       daemon
    gate_up A  [E·r, H]   row    e·r + j       GATE_A [E, r, H], shared by gate and up
    gate_up B  [2I, r·E]  column j·E + e       GATE_B [E, I, r] (rows 0…I), UP_B [E, I, r] (rows I…2I)
    down A     [E·r, I]   row    e·r + j       DOWN_A [E, r, I]
    down B     [H, r·E]   column j·E + e       DOWN_B [E, H, r]

    Binding  of one model ── adapters by name ──► Adapter ◄── LoraTensor ◄── the parameter in PEFT's module
                                    (weak)          │   (strong)    (strong)
                                                    └ one daemon adapter: created when both halves of a layer are known,
                                                      or when it is first needed; deleted with its last LoraTensor

Until its layer exists in the daemon a LoraTensor keeps its values in this process; reading and writing work alike.
"""

from __future__ import annotations

import copy
import weakref
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any, NamedTuple

import torch

from .connection import Client, Connection
from .membership import lowest_values
from .wire import DOWN_A, DOWN_B, FROZEN, GATE_A, GATE_B, NUM_TENSORS, PARAM, UP_B, T, tensor_shape

if TYPE_CHECKING:
    from . import _native

# Halves and sides, as PEFT has them.
GATE_UP, DOWN = "gate_up", "down"
SIDE_A, SIDE_B = "A", "B"
PARAMETER_NAMES = {"gate_up_proj": GATE_UP, "down_proj": DOWN}

_WIRE = {
    (GATE_UP, SIDE_A): (GATE_A,),
    (GATE_UP, SIDE_B): (GATE_B, UP_B),
    (DOWN, SIDE_A): (DOWN_A,),
    (DOWN, SIDE_B): (DOWN_B,),
}
# adapter_create is one packet of at most 4 KiB.
_LAYERS_PER_PACKET = 256


class HalfSpec(NamedTuple):
    """How one of gate_up and down is adapted. r = 0: not at all."""

    r: int
    scaling: float


_UNADAPTED = HalfSpec(0, 0.0)


class LoraTensor:
    """One of PEFT's stacked matrices of an experts module."""

    def __init__(
        self, adapter: Adapter, layer: int, half: str, side: str, shape: torch.Size, values: torch.Tensor | None
    ) -> None:
        self.adapter = adapter
        self.layer = layer
        self.half = half
        self.side = side
        self.shape = shape
        self.values = values  # float32 on the CPU in PEFT's shape, None for zeros; while the layer is not created.

    @property
    def wire_tensors(self) -> tuple[int, ...]:
        """The daemon's tensors that hold this one (shm::AdapterTensor)."""
        return _WIRE[self.half, self.side]

    @property
    def sort_key(self) -> tuple[int, int]:
        return self.layer, self.wire_tensors[0]

    def _wire_shape(self) -> tuple[int, int, int]:
        model = self.adapter.connection.model
        gate_up, down = self.adapter.halves(self.layer)
        rows, columns = tensor_shape(
            self.wire_tensors[0], model["hidden_size"], model["intermediate_size"], gate_up.r, gate_up.r > 0, down.r
        )
        return self.adapter.num_experts, rows, columns

    def read(self, kind: int = PARAM) -> torch.Tensor:
        """float32 on the CPU, in PEFT's shape: parameters, gradient sums or moments, as of the last step."""
        if not self.adapter.is_created(self.layer):
            if kind != PARAM or self.values is None:
                return torch.zeros(self.shape)
            return self.values.clone()
        parts = []
        for tensor in self.wire_tensors:
            part = torch.empty(self._wire_shape())
            self.adapter.session.read(self.adapter.required_id, kind, self.layer, tensor, part)
            parts.append(part)
        if self.side == SIDE_A:
            return parts[0].reshape(self.shape)
        return torch.cat(parts, 1).permute(1, 2, 0).reshape(self.shape)

    def write(self, values: torch.Tensor, kind: int = PARAM) -> None:
        """values: any dtype and device, PEFT's shape. Every rank of a job may write; they write the same."""
        if values.shape != self.shape:
            raise ValueError(f"expected a tensor of shape {tuple(self.shape)}, got {tuple(values.shape)}")
        values = values.detach().to("cpu", torch.float32)
        if not self.adapter.is_created(self.layer):
            if kind == PARAM:
                self.values = values.clone()
                return
            self.adapter.ensure()
        self.send(values, kind)

    def discard(self) -> None:
        """Sets the gradients of the whole adapter to zero."""
        self.adapter.discard()

    def send(self, values: torch.Tensor, kind: int = PARAM) -> None:
        """write() of float32 CPU values to a layer that exists in the daemon."""
        num_experts, rows, columns = self._wire_shape()
        if self.side == SIDE_A:
            parts = [values.reshape(num_experts, rows, columns)]
        else:
            per_expert = values.reshape(self.shape[0], columns, num_experts).permute(2, 0, 1)
            parts = list(torch.split(per_expert, rows, 1))
        for tensor, part in zip(self.wire_tensors, parts, strict=True):
            self.adapter.session.write(self.adapter.required_id, kind, self.layer, tensor, part.contiguous())

    @property
    def t(self) -> int:
        """How many optimizer steps this tensor has seen."""
        if not self.adapter.is_created(self.layer):
            return 0
        out = torch.empty(1)
        self.adapter.session.read(self.adapter.required_id, T, self.layer, self.wire_tensors[0], out)
        return int(out.item())

    def write_t(self, t: int) -> None:
        self.adapter.ensure()
        for tensor in self.wire_tensors:
            value = torch.tensor([float(t)])
            self.adapter.session.write(self.adapter.required_id, T, self.layer, tensor, value)

    def __deepcopy__(self, memo: dict[int, Any]) -> LoraTensor:
        """A copy in a copied adapter, with values of its own."""
        adapter = copy.deepcopy(self.adapter, memo)
        spec = self.adapter.specs[self.layer][self.half]
        return adapter.add(self.layer, self.half, self.side, spec, self.shape, self.read())


class Adapter:
    """One adapter in the daemon.

    Attributes:
        name: PEFT's name of it.
        id: the daemon's number, None as long as nothing was created.
        specs: layer -> half -> HalfSpec.
        coefficient: what clip_grad_norm_ asked gradients to be multiplied with, until STEP or DISCARD.
        reduced: gradient sums of several daemons were added up since the last STEP or DISCARD.
        optimizer: the one whose moments the daemon has.
        former_optimizers: those that stepped the adapter before it.
    """

    def __init__(self, binding: Binding, name: str) -> None:
        self.binding = binding
        self.name = name
        self.id: int | None = None
        self.specs: dict[int, dict[str, HalfSpec]] = {}
        self.coefficient = 1.0
        self.reduced = False
        self.optimizer: weakref.ref[torch.optim.Optimizer] | None = None
        self.former_optimizers: weakref.WeakSet[torch.optim.Optimizer] = weakref.WeakSet()
        self._tensors: weakref.WeakValueDictionary[tuple[int, str, str], LoraTensor] = weakref.WeakValueDictionary()
        self._created: set[int] = set()
        self._connection = binding.client.connection
        _adapters.setdefault(self._connection, weakref.WeakSet()).add(self)
        binding.adapters[name] = self

    @property
    def connection(self) -> Connection:
        return self._connection

    @property
    def session(self) -> _native.Session:
        return self._connection.session

    @property
    def num_experts(self) -> int:
        return int(self._connection.model["num_experts"])

    @property
    def required_id(self) -> int:
        assert self.id is not None
        return self.id

    def is_created(self, layer: int) -> bool:
        return layer in self._created

    def tensors(self) -> list[LoraTensor]:
        """Those that still exist, in an order that is the same on every rank."""
        return sorted(self._tensors.values(), key=lambda tensor: tensor.sort_key)

    def halves(self, layer: int) -> tuple[HalfSpec, HalfSpec]:
        """gate_up and down."""
        specs = self.specs[layer]
        return specs.get(GATE_UP, _UNADAPTED), specs.get(DOWN, _UNADAPTED)

    def has(self, layer: int, half: str) -> bool:
        return half in self.specs.get(layer, {})

    def add(
        self, layer: int, half: str, side: str, spec: HalfSpec, shape: torch.Size, values: torch.Tensor | None
    ) -> LoraTensor:
        """values: float32 on the CPU, taken over; None: zeros."""
        self.specs.setdefault(layer, {})[half] = spec
        tensor = self._tensors[layer, half, side] = LoraTensor(self, layer, half, side, shape, values)
        return tensor

    def is_complete(self, layer: int) -> bool:
        """Whether all four tensors of the layer are known."""
        return all((layer, half, side) in self._tensors for half in (GATE_UP, DOWN) for side in (SIDE_A, SIDE_B))

    def ensure(self, layers: Iterable[int] | None = None) -> None:
        """Creates in the daemon what is not there yet, and moves the values over. In a job of several ranks this is a
        collective, and the lowest rank's values count."""
        missing = sorted(set(self.specs if layers is None else layers) - self._created)
        if not missing:
            return
        self._connection.collect()
        if self.id is None:
            self.id = self._connection.new_adapter_id()
            weakref.finalize(self, self._connection.doom, self.id).atexit = False
        by_spec: dict[tuple[HalfSpec, HalfSpec], list[int]] = {}
        for layer in missing:
            by_spec.setdefault(self.halves(layer), []).append(layer)
        for (gate_up, down), same in by_spec.items():
            for first in range(0, len(same), _LAYERS_PER_PACKET):
                part = same[first : first + _LAYERS_PER_PACKET]
                self.session.create_adapter(
                    self.id, part, gate_up.r, gate_up.scaling, gate_up.r > 0, down.r, down.scaling
                )
        self._created.update(missing)
        self._move_values([tensor for tensor in self.tensors() if tensor.layer in missing])

    def _move_values(self, tensors: list[LoraTensor]) -> None:
        membership = self._connection.membership
        for tensor in tensors:
            values, tensor.values = tensor.values, None
            if membership is not None:
                values = lowest_values(membership, tensor.shape, values)
            if values is not None:
                tensor.send(values)
        if membership is not None:
            self.session.barrier(self.required_id)

    def group_of(self, groups: Mapping[LoraTensor, int]) -> bytes:
        """u8[num_layers][6] of the protocol: the hyperparameter group of every tensor, FROZEN for the others."""
        table = bytearray([FROZEN]) * (int(self._connection.model["num_layers"]) * NUM_TENSORS)
        for tensor, group in groups.items():
            for wire in tensor.wire_tensors:
                table[tensor.layer * NUM_TENSORS + wire] = group
        return bytes(table)

    def discard(self) -> None:
        """Zeroes the gradient sums, if a backward added to them since the last STEP or DISCARD."""
        if self.id is not None and self.id in self.session.accumulated:
            self.session.discard(self.id)
        self.coefficient, self.reduced = 1.0, False

    def __deepcopy__(self, memo: dict[int, Any]) -> Adapter:
        return Adapter(copy.deepcopy(self.binding, memo), self.name)


class Binding:
    """What the experts modules of one model share: the daemon, and the adapters by PEFT's names."""

    def __init__(self, client: Client) -> None:
        self.client = client
        self.adapters: weakref.WeakValueDictionary[str, Adapter] = weakref.WeakValueDictionary()

    def adapter_for(self, name: str, layer: int, half: str) -> Adapter:
        """The adapter that a new half of a layer belongs to: a fresh one where the layer is in the daemon already (PEFT
        was asked to add a name again)."""
        adapter = self.adapters.get(name)
        if adapter is None or adapter.has(layer, half) or adapter.is_created(layer):
            return Adapter(self, name)
        return adapter

    def __deepcopy__(self, memo: dict[int, Any]) -> Binding:
        return Binding(self.client)


_adapters: weakref.WeakKeyDictionary[Connection, weakref.WeakSet[Adapter]] = weakref.WeakKeyDictionary()


def adapters_of(connection: Connection) -> list[Adapter]:
    """The adapters of a session that exist in this process."""
    return list(_adapters.get(connection, ()))
