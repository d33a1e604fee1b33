"""The machine that measures: its name, our program on it, and whether other processes disturbed a measurement."""

from __future__ import annotations

import importlib.metadata
import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
OTHERS_SHARE_MAX = 0.05  # Of all CPUs' time, as in coproc/bench/other_load.h.
TIMEOUT = 900  # Seconds; a watchdog for whatever can hang, not an expectation.


class BenchError(Exception):
    """What an operator can mend. Three lines: what failed, why, what to run."""

    def __init__(self, what: str, why: str, fix: str) -> None:
        super().__init__(f"error: {what}\n  why: {why}\n  fix: {fix}")


def coproc_binary() -> str:
    """KT_COPROC_BIN; the one installed beside this Python; the release build."""
    beside = shutil.which("kt-coproc", path=str(Path(sys.executable).parent))
    built = ROOT / "build/release/coproc/daemon/kt-coproc"
    found = os.environ.get("KT_COPROC_BIN") or beside or (str(built) if built.exists() else None)
    if found is None:
        raise BenchError(
            "no kt-coproc to measure",
            f"there is none beside {sys.executable}, and {built.relative_to(ROOT)} does not exist",
            "tools/install, or set KT_COPROC_BIN",
        )
    return found


def run_bench(what: str, *options: Any) -> dict[str, Any]:
    """The JSON of `kt-coproc bench WHAT --json OPTIONS`.

    Raises:
        BenchError: it failed; with what it said.
    """
    command = [coproc_binary(), "bench", what, "--json", *map(str, options)]
    result = subprocess.run(command, capture_output=True, text=True, timeout=TIMEOUT)
    if result.returncode != 0:
        raise BenchError(f"{' '.join(command)} failed", result.stderr.strip()[-2000:], "run it by itself")
    return json.loads(result.stdout)


def version_of(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _cpu_seconds(pid: int) -> float:
    # Linux: the clock of another process's CPU time has a number made of its id (clock_getcpuclockid(3)).
    return time.clock_gettime((~pid << 3) | 2)


class OtherLoad:
    """Watches from its construction on how much of the CPUs goes to others than these processes and this one.

    Stolen time, which the host gave to other guests, counts as others'. Children of the processes are not known.
    """

    def __init__(self, pids: Sequence[int]) -> None:
        self._pids = [*pids, os.getpid()]
        self._begin = self._read()

    def _read(self) -> tuple[float, float, float]:
        with open("/proc/stat", encoding="ascii") as file:
            user, nice, system, _, _, irq, softirq, steal = map(int, file.readline().split()[1:9])
        busy = (user + nice + system + irq + softirq + steal) / os.sysconf("SC_CLK_TCK")
        return time.monotonic(), busy, sum(_cpu_seconds(pid) for pid in self._pids)

    def is_disturbed(self) -> bool:
        """More than 5 % of all CPUs went elsewhere; each CPU's whole ticks may be off by one."""
        wall, busy, own = (end - begin for end, begin in zip(self._read(), self._begin, strict=True))
        tick = 1 / os.sysconf("SC_CLK_TCK")
        return busy - own > (os.cpu_count() or 1) * (OTHERS_SHARE_MAX * wall + tick)
