"""A start from the cache of quantised weights serves the same weights, bit for bit, as the start that made it."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
from conftest import TIMEOUT, Daemon, environment

FORWARD_AND_BACKWARD = """
import hashlib, sys, torch, kt_coproc
with kt_coproc.connect(sys.argv[1]) as client:
    experts = kt_coproc.MoEExperts(0, client)
    model = kt_coproc.stats(client)["model"]
    torch.manual_seed(5)
    hidden = torch.randn(23, model["hidden_size"], dtype=torch.bfloat16, requires_grad=True)
    scores = torch.randn(23, model["num_experts"]).softmax(-1)
    weights, ids = scores.topk(model["top_k"], dim=-1)
    output = experts(hidden, ids, weights)
    output.float().square().sum().backward()
    digest = hashlib.sha256()
    for tensor in (output.detach(), hidden.grad):
        digest.update(tensor.contiguous().view(torch.uint8).numpy().tobytes())
    print("bits", digest.hexdigest(), float(output.detach().float().norm()))
"""


def bits_of(daemon: Daemon) -> str:
    result = subprocess.run(
        [sys.executable, "-c", FORWARD_AND_BACKWARD, daemon.address],
        capture_output=True,
        text=True,
        env=environment(),
        timeout=TIMEOUT,
    )
    assert result.returncode == 0, result.stdout + result.stderr
    return next(line for line in result.stdout.splitlines() if line.startswith("bits"))


@pytest.mark.parametrize("weight_format", ["int8", "int4", "fp8"])
def test_a_start_from_the_cache_serves_the_same_bits(tiny: Path, tmp_path: Path, weight_format: str) -> None:
    cache = tmp_path / "cache"
    found = []
    for expected in ("weight cache: miss", "weight cache: hit"):
        daemon = Daemon(tiny, "--weight-format", weight_format, "--weight-cache", str(cache), "--threads", "1")
        try:
            found.append(bits_of(daemon))
            daemon.wait_for("the cache", lambda _: list(cache.glob("*.weights")))
            assert expected in daemon.log.read_text()
        finally:
            daemon.stop()
    assert found[0] == found[1]
    assert len(list(cache.iterdir())) == 1


def test_off_writes_nothing(tiny: Path, tmp_path: Path) -> None:
    daemon = Daemon(tiny, "--weight-format", "int8", "--weight-cache", "off", "--threads", "1")
    log = daemon.log.read_text()
    daemon.stop()
    assert "weight cache" not in log
