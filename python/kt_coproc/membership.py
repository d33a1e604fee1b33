"""Who belongs to a job: the ranks that train together, and the daemons they use."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist


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


def from_lowest(membership: Membership, values: torch.Tensor) -> torch.Tensor:
    """The values of the lowest rank's daemon, in place. Collective over the leaders."""
    dist.broadcast(values, src=membership.leaders[0], group=membership.leader_group)
    return values


def lowest_values(membership: Membership, shape: torch.Size, values: torch.Tensor | None) -> torch.Tensor | None:
    """What this rank has to write into a tensor that was just created: the lowest rank's values, by the lowest rank of
    each daemon; None: nothing.

    Args:
        membership: the job.
        shape: the tensor's.
        values: this rank's, None for zeros.
    """
    if not membership.is_lowest:
        return None
    if membership.leader_group is None:
        return values
    return from_lowest(membership, torch.zeros(shape) if values is None else values)
