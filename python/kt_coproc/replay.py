"""Activation checkpointing without a second forward of the experts.

torch.utils.checkpoint runs a function once to get its output and again, in backward, to get what autograd needs. The
function it is given is wrapped in a closure with a Replay: its first run records the ticket of every experts call,
every later run gives them back in the same order, and the daemon's kept output is fetched instead of computed. No
inputs are compared and nothing is asked about the state of autograd, so both modes, nesting and early stop work.

The recomputation may come after the experts' own backward, which consumed the activation (something that ran after the
experts, but on another branch, saved a tensor). Then there is nothing to fetch and the experts run once more.
"""

from __future__ import annotations

import threading
from types import TracebackType
from typing import Any

import torch

from .errors import refusal

_local = threading.local()


class Recorded:
    """One experts call of the first run."""

    def __init__(self, layer: int, shape: tuple[int, ...], output: torch.Tensor, ticket: torch.Tensor) -> None:
        self.layer = layer
        self.shape = shape
        self.ticket: torch.Tensor | None = ticket
        if output.grad_fn is not None:  # Non-reentrant: this call's own node will run the backward.
            output.grad_fn.register_hook(self._consumed)

    def _consumed(self, *gradients: Any) -> None:
        self.ticket = None


def _stack() -> list[Replay]:
    stack: list[Replay] = _local.__dict__.setdefault("stack", [])
    return stack


class Replay:
    """One call of torch.utils.checkpoint.checkpoint. Entered around every run of its function."""

    def __init__(self) -> None:
        self._recorded: list[Recorded] = []
        self._num_runs = 0
        self._position = 0

    def __enter__(self) -> Replay:
        self._position = 0
        self._num_runs += 1
        _stack().append(self)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        _stack().pop()
        if kind is not None and self._num_runs == 1:
            self._recorded.clear()  # The first run failed: nothing will be replayed.

    @property
    def replaying(self) -> bool:
        return self._num_runs > 1

    def next(self, layer: int, shape: tuple[int, ...]) -> Recorded:
        """The next experts call of the first run."""
        if self._position < len(self._recorded):
            recorded = self._recorded[self._position]
            if (recorded.layer, recorded.shape) == (layer, shape):
                self._position += 1
                return recorded
        raise refusal(
            "a checkpointed function did not repeat its calls of the experts",
            f"call {self._position + 1} of its recomputation is layer {layer} with an input of shape {list(shape)}; "
            f"the first run made {len(self._recorded)} calls: {[(r.layer, list(r.shape)) for r in self._recorded]}",
            "make the function given to torch.utils.checkpoint deterministic",
        )

    def record(self, recorded: Recorded) -> None:
        self._recorded.append(recorded)


def recording() -> bool:
    """Whether the current experts call is in the first run of a checkpointed function."""
    return any(not replay.replaying for replay in _stack())


def replayed(layer: int, shape: tuple[int, ...]) -> Recorded | None:
    """What the first run recorded, when the current experts call is in a recomputation."""
    for replay in reversed(_stack()):
        if replay.replaying:
            return replay.next(layer, shape)
    return None


def record(layer: int, shape: tuple[int, ...], output: torch.Tensor, ticket: torch.Tensor) -> None:
    """Tells every checkpointed function whose first run this is."""
    recorded = Recorded(layer, shape, output, ticket)
    for replay in _stack():
        if not replay.replaying:
            replay.record(recorded)
