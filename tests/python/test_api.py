"""The few functions for people who write a line of code instead of setting KT_COPROC."""

from __future__ import annotations

from pathlib import Path

from conftest import Daemon, run_script


def test_public_functions(tiny: Path, daemon: Daemon) -> None:
    assert "all good" in run_script("api.py", "--model", tiny, "--address", daemon.address)


def test_ranks_may_train_alone_on_purpose(tiny: Path, daemon: Daemon) -> None:
    output = run_script("train_unjoined.py", "--model", tiny, "--alone", address=daemon.address, ranks=2)
    values = {line.split(": ")[1] for line in output.splitlines() if " stepped: " in line}
    assert len(values) == 2, "two different adapters"


def test_join_without_a_wrapper_makes_one_adapter(tiny: Path, daemon: Daemon) -> None:
    output = run_script("train_unjoined.py", "--model", tiny, "--join", address=daemon.address, ranks=2)
    values = [line.split(": ")[1] for line in output.splitlines() if " stepped: " in line]
    assert len(values) == 2 and values[0] == values[1]


def test_ranks_without_a_process_group_are_refused(tiny: Path, daemon: Daemon) -> None:
    output = run_script(
        "train_unjoined.py", "--model", tiny, "--no-process-group", address=daemon.address, ranks=2, fails=True
    )
    assert "WORLD_SIZE is 2, but torch.distributed is not initialised" in output
