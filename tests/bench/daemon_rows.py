"""The layer through a real daemon, as a rank sees it: the share of DRAM bandwidth of a round trip."""

from __future__ import annotations

import statistics
from collections.abc import Callable
from pathlib import Path
from typing import Any

import checkpoint
import machine
import peers
import rounds
import workload
from daemon import Daemon


def measure(
    work: Path,
    shape: workload.Shape,
    bytes_of: dict[tuple[str, int], float],
    num_samples: int,
    rounds_max: int,
    say: Callable[[str], None],
) -> list[dict[str, Any]]:
    """Rows of forward and backward at the numbers of tokens of bytes_of; a probe before and after each sample.

    Args:
        bytes_of: (name of a bench row, tokens) -> bytes of a call, from the bench's account.
    """
    model = work / "model"
    say("through the daemon: writing a checkpoint")
    checkpoint.write_checkpoint(model, shape)
    samples: dict[tuple[str, int], list[tuple[rounds.Sample, float]]] = {}
    keys = {(mode, tokens) for name, tokens in bytes_of for mode in [peers.LORA if "lora" in name else peers.FROZEN]}
    with (
        Daemon(model) as daemon,
        rounds.PeerProcess(
            peers.OURS,
            model,
            shape,
            tokens_max=max(tokens for _, tokens in keys),
            threads=1,
            address=daemon.address,
            also=[daemon.pid],
        ) as rank,
    ):
        calls = {}
        for mode, tokens in sorted(keys):
            rank.measure(mode, tokens, 0, 1)
            calls[mode, tokens] = rounds.calls_that_fill(rank.measure(mode, tokens, 0, 1))
            samples[mode, tokens] = []
        before = _bandwidth(daemon.num_workers)
        for number in range(rounds_max):
            wanting = [key for key in sorted(keys) if _num_clean(samples[key]) < num_samples]
            if wanting:
                say(f"through the daemon: round {number + 1}")
            for mode, tokens in wanting:
                first = 1 + number * rounds.CALLS_MAX
                sample = rank.measure(mode, tokens, first, calls[mode, tokens])
                after = _bandwidth(daemon.num_workers)
                samples[mode, tokens].append((sample, (before + after) / 2))
                before = after
    return [_row(name, tokens, num_bytes, samples) for (name, tokens), num_bytes in bytes_of.items()]


def _bandwidth(num_workers: int) -> float:
    return machine.run_bench("peaks", "--threads", num_workers)["peaks"]["dram_bytes_per_second"]


def _num_clean(samples: list[tuple[rounds.Sample, float]]) -> int:
    return sum(not sample.disturbed for sample, _ in samples)


def _row(
    name: str, tokens: int, num_bytes: float, samples: dict[tuple[str, int], list[tuple[rounds.Sample, float]]]
) -> dict[str, Any]:
    mode = peers.LORA if "lora" in name else peers.FROZEN
    taken = samples[mode, tokens]
    clean = [one for one in taken if not one[0].disturbed]
    counted = [(sample.seconds[name.split()[0]], bandwidth) for sample, bandwidth in clean or taken]
    return {
        "name": f"{name} through the daemon",
        "tokens": tokens,
        "seconds": min(seconds for seconds, _ in counted),
        "ratio": statistics.median(num_bytes / seconds / bandwidth for seconds, bandwidth in counted),
        "of": "dram_bytes_per_second",
        "bytes": num_bytes,
        "samples": len(counted),
        "samples_discarded": len(taken) - len(clean) if clean else 0,
        "disturbed": not clean,
    }
