"""The extension: a session with the daemon and the experts op. Every blocking call releases the GIL.

Errors: every method raises the exception class registered with `set_exceptions` for its error code, with the daemon's
three-line text (what failed / why / fix).
"""

from collections.abc import Mapping, Sequence
from typing import Any

import torch

def set_exceptions(by_code: Mapping[int, type[BaseException]], default: type[BaseException]) -> None:
    """by_code: kt::ErrorCode value (shm/base/result.h) -> exception class."""

class Session:
    """One rank's connection. Thread-safe. Closed (bye) by `close()` or when collected."""

    def __init__(self, address: str, fingerprint: str, name: str) -> None: ...
    @property
    def handle(self) -> int:
        """The int that `torch.ops.kt_coproc.experts` takes as `session`."""
    @property
    def model(self) -> dict[str, Any]:
        """The facts of shm::ModelCard (shm/model_card.h), and daemon_id, daemon_pid, element_bytes."""
    def close(self) -> None: ...
    def create_adapter(
        self,
        adapter: int,
        layers: Sequence[int],
        gate_up_r: int,
        gate_up_scaling: float,
        shared_a: bool,
        down_r: int,
        down_scaling: float,
    ) -> None: ...
    def delete_adapter(self, adapter: int) -> None: ...
    def join(
        self, job_id: str, name: str, rank: int, world_size: int, members: Sequence[int], timeout_seconds: float
    ) -> int:
        """Returns the job's step."""
    def read(self, adapter: int, kind: int, layer: int, tensor: int, out: torch.Tensor) -> None:
        """out: contiguous float32 CPU [num_experts, rows, cols] (kind T, the step count: [1]). kind and tensor are
        numbers of wire.pyi."""
    def write(self, adapter: int, kind: int, layer: int, tensor: int, values: torch.Tensor) -> None: ...
    def barrier(self, adapter: int) -> None: ...
    def squared_norm(self, adapter: int, group_of: bytes) -> float:
        """group_of: u8[num_layers][NUM_TENSORS] of wire.pyi; FROZEN leaves a tensor out."""
    def discard(self, adapter: int) -> None: ...
    def step(
        self,
        adapter: int,
        scale: float,
        groups: Sequence[tuple[float, float, float, float, float, bool]],
        group_of: bytes,
    ) -> None:
        """groups: (lr, beta1, beta2, eps, weight_decay, decoupled)."""
    @property
    def accumulated(self) -> set[int]:
        """Adapters for which an accumulating BACKWARD was sent since the last successful step or discard of them."""
    def stats(self) -> dict[str, Any]: ...

# Importing the module registers
#   torch.ops.kt_coproc.experts(Tensor hidden, Tensor topk_ids, Tensor topk_weights, Tensor? anchor, Tensor? ticket,
#                               int session, int layer, int adapter, int mode) -> (Tensor y, Tensor ticket)
# hidden [T,H] any float dtype and device; topk_ids [T,k] int64 (ids >= E contribute zero, negative raise);
# topk_weights [T,k]. y has hidden's dtype and device. ticket: int64[1] CPU tensor that owns the daemon's activation
# (its storage's deleter sends RELEASE unless a backward consumed it); value 0 = nothing kept.
# mode (of wire.pyi) AUTO: keep an activation iff autograd will need it. RECORD: keep it with KEEP_Y, also when grad is
# off.
# REPLAY: `ticket` is given; FETCH its y instead of a forward, and let autograd's backward use it.
# Autograd: gradients for hidden and topk_weights, zeros for anchor; nothing is saved as a saved tensor (the ticket lies
# in ctx->saved_data), so non-reentrant checkpointing needs no recompute of it. In backward, adapter > 0: ACCUMULATE iff
# the engine will execute the anchor's AccumulateGrad node (torch._C._will_engine_execute_node's rule: .backward() yes,
# autograd.grad() no); KEEP iff the graph is retained. A second backward without retain_graph raises as the daemon says.
# Meta/fake kernel: y like hidden, ticket int64[1].
