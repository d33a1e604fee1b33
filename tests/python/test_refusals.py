"""What is refused is refused with three lines: what, why, and what to do instead."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from conftest import Daemon, run_script

CASES = {
    "SGD": ("CoprocError", "SGD is neither Adam nor AdamW"),
    "RMSprop": ("CoprocError", "RMSprop is neither Adam nor AdamW"),
    "Adafactor": ("CoprocError", "Adafactor is neither Adam nor AdamW"),
    "amsgrad": ("CoprocError", "AdamW with amsgrad=True"),
    "maximize": ("CoprocError", "Adam with maximize=True"),
    "base weights in an optimizer": ("CoprocError", "base weights of routed experts cannot be trained"),
    "closure": ("CoprocError", "optimizer.step(closure) refused"),
    "GradScaler": ("CoprocError", "use"),
    "clip with another norm": ("CoprocError", "norm_type is 1.0"),
    "clip by value": ("CoprocError", "clip_grad_value_ cannot include expert adapters"),
    "clip with a norm from elsewhere": ("CoprocError", "cannot include expert adapters"),
    "clip a part": ("CoprocError", "cannot clip a part of adapter 'default'"),
    "gradient assigned": ("CoprocError", "gradient of an expert parameter cannot be assigned"),
    "merge": ("CoprocError", "in a process without KT_COPROC"),
    "save_pretrained of the whole model": ("CoprocError", "PEFT's save_pretrained"),
    "torch.save of the model": ("CoprocError", "PEFT's save_pretrained"),
    "torch.save of the state dict": ("CoprocError", "PEFT's save_pretrained"),
    "reading a base weight": ("CoprocError", "gate_up_proj of layer 0"),
    "changing a base weight": ("CoprocError", "down_proj of layer 0"),
    "loading base weights": ("RuntimeError", "the weights of the routed experts are in the co-process"),
    "DataParallel": ("CoprocError", "DistributedDataParallel"),
    "two adapters active at once": ("CoprocError", "default, two"),
    "a changed scaling": ("CoprocError", "0.25"),
    "a negative expert": ("CoprocError", "-1"),
    "hidden states of another size": ("CoprocError", "65"),
    "a layer without experts": ("CoprocError", "layer 99"),
    "join without torch.distributed": ("CoprocError", "init_process_group"),
    "attach a dense model": ("CoprocError", "no routed experts"),
}


@pytest.fixture(scope="module")
def refusals(work: Path, tiny: Path, daemon: Daemon) -> dict[str, Any]:
    out = work / "refusals.json"
    run_script("refusals.py", "--model", tiny, "--out", out, address=daemon.address)
    assert not (work / "refusals.json.full").exists(), "a checkpoint without its experts was begun"
    with open(out, encoding="utf-8") as file:
        return json.load(file)


@pytest.mark.parametrize("case", CASES)
def test_refused(refusals: dict[str, Any], case: str) -> None:
    kind, text = refusals[case]
    expected_kind, fragment = CASES[case]
    assert (kind, fragment in text) == (expected_kind, True), f"{kind}: {text}"
    if kind != "RuntimeError":
        lines = text.split("\n")
        assert len(lines) == 3, text
        assert lines[0].startswith("error: ") and lines[1].startswith("  why: ") and lines[2].startswith("  fix: ")


def test_every_case_is_checked_here(refusals: dict[str, Any]) -> None:
    assert set(refusals) - {"nothing changed"} == set(CASES)


def test_a_refused_step_changes_no_parameter(refusals: dict[str, Any]) -> None:
    assert refusals["nothing changed"][0] == "True"
