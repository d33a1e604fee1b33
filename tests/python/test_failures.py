"""Deaths: of a rank, and of the daemon."""

from __future__ import annotations

import os
import signal
import subprocess
import time
from pathlib import Path

import pytest
from conftest import TIMEOUT, Daemon, finish, start_ranks, start_script


def start_job(tiny: Path, daemon: Daemon, log: Path, ranks: int) -> tuple[list[subprocess.Popen[str]], list[Path]]:
    """The ranks, and the file each of them writes a line to after every step."""
    processes = start_ranks("rank.py", "--model", tiny, "--log", log, addresses=[daemon.address] * ranks)
    return processes, [Path(f"{log}.{rank}") for rank in range(ranks)]


def wait_for_line(log: Path, text: str) -> str:
    deadline = time.monotonic() + TIMEOUT
    while time.monotonic() < deadline:
        for line in log.read_text().splitlines() if log.exists() else ():
            if line.startswith(text):
                return line
        time.sleep(0.02)
    pytest.fail(f"no line {text!r} in {log}: {log.read_text() if log.exists() else 'no file'}")


def end(processes: list[subprocess.Popen[str]]) -> None:
    for process in processes:
        process.kill()
        process.communicate()


def test_a_killed_rank_ends_its_job_with_rank_died_and_no_other(tiny: Path, daemon: Daemon, work: Path) -> None:
    job, logs = start_job(tiny, daemon, work / "killed", 2)
    other, others = start_job(tiny, daemon, work / "other-job", 1)
    try:
        wait_for_line(logs[0], "step 3")
        wait_for_line(others[0], "step 3")
        killed = time.time()
        job[1].send_signal(signal.SIGKILL)
        died = wait_for_line(logs[0], "DIED")
        print(f"raised {float(died.split()[1]) - killed:.3f} s after the kill: {died}")
        assert "RankDied" in died and "rank 1" in died
        finish(job[0])
        done = len(others[0].read_text().splitlines())
        wait_for_line(others[0], f"step {done + 3}")  # The other job goes on.
        status = daemon.status()
        assert status["state"] == "serving"
        assert [row["state"].upper() for row in status["jobs"]] == ["OK"]
    finally:
        end(job + other)


def test_a_killed_daemon_raises_coproc_died_naming_its_pid(tiny: Path, work: Path) -> None:
    daemon = Daemon(tiny, "--weight-format", "fp32", "--threads", "1")
    job, logs = start_job(tiny, daemon, work / "daemon-killed", 2)
    try:
        for log in logs:
            wait_for_line(log, "step 3")
        killed = time.time()
        os.kill(daemon.pid, signal.SIGKILL)
        for log in logs:
            died = wait_for_line(log, "DIED")
            print(f"raised {float(died.split()[1]) - killed:.3f} s after the kill: {died}")
            assert "CoprocDied" in died and str(daemon.pid) in log.read_text()
        for process in job:
            finish(process)
    finally:
        end(job)
        daemon.stop()


def test_a_stopped_daemon_raises_coproc_died_naming_the_shutdown(tiny: Path, work: Path) -> None:
    daemon = Daemon(tiny, "--weight-format", "fp32", "--threads", "1")
    job, logs = start_job(tiny, daemon, work / "daemon-stopped", 1)
    try:
        wait_for_line(logs[0], "step 3")
        daemon.stop()
        assert daemon.process.returncode == 0
        assert "CoprocDied" in wait_for_line(logs[0], "DIED")
        assert "shut" in logs[0].read_text()
    finally:
        end(job)


def test_a_forked_child_cannot_use_the_parents_experts(tiny: Path, daemon: Daemon) -> None:
    output = finish(start_script("forked.py", "--model", tiny, address=daemon.address))
    assert "child: CoprocError" in output and "parent: still works" in output and "child's own session: works" in output
