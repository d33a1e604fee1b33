"""What scripts do with models, adapters and gradients: the same values with the co-process as without it."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
import torch
from compare import relative_l2
from conftest import Runs, run_script

TOLERANCE = 2e-5


@pytest.fixture(scope="module")
def both(runs: Runs) -> tuple[dict[str, Any], dict[str, Any]]:
    """Results with the co-process, and without."""
    return tuple(torch.load(runs.get("features.py", remote=remote), weights_only=False) for remote in (True, False))


def test_every_value_is_that_of_plain_training(both: tuple[dict[str, Any], dict[str, Any]]) -> None:
    ours, plain = both
    differ = []
    for name, expected in plain.items():
        actual = ours.get(name)
        if name.startswith("text of "):
            continue
        if isinstance(expected, torch.Tensor) and expected.is_floating_point():
            tolerance = 2e-2 if expected.dtype == torch.bfloat16 else TOLERANCE
            error = relative_l2(actual, expected) if actual.shape == expected.shape else float("inf")
            if not error <= tolerance:
                differ.append(f"{name}: rel-L2 {error:.2e}, shapes {tuple(actual.shape)} {tuple(expected.shape)}")
        elif isinstance(expected, torch.Tensor):
            if not torch.equal(actual, expected):
                differ.append(f"{name}: {actual} instead of {expected}")
        elif actual != expected:
            differ.append(f"{name}: {actual!r} instead of {expected!r}")
    print(f"{len(plain)} values compared")
    assert not differ, "\n".join(differ)
    assert len(plain) > 70


@pytest.mark.parametrize(
    "name, forwards, backwards, fetches",
    [
        ("one forward and backward", 1, 1, 0),
        ("no_grad", 1, 0, 0),
        ("non-reentrant, one forward and backward", 1, 1, 0),
        ("reentrant, one forward and backward", 1, 1, 1),
    ],
)
def test_requests_per_layer(both: Any, name: str, forwards: int, backwards: int, fetches: int) -> None:
    assert both[0]["kt " + name] == [forwards, backwards, fetches]


@pytest.mark.parametrize(
    "name", ["after no_grad", "after a dropped graph", "checkpointed, non-reentrant", "checkpointed, reentrant"]
)
def test_dropped_graphs_free_their_activations(both: Any, name: str) -> None:
    assert both[0]["kt activations left, " + name] == 0


def test_plain_run_saw_nothing_of_the_package(both: Any) -> None:
    assert not [name for name in both[1] if name.startswith("kt ")]


def test_adapters_saved_by_one_are_loaded_by_the_other(runs: Runs, both: Any, tiny: Path, daemon: Any) -> None:
    ours, plain = (Path(f"{runs.get('features.py', remote=remote)}.adapter") for remote in (True, False))
    assert sorted(os.listdir(ours)) == sorted(os.listdir(plain))
    for directory, address in ((ours, None), (plain, daemon.address)):
        out = Path(f"{directory}.logits")
        run_script("load_adapter.py", "--model", tiny, "--adapter", directory, "--out", out, address=address)
        assert relative_l2(torch.load(out), both[1]["a loaded adapter"]) <= TOLERANCE
