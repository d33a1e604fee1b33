"""Several ranks: how they join, and gradients of several daemons (nodes).

A session is a job of one until the model is wrapped by DDP or FSDP2, exactly as torch's parameters are: wrapping joins
the sessions of the process group's ranks. Then one daemon sums the gradients of its ranks by itself; sums of several
daemons are added with torch.distributed, by the lowest rank of each.
"""

from __future__ import annotations

import uuid
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist

from . import environment
from .adapter import Adapter, adapters_of
from .connection import Connection
from .errors import Disagreement, refusal
from .membership import Membership, from_lowest
from .wire import EXP_AVG, EXP_AVG_SQ, GRAD

_DEFAULT_TIMEOUT = timedelta(minutes=30)
_HOW_TO_JOIN = (
    "wrap the model in DistributedDataParallel (without GPUs: TrainingArguments(use_cpu=True) or "
    "ACCELERATE_USE_CPU=true), or call kt_coproc.join(); kt_coproc.join(None) trains every rank alone"
)


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
    return not _initialized() and environment.world_size() > 1


def require_membership(connection: Connection, action: str) -> None:
    """Raises CoprocError where there are several ranks and nobody said how they belong together."""
    if connection.membership is not None or connection.solo:
        return
    if _initialized() and dist.get_world_size() > 1:
        size = dist.get_world_size()
        why = f"torch.distributed has {size} ranks, but this rank's model was never joined with the others"
    elif launched_without_process_group(connection):
        why = f"WORLD_SIZE is {environment.world_size()}, but torch.distributed is not initialised in this process"
    else:
        return
    raise refusal(f"{action} of expert adapters refused on rank {environment.rank()}", why, _HOW_TO_JOIN)


def group_timeout(group: Any) -> float:
    """Seconds after which the group's own collectives give up."""
    for device in ("cpu", "cuda"):
        try:
            timeout: timedelta = group._get_backend(torch.device(device)).options._timeout
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
    name = environment.job_name()
    job_id = gathered[0][0]
    connection.session.join(job_id, name, rank, len(ranks), members, group_timeout(group))
    connection.membership = Membership(ranks, rank, members, leaders, leader_group)
    if connection.membership.several_daemons:
        for adapter in _created(connection):
            _broadcast(connection.membership, adapter)


def _created(connection: Connection) -> list[Adapter]:
    return sorted((a for a in adapters_of(connection) if a.id is not None), key=lambda adapter: adapter.required_id)


def _broadcast(membership: Membership, adapter: Adapter) -> None:
    """Several daemons, one adapter: everybody gets the values, and the optimizer state, of the lowest rank's daemon."""
    if membership.leader_group is not None:
        for tensor in adapter.tensors():
            if not adapter.is_created(tensor.layer):
                continue
            tensor.send(from_lowest(membership, tensor.read()))
            steps = int(from_lowest(membership, torch.tensor([float(tensor.t)])).item())
            tensor.write_t(steps)
            for kind in (EXP_AVG, EXP_AVG_SQ) if steps else ():
                tensor.send(from_lowest(membership, tensor.read(kind)), kind)
    adapter.session.barrier(adapter.required_id)


def reduce_gradients(adapter: Adapter) -> None:
    """Several daemons only: adds up their gradient sums, once per step. Collective over the job."""
    membership = adapter.connection.membership
    if membership is None or not membership.several_daemons or adapter.reduced:
        return
    adapter.session.barrier(adapter.required_id)
    if membership.leader_group is not None:
        for tensor in adapter.tensors():  # One at a time: the memory of one, not of all.
            gradient = tensor.read(GRAD)
            dist.all_reduce(gradient, group=membership.leader_group)
            tensor.send(gradient, GRAD)
    adapter.reduced = True
