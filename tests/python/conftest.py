"""A daemon on a small checkpoint, and scripts run as users run them: in processes of their own.

KT_COPROC_BIN   the kt-coproc to test; default: the one installed beside this Python
KT_TEST_ALL=1   also the long tests (marked slow)
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

HERE = Path(__file__).resolve().parent
SCRIPTS = HERE / "scripts"
TIMEOUT = 300  # Seconds; a watchdog, not an expectation.


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("markers", "slow: only with KT_TEST_ALL=1")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if os.environ.get("KT_TEST_ALL") == "1":
        return
    for item in items:
        if item.get_closest_marker("slow"):
            item.add_marker(pytest.mark.skip(reason="long: set KT_TEST_ALL=1"))


def coproc_binary() -> str:
    """Path of kt-coproc. A test suite without it must fail, not skip."""
    found = os.environ.get("KT_COPROC_BIN") or shutil.which("kt-coproc", path=str(Path(sys.executable).parent))
    assert found, "no kt-coproc beside this Python: pip install . first, or set KT_COPROC_BIN"
    return found


def environment(address: str | None = None, **extra: str) -> dict[str, str]:
    """What a script sees. Ranks' spinning OpenMP threads would eat the daemon's cores."""
    kept = {k: v for k, v in os.environ.items() if not k.startswith("KT_") or k == "KT_TEST_ALL"}
    kept.update(
        OMP_NUM_THREADS="1",
        OMP_WAIT_POLICY="passive",
        HF_HUB_OFFLINE="1",
        TOKENIZERS_PARALLELISM="false",
        GLOO_SOCKET_IFNAME="lo",
        PYTHONUNBUFFERED="1",
    )
    if address is not None:
        kept["KT_COPROC"] = address
    kept.update(extra)
    return kept


class Daemon:
    """A running kt-coproc."""

    def __init__(self, model: Path, *options: str) -> None:
        self.model = model
        self.directory = Path(tempfile.mkdtemp(prefix="kt-"))  # Short: a socket's path has 107 bytes.
        self.socket = self.directory / "kt.sock"
        self.address = f"unix:{self.socket}"
        self.log = self.directory / "log"
        with open(self.log, "wb") as log:
            self.process = subprocess.Popen(
                [coproc_binary(), "run", "--model", str(model), "--socket", str(self.socket), *options],
                stdout=log,
                stderr=log,
                env=environment(),
                start_new_session=True,
            )
        wait = [coproc_binary(), "wait", "--ready", "--timeout", "120", "--socket", str(self.socket)]
        result = subprocess.run(wait, capture_output=True, text=True, env=environment(), timeout=TIMEOUT)
        assert result.returncode == 0, f"{result.stderr}\n{self.log.read_text()}"

    @property
    def pid(self) -> int:
        return self.process.pid

    def status(self) -> dict[str, Any]:
        result = subprocess.run(
            [coproc_binary(), "status", "--json", "--socket", str(self.socket)],
            capture_output=True,
            text=True,
            env=environment(),
            timeout=TIMEOUT,
        )
        assert result.returncode == 0, result.stderr
        return json.loads(result.stdout)

    def wait_for(self, what: str, condition: Any) -> dict[str, Any]:
        """Polls the status until condition(status) holds."""
        deadline = time.monotonic() + TIMEOUT
        while not condition(status := self.status()):
            assert time.monotonic() < deadline, f"{what} did not happen: {status}"
            time.sleep(0.05)
        return status

    def kill(self) -> None:
        self.process.kill()
        self.process.wait(TIMEOUT)

    def stop(self) -> None:
        if self.process.poll() is None:
            self.process.send_signal(signal.SIGTERM)
            self.process.wait(TIMEOUT)
        shutil.rmtree(self.directory, ignore_errors=True)


def start_script(
    script: str, *args: Any, address: str | None = None, prefix: tuple[str, ...] = (), **extra: str
) -> subprocess.Popen[str]:
    command = [sys.executable, *prefix, str(SCRIPTS / script), *map(str, args)]
    return subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=environment(address, **extra)
    )


def start_ranks(script: str, *args: Any, addresses: list[str]) -> list[subprocess.Popen[str]]:
    """Ranks started by hand: torchrun would end the survivors itself, and give all of them one environment."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = str(probe.getsockname()[1])
    common = {"WORLD_SIZE": str(len(addresses)), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    return [
        start_script(script, *args, address=address, RANK=str(rank), LOCAL_RANK=str(rank), **common)
        for rank, address in enumerate(addresses)
    ]


def finish(process: subprocess.Popen[str]) -> str:
    """The script's output; kills it after TIMEOUT."""
    try:
        output, _ = process.communicate(timeout=TIMEOUT)
    except subprocess.TimeoutExpired:
        process.kill()
        output, _ = process.communicate()
        pytest.fail(f"still running after {TIMEOUT} s:\n{output[-5000:]}")
    return output


def run_script(
    script: str, *args: Any, address: str | None = None, ranks: int = 1, fails: bool = False, **extra: str
) -> str:
    """Runs a script; with several ranks through torchrun. Returns its output."""
    prefix: tuple[str, ...] = ()
    if ranks > 1:
        prefix = ("-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={ranks}")
    process = start_script(script, *args, address=address, prefix=prefix, **extra)
    output = finish(process)
    assert (process.returncode != 0) == fails, f"exit code {process.returncode}:\n{output[-8000:]}"
    return output


@pytest.fixture(scope="session")
def work() -> Iterator[Path]:
    """A folder for everything the session writes."""
    path = Path(tempfile.mkdtemp(prefix="kt-tests-"))
    yield path
    shutil.rmtree(path, ignore_errors=True)


@pytest.fixture(scope="session")
def tiny(work: Path) -> Path:
    """A Qwen3-MoE checkpoint: 3 layers, 8 experts, top 2, fp32, a tokenizer and docs.json."""
    subprocess.run(
        [sys.executable, str(HERE / "make_tiny.py"), str(work / "tiny")], check=True, env=environment(), timeout=TIMEOUT
    )
    return work / "tiny"


@pytest.fixture(scope="session")
def daemon(tiny: Path) -> Iterator[Daemon]:
    """Serves `tiny` in fp32: training through it is plain training up to rounding."""
    running = Daemon(tiny, "--weight-format", "fp32", "--threads", "1")
    yield running
    alive = running.process.poll() is None
    running.stop()
    assert alive, "the daemon died during the tests"


class Runs:
    """Runs of one training script, each made once per session: the reference is needed by many tests."""

    def __init__(self, work: Path, tiny: Path, daemon: Daemon) -> None:
        self._work, self._tiny, self._daemon = work, tiny, daemon
        self._done: dict[tuple[Any, ...], Path] = {}
        self._totals: dict[Path, dict[str, int]] = {}

    def get(self, script: str, *args: Any, remote: bool, ranks: int = 1, daemon: Daemon | None = None) -> Path:
        """The prefix of the files the run wrote."""
        key = (script, args, remote, ranks, daemon.address if daemon else None)
        if key not in self._done:
            out = self._work / f"run{len(self._done)}"
            served_by = daemon or self._daemon
            before = served_by.status()["totals"]
            address = served_by.address if remote else None
            run_script(script, "--model", self._tiny, "--out", out, *args, address=address, ranks=ranks)
            after = served_by.status()["totals"]
            self._totals[out] = {name: after[name] - before[name] for name in after}
            self._done[key] = out
        return self._done[key]

    def totals(self, run: Path) -> dict[str, int]:
        """What the daemon counted during the run."""
        return self._totals[run]


@pytest.fixture(scope="session")
def runs(work: Path, tiny: Path, daemon: Daemon) -> Runs:
    return Runs(work, tiny, daemon)


@pytest.fixture(autouse=True)
def daemon_is_left_clean(request: pytest.FixtureRequest) -> Iterator[None]:
    """After each test that used the shared daemon nobody is attached and nothing is left of the jobs."""
    yield
    if "daemon" in request.fixturenames or "runs" in request.fixturenames:
        shared = request.getfixturevalue("daemon")
        if shared.process.poll() is None:
            status = shared.wait_for("sessions leaving", lambda status: not status["ranks"])
            assert status["memory_bytes"]["activations"] == 0
            assert status["memory_bytes"]["adapters"] == 0
