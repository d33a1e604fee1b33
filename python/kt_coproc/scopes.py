"""What is different inside a `with` statement. Each holds for the code inside only: other threads notice nothing."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from contextvars import ContextVar

_pointers_are_names = ContextVar("pointers_are_names", default=False)
_hidden = ContextVar("hidden_from_state_dicts", default=False)
_without_steps = ContextVar("without_steps", default=False)


@contextlib.contextmanager
def _inside(variable: ContextVar[bool]) -> Iterator[None]:
    token = variable.set(True)
    try:
        yield
    finally:
        variable.reset(token)


def pointers_are_names() -> contextlib.AbstractContextManager[None]:
    """Inside, data_ptr() of a placeholder is a number that names it: accelerate's FSDP2 code looks parameters up by it.
    Outside it raises, because somebody is about to read memory there."""
    return _inside(_pointers_are_names)


def hidden_from_state_dicts() -> contextlib.AbstractContextManager[None]:
    """Inside, state_dict() and load_state_dict() leave remote parameters out: accelerate broadcasts sharded ones."""
    return _inside(_hidden)


def without_steps() -> contextlib.AbstractContextManager[None]:
    """Inside, optimizer.step() sends nothing: somebody only wants the optimizer's state to exist."""
    return _inside(_without_steps)


def are_pointers_names() -> bool:
    return _pointers_are_names.get()


def are_hidden() -> bool:
    return _hidden.get()


def are_steps_suppressed() -> bool:
    return _without_steps.get()
