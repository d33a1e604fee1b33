"""Comparing two runs; failures print where and by how much."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch


def relative_l2(actual: torch.Tensor, expected: torch.Tensor) -> float:
    actual, expected = actual.double(), expected.double()
    scale = float(expected.norm())
    return float((actual - expected).norm()) / scale if scale else float(actual.norm())


def load_log(path: Path) -> list[Any]:
    with open(path, encoding="utf-8") as file:
        return json.load(file)


def assert_same_log(actual: Path, expected: Path, tolerance: float) -> None:
    """Trainer logs: [step, key, value]."""
    ours, theirs = load_log(actual), load_log(expected)
    assert [entry[:2] for entry in ours] == [entry[:2] for entry in theirs] and theirs
    differences = [(abs(a[2] - b[2]), a, b) for a, b in zip(ours, theirs, strict=True)]
    worst = max(differences)
    print(f"largest difference of {len(differences)} logged values: {worst[0]:.2e} ({worst[1]}, {worst[2]})")
    assert worst[0] <= tolerance, worst


def assert_same_tensors(actual: Path, expected: Path, tolerance: float) -> None:
    """Saved dicts of tensors: same names and shapes, rel-L2 of each within the tolerance (0: equal bits)."""
    ours, theirs = torch.load(actual), torch.load(expected)
    assert list(ours) == list(theirs) and theirs
    worst = (0.0, "")
    for name, tensor in theirs.items():
        assert ours[name].shape == tensor.shape and ours[name].dtype == tensor.dtype, name
        if tolerance == 0:
            assert torch.equal(ours[name], tensor), f"{name}: max abs {float((ours[name] - tensor).abs().max())}"
        worst = max(worst, (relative_l2(ours[name], tensor), name))
    print(f"worst rel-L2 of {len(theirs)} tensors: {worst[0]:.2e} ({worst[1]})")
    assert worst[0] <= tolerance, worst
