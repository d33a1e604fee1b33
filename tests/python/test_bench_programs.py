"""The programs of tests/bench, on a small layer: they run, their JSON has its keys, and all engines agree."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import TIMEOUT, coproc_binary, environment
from safetensors.torch import save_file

BENCH = Path(__file__).resolve().parents[1] / "bench"


def run_program(name: str, *arguments: str) -> dict[str, Any]:
    result = subprocess.run(
        [sys.executable, str(BENCH / f"{name}.py"), "--quick", "--samples", "1", "--json", "-", *arguments],
        capture_output=True,
        text=True,
        env=environment(KT_COPROC_BIN=coproc_binary()),
        timeout=TIMEOUT,
    )
    assert result.returncode == 0, result.stdout[-2000:] + result.stderr[-2000:]
    return json.loads(result.stdout)


def check_schema(report: dict[str, Any]) -> None:
    assert report["schema"] == 1
    assert report["machine"]
    assert report["peaks"]["bf16_flops"] > 0 and report["peaks"]["dram_bytes_per_second"] > 0
    assert report["rows"]
    for row in report["rows"]:
        assert {"name", "tokens", "seconds", "ratio", "of"} <= row.keys()
        assert row["seconds"] > 0 and row["ratio"] > 0


def test_compare_peers_agree_with_a_real_daemon() -> None:
    report = run_program("compare_peers", "--tokens", "3", "--peers", "grouped_mm,linear")
    check_schema(report)
    assert not any(peer["unavailable"] for peer in report["peers"])
    assert {(row["peer"], row["mode"], row["direction"]) for row in report["rows"]} == {
        (peer, mode, direction)
        for peer in ("grouped_mm", "linear")
        for mode in ("frozen", "lora")
        for direction in ("forward", "backward")
    }
    assert all(row["agrees"] for row in report["rows"]), [row["relative_l2"] for row in report["rows"]]


def test_expert_targets_say_what_is_met() -> None:
    report = run_program("expert_targets")
    check_schema(report)
    assert report["targets"]
    for target in report["targets"]:
        assert target["met"] == (
            target["measured"] >= target["limit"] if target["at_least"] else target["measured"] <= target["limit"]
        )
        assert target["met"] or target["profile"]["stages"]


def test_a_result_that_differs_is_seen(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(BENCH))
    import agreement

    print("seed 5")
    right = torch.randn(64, 32, generator=torch.Generator().manual_seed(5))
    one_row_missing = right.clone()
    one_row_missing[7] = 0
    save_file({"output": right}, tmp_path / "right")
    save_file({"output": right.bfloat16().float()}, tmp_path / "rounded")
    save_file({"output": one_row_missing}, tmp_path / "wrong")
    save_file({"output": right, "grad_down_a": right.clone()}, tmp_path / "more")
    assert agreement.agrees(agreement.relative_differences(tmp_path / "rounded", tmp_path / "right"))
    assert not agreement.agrees(agreement.relative_differences(tmp_path / "wrong", tmp_path / "right"))
    with pytest.raises(ValueError, match="grad_down_a"):
        agreement.relative_differences(tmp_path / "more", tmp_path / "right")
