"""What experts compute between gate, up and down: the family's activation, and a rank whose model has another one."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from compare import assert_same_tensors
from conftest import HERE, TIMEOUT, Daemon, environment, run_script
from kt_coproc import gating
from make_tiny import CLAMP
from transformers import Qwen3MoeConfig
from transformers.models.hy_v4.modeling_hy_v4 import HYV4Config, HYV4Experts
from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeExperts
from transformers.models.step3p7.modeling_step3p7 import Step3p7Experts, Step3p7TextConfig

LOAD = """
import sys
from transformers import AutoModelForCausalLM
AutoModelForCausalLM.from_pretrained(sys.argv[1], **eval(sys.argv[2]))
"""


@pytest.fixture(scope="module")
def clamped(work: Path) -> Path:
    path = work / "clamped"
    command = [sys.executable, str(HERE / "make_tiny.py"), str(path), "--clamped"]
    subprocess.run(command, check=True, env=environment(), timeout=TIMEOUT)
    return path


@pytest.fixture(scope="module")
def clamped_daemon(clamped: Path) -> Iterator[Daemon]:
    running = Daemon(clamped, "--weight-format", "fp32", "--threads", "1")
    yield running
    running.stop()


def load_refused(model: Path, address: str, **options: Any) -> str:
    command = [sys.executable, "-c", LOAD, str(model), repr(options)]
    result = subprocess.run(command, capture_output=True, text=True, env=environment(address), timeout=TIMEOUT)
    assert result.returncode != 0
    return result.stderr


def test_a_model_that_clamps_trains_as_without_us(clamped: Path, clamped_daemon: Daemon, work: Path) -> None:
    plain, ours = work / "clamped-plain.pt", work / "clamped-ours.pt"
    print(run_script("clamped.py", "--model", clamped, "--out", plain))
    run_script("clamped.py", "--model", clamped, "--out", ours, address=clamped_daemon.address)
    assert_same_tensors(ours, plain, 1e-5)


def test_the_status_names_activation_and_limit(clamped_daemon: Daemon) -> None:
    model = clamped_daemon.status()["model"]
    assert model["activation"] == "clamped_swiglu"
    assert model["activation_limit"] == pytest.approx(CLAMP)


def test_another_limit_than_the_daemons_is_refused_with_numbers(clamped: Path, clamped_daemon: Daemon) -> None:
    text = load_refused(clamped, clamped_daemon.address, swiglu_limit=0.7)
    assert "clamped_swiglu with limit 0.6" in text and "it makes" in text, text


def test_another_activation_than_the_daemons_is_refused(tiny: Path, daemon: Daemon) -> None:
    text = load_refused(tiny, daemon.address, hidden_act="gelu")
    assert "another activation than the daemon's swiglu" in text, text


def experts_of(cls: type, config: Any, **options: Any) -> Any:
    with torch.device("meta"):
        return cls(config, **options)


SIZES = {"hidden_size": 8, "moe_intermediate_size": 8}
SWIGLU = {"activation": "swiglu"}
CLAMPED = {"activation": "clamped_swiglu", "activation_limit": 7.0}


def qwen(**options: Any) -> Any:
    return experts_of(Qwen3MoeExperts, Qwen3MoeConfig(num_experts=2, **SIZES, **options))


def hunyuan(limit: float) -> Any:
    return experts_of(HYV4Experts, HYV4Config(n_routed_experts=2, swiglu_limit=limit, **SIZES))


def step(limit: float | None) -> Any:
    """Clamps what silu makes of the gate."""
    return experts_of(Step3p7Experts, Step3p7TextConfig(n_routed_experts=2, **SIZES), swiglu_limit=limit)


@pytest.mark.parametrize(
    ("experts", "served", "equal"),
    [
        pytest.param(qwen, SWIGLU, True, id="swiglu"),
        pytest.param(qwen, CLAMPED, False, id="no clamp"),
        pytest.param(lambda: qwen(hidden_act="gelu"), SWIGLU, False, id="gelu"),
        pytest.param(lambda: hunyuan(7.0), CLAMPED, True, id="clamped"),
        pytest.param(lambda: hunyuan(7.1), CLAMPED, False, id="another limit"),
        pytest.param(lambda: hunyuan(7.0), SWIGLU, False, id="a clamp"),
        pytest.param(lambda: step(7.0), CLAMPED, False, id="a clamp behind silu"),
        pytest.param(lambda: step(None), SWIGLU, True, id="a clamp that is off"),
        pytest.param(torch.nn.Identity, SWIGLU, False, id="nothing to try"),
        pytest.param(qwen, {"activation": "one of a later release"}, False, id="a daemon of a later release"),
    ],
)
def test_a_gating_is_the_daemons_or_named(experts: Any, served: dict[str, Any], equal: bool) -> None:
    difference = gating.difference(experts(), served)
    assert (difference is None) == equal, difference
