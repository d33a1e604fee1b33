"""Several ranks: who belongs to the job, and gradients of several daemons (nodes).

A session is a job of one until the model is wrapped by DDP or FSDP2, exactly as torch's parameters are: wrapping joins
the sessions of the process group's ranks. Then one daemon sums the gradients of its ranks by itself; sums of several
daemons are added with torch.distributed, by the lowest rank of each.
"""

from __future__ import annotations

import os
import uuid
from dataclasses import dataclass
from datetime import timedelta
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist

from .errors import Disagreement, refusal

if TYPE_CHECKING:
    from .adapter import Adapter, LoraTensor
    from .client import Connection

_GRAD = 1  # shm::TensorKind.
_MOMENTS = (2, 3)
_DEFAULT_TIMEOUT = timedelta(minutes=30)
_HOW_TO_JOIN = (
    "wrap the model in DistributedDataParallel (without GPUs: TrainingArguments(use_cpu=True) or "
    "ACCELERATE_USE_CPU=true), or call kt_coproc.join(); kt_coproc.join(None) trains every rank alone"
)


@dataclass(frozen=True)
class Membership:
    """The job a session has joined.

    Attributes:
        ranks: global ranks of the process group's members.
        rank: this one, by its number in the group.
        members: those that use this rank's daemon, by their numbers in the group.
        leaders: the lowest global rank of every daemon, ascending.
        leader_group: the leaders' process group; None with one daemon, and on ranks that are no leaders.
    """

    ranks: tuple[int, ...]
    rank: int
    members: tuple[int, ...]
    leaders: tuple[int, ...]
    leader_group: Any | None

    @property
    def world_size(self) -> int:
        return len(self.ranks)

    @property
    def is_lowest(self) -> bool:
        """Of this daemon's members."""
        return self.rank == self.members[0]

    @property
    def alone(self) -> bool:
        """Whether nobody else of the job uses this daemon."""
        return len(self.members) == 1

    @property
    def several_daemons(self) -> bool:
        return len(self.leaders) > 1


def world_size(connection: Connection) -> int:
    """The number of ranks whose gradients are averaged: STEP multiplies their sum by its inverse."""
    return 1 if connection.membership is None else connection.membership.world_size


def _initialized() -> bool:
    return dist.is_available() and dist.is_initialized()


def launched_without_process_group(connection: Connection) -> bool:
    """Started as one of several ranks, but torch.distributed is not in use: N independent trainings that look like
    one."""
    if connection.membership is not None or connection.solo:
        return False
    return not _initialized() and int(os.environ.get("WORLD_SIZE") or 1) > 1


def require_membership(connection: Connection, action: str) -> None:
    """Raises CoprocError where there are several ranks and nobody said how they belong together."""
    if connection.membership is not None or connection.solo:
        return
    if _initialized() and dist.get_world_size() > 1:
        size = dist.get_world_size()
        why = f"torch.distributed has {size} ranks, but this rank's model was never joined with the others"
    elif launched_without_process_group(connection):
        why = f"WORLD_SIZE is {os.environ['WORLD_SIZE']}, but torch.distributed is not initialised in this process"
    else:
        return
    raise refusal(f"{action} of expert adapters refused on rank {os.environ.get('RANK', '?')}", why, _HOW_TO_JOIN)


def group_timeout(group: Any) -> float:
    """Seconds after which the group's own collectives give up."""
    for device in ("cpu", "cuda"):
        try:
            timeout = group._get_backend(torch.device(device)).options._timeout
            return timeout.total_seconds()
        except (RuntimeError, AttributeError):
            continue
    return _DEFAULT_TIMEOUT.total_seconds()


def join(connection: Connection, group: Any | None) -> None:
    """Joins this session with those of the group's other ranks. Collective over the group; again over the same ranks: a
    no-op.

    Args:
        connection: this rank's session.
        group: a torch.distributed process group, None for the default one.

    Raises:
        Disagreement: the ranks' adapters differ, gradients or activations are pending, or this session belongs to a job
            of other ranks already.
    """
    group = group if group is not None else dist.group.WORLD
    ranks = tuple(dist.get_process_group_ranks(group))
    if connection.membership is not None:
        if connection.membership.ranks == ranks:
            return
        raise refusal(
            "cannot join another process group",
            f"this rank is in the job of ranks {list(connection.membership.ranks)}, the new group has {list(ranks)}",
            "use one data-parallel process group for all models of the process",
            Disagreement,
        )
    rank = dist.get_rank(group)
    gathered: list[Any] = [None] * len(ranks)
    dist.all_gather_object(gathered, (uuid.uuid4().hex, connection.model["daemon_id"]), group=group)
    by_daemon: dict[str, list[int]] = {}
    for member, (_, daemon_id) in enumerate(gathered):
        by_daemon.setdefault(daemon_id, []).append(member)
    members = tuple(by_daemon[connection.model["daemon_id"]])
    leaders = tuple(sorted(ranks[there[0]] for there in by_daemon.values()))
    leader_group = None
    if len(leaders) > 1 and ranks[rank] in leaders:
        # gloo: what is exchanged lies in host memory.
        leader_group = dist.new_group(list(leaders), backend="gloo", use_local_synchronization=True)
    name = os.environ.get("KT_COPROC_JOB", "")
    job_id = gathered[0][0]
    connection.session.join(job_id, name, rank, len(ranks), members, group_timeout(group))
    connection.membership = Membership(ranks, rank, members, leaders, leader_group)
    if connection.membership.several_daemons:
        for adapter in _created(connection):
            _broadcast(connection.membership, adapter)


def _created(connection: Connection) -> list[Adapter]:
    return sorted((a for a in connection.adapters if a.id is not None), key=lambda adapter: adapter.required_id)


def _broadcast(membership: Membership, adapter: Adapter) -> None:
    """Several daemons, one adapter: everybody gets the values, and the optimizer state, of the lowest rank's daemon."""
    if membership.leader_group is not None:
        for tensor in adapter.tensors():
            if not adapter.is_created(tensor.layer):
                continue
            tensor.send(_from_lowest(membership, tensor.read()))
            steps = int(_from_lowest(membership, torch.tensor([float(tensor.t)])).item())
            tensor.write_t(steps)
            for kind in _MOMENTS if steps else ():
                tensor.send(_from_lowest(membership, tensor.read(kind)), kind)
    adapter.session.barrier(adapter.required_id)


def _from_lowest(membership: Membership, values: torch.Tensor) -> torch.Tensor:
    dist.broadcast(values, src=membership.leaders[0], group=membership.leader_group)
    return values


def lowest_values(membership: Membership, tensor: LoraTensor, values: torch.Tensor | None) -> torch.Tensor | None:
    """What this rank has to write into a tensor that was just created: the lowest rank's values, by the lowest rank of
    each daemon; None: nothing."""
    if not membership.is_lowest:
        return None
    if membership.leader_group is None:
        return values
    return _from_lowest(membership, torch.zeros(tensor.shape) if values is None else values)


def reduce_gradients(adapter: Adapter) -> None:
    """Several daemons only: adds up their gradient sums, once per step. Collective over the job."""
    membership = adapter.connection.membership
    if membership is None or not membership.several_daemons or adapter.reduced:
        return
    adapter.session.barrier(adapter.required_id)
    if membership.leader_group is not None:
        for tensor in adapter.tensors():  # One at a time: the memory of one, not of all.
            gradient = tensor.read(_GRAD)
            dist.all_reduce(gradient, group=membership.leader_group)
            tensor.send(gradient, _GRAD)
    adapter.reduced = True
