"""The connection of this process with the daemon.

    Client        what users hold: `connect()` gives one, `close()` gives it back
      └ Connection  one per process and address: the session of the extension, and what Python has to know about it
          └ _native.Session

A Connection lives as long as somebody holds it: a Client, or a model whose experts are remote. The last one to go says
goodbye to the daemon; so does the end of the process.
"""

from __future__ import annotations

import atexit
import collections
import os
import threading
import weakref
from types import ModuleType, TracebackType
from typing import TYPE_CHECKING, Any

import torch

from . import environment, errors, wire
from .membership import Membership

if TYPE_CHECKING:
    from . import _native

_lock = threading.RLock()
_connections: weakref.WeakValueDictionary[str, Connection] = weakref.WeakValueDictionary()
_default: Client | None = None


def _extension() -> ModuleType:
    """The extension: loaded when the first connection is made, not when torch is imported."""
    try:
        from . import _native
    except ImportError as error:
        raise errors.refusal(
            "kt_coproc's extension cannot be loaded",
            f"{error}{_built_for()}",
            "install kt-coproc again, with the torch you use in the same environment",
        ) from error
    by_code = {
        wire.RANK_DIED: errors.RankDied,
        wire.COPROC_DIED: errors.CoprocDied,
        wire.DISAGREEMENT: errors.Disagreement,
        wire.ACTIVATION_LIMIT: errors.ActivationLimit,
        wire.MODEL_MISMATCH: errors.CoprocModelMismatch,
    }
    _native.set_exceptions(by_code, errors.CoprocError)
    return _native


def _built_for() -> str:
    try:
        from . import _build
    except ImportError:
        return ""
    return f"; it was built for torch {_build.TORCH_VERSION}, this is torch {torch.__version__}"


class Connection:
    """One session. Not for users.

    Attributes:
        session: the extension's session.
        model: what the daemon serves (see _native.Session.model).
        membership: the job's ranks, once joined.
        solo: `join(None)` was called: this rank trains alone on purpose.
    """

    def __init__(self, address: str) -> None:
        self.address = address
        self.session: _native.Session = _extension().Session(address, "", environment.job_name())
        self.model: dict[str, Any] = self.session.model
        self.membership: Membership | None = None
        self.solo = False
        self._num_adapters = 0
        self._doomed: collections.deque[int] = collections.deque()

    def new_adapter_id(self) -> int:
        """Ranks of a job create their adapters in the same order, so that they agree on the numbers."""
        self._num_adapters += 1
        return self._num_adapters

    def doom(self, adapter_id: int) -> None:
        """The last tensor of an adapter is gone. Called by finalizers, which run anywhere, also inside a call to the
        daemon: the deletion waits for the next call of collect()."""
        self._doomed.append(adapter_id)

    def collect(self) -> None:
        """Deletes adapters that nobody holds any more. Called before adapters are created, by each step and by stats().

        In a job of several ranks deleting is a collective, and ranks collect garbage at different times: there, such an
        adapter stays in the daemon until the job ends, unless PEFT's delete_adapter() dropped it (see delete).
        """
        if self.membership is not None and not self.membership.alone:
            return
        while self._doomed:
            self.session.delete_adapter(self._doomed.popleft())

    def delete(self, adapter_id: int) -> None:
        """Deletes this adapter now, if its last tensor is gone. Every rank of the job comes here."""
        if adapter_id in self._doomed:
            self._doomed.remove(adapter_id)
            self.session.delete_adapter(adapter_id)


class Client:
    """A handle on this process's session with a daemon. A context manager; see `connect`."""

    def __init__(self, connection: Connection) -> None:
        self._connection: Connection | None = connection

    @property
    def connection(self) -> Connection:
        """Raises CoprocError after close()."""
        if self._connection is None:
            raise errors.refusal(
                "this client is closed",
                "close() was called, or its `with` block ended",
                "keep it open as long as its experts are used",
            )
        return self._connection

    @property
    def model(self) -> dict[str, Any]:
        """path, architecture, fingerprint, weight_format, num_layers, num_experts, top_k, hidden_size,
        intermediate_size, moe_layers, activation, expert_names, … of the model the daemon serves."""
        return dict(self.connection.model)

    def stats(self) -> dict[str, Any]:
        """The daemon's status as `kt-coproc status --json` prints it."""
        self.connection.collect()
        return self.connection.session.stats()

    def close(self) -> None:
        """Gives the handle back. The session ends when nothing else in this process uses it. May be called twice."""
        self._connection = None

    def __enter__(self) -> Client:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()


def open_client(address: str | None = None) -> Client:
    """A new handle on the process's session with the daemon at `address`; connects at the first call."""
    address = address or environment.address()
    with _lock:
        connection = _connections.get(address)
        if connection is None:
            connection = _connections[address] = Connection(address)
        return Client(connection)


def default_client() -> Client:
    """The handle that everything shares which was given none. It stays open until the process ends."""
    global _default
    with _lock:
        if _default is None:
            _default = open_client()
        return _default


def live_connections() -> list[Connection]:
    """All sessions of this process, in an order that is the same on every rank."""
    with _lock:
        return [connection for _, connection in sorted(_connections.items())]


def _close_all() -> None:
    for connection in live_connections():
        connection.session.close()


def _forget_after_fork() -> None:
    # The sessions belong to the parent. Models in the child still refer to them, and every use raises (the extension
    # knows its process); a new connect() in the child gets a session of its own.
    global _connections, _default, _lock
    _inherited.extend(_connections.values())
    if _default is not None:
        _inherited.append(_default)
    _connections, _default, _lock = weakref.WeakValueDictionary(), None, threading.RLock()


_inherited: list[Any] = []
atexit.register(_close_all)
os.register_at_fork(after_in_child=_forget_after_fork)
