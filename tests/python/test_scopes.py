"""What a with statement of kt_coproc.scopes changes holds for its own thread only."""

from __future__ import annotations

import threading
from collections.abc import Callable
from contextlib import AbstractContextManager

import pytest
from kt_coproc import scopes

SCOPES = [
    pytest.param(scopes.pointers_are_names, scopes.are_pointers_names, id="pointers_are_names"),
    pytest.param(scopes.hidden_from_state_dicts, scopes.are_hidden, id="hidden_from_state_dicts"),
    pytest.param(scopes.without_steps, scopes.are_steps_suppressed, id="without_steps"),
]
Scope = Callable[[], AbstractContextManager[None]]


def seen_by_another_thread(holds: Callable[[], bool]) -> bool:
    seen: list[bool] = []
    thread = threading.Thread(target=lambda: seen.append(holds()))
    thread.start()
    thread.join()
    return seen[0]


@pytest.mark.parametrize(("scope", "holds"), SCOPES)
def test_another_thread_does_not_see_it(scope: Scope, holds: Callable[[], bool]) -> None:
    with scope():
        assert holds()
        assert not seen_by_another_thread(holds)
    assert not holds()


@pytest.mark.parametrize(("scope", "holds"), SCOPES)
def test_it_nests_and_ends_with_an_error(scope: Scope, holds: Callable[[], bool]) -> None:
    with scope():
        with pytest.raises(ValueError), scope():
            raise ValueError
        assert holds()
    assert not holds()
