"""Exceptions of the package. Every message has three lines: what failed, why, and what to run or change."""

from __future__ import annotations


class CoprocError(RuntimeError):
    """Something about the co-process failed, or was asked for and is refused."""


class CoprocDied(CoprocError):
    """The daemon died or is shutting down. Names the daemon's pid. Nothing of the current step was committed."""


class RankDied(CoprocError):
    """Another rank of this job died. Names the rank and its last layer and step."""


class Disagreement(CoprocError):
    """Ranks of one job asked the daemon for different things. Names ranks, field and values."""


class ActivationLimit(CoprocError):
    """The daemon's memory for activations is used up, even with recomputation. Names the numbers."""


class CoprocModelMismatch(CoprocError):
    """A checkpoint with routed experts is not the one the daemon serves. Names both."""


def three_lines(what: str, why: str, fix: str) -> str:
    """The text of every error of the project."""
    return f"error: {what}\n  why: {why}\n  fix: {fix}"


def refusal(what: str, why: str, fix: str, kind: type[CoprocError] = CoprocError) -> CoprocError:
    """An exception to raise, with the three-line text."""
    return kind(three_lines(what, why, fix))


MERGE = (
    "save the adapter with PEFT's save_pretrained; "
    "to merge it, load the checkpoint and the adapter in a process without KT_COPROC"
)


def weights_are_remote(what: str) -> CoprocError:
    """For everything that would need the frozen expert weights in this process."""
    return refusal(what, "the weights of the routed experts are in the co-process, this process has no copy", MERGE)
