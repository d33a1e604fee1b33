"""Interleaved samples of peers in processes of their own, of which one computes at a time.

A peer that is not measured is stopped (SIGSTOP): neither an OpenMP team that waits in a barrier nor a dispatcher that
spins can take time from the one that is.
"""

from __future__ import annotations

import dataclasses
import json
import os
import select
import signal
import statistics
import subprocess
import sys
import threading
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import machine
import workload

HERE = Path(__file__).resolve().parent
SAMPLE_SECONDS = 0.2  # Long enough that a tick of /proc/stat, 10 ms, is not everything.
CALLS_MAX = 16


class PeerFailed(machine.BenchError):
    """A peer cannot run here, or ended."""

    def __init__(self, name: str, why: str) -> None:
        super().__init__(f"{name} cannot be measured", why, "leave it out of --peers, or mend what it says")
        self.name, self.why = name, why


class PeerProcess:
    """peer_process.py. Stopped whenever none of its methods runs.

    Raises:
        PeerFailed: it cannot run on this machine, with its reason.
    """

    def __init__(
        self,
        name: str,
        model: Path,
        shape: workload.Shape,
        *,
        tokens_max: int,
        threads: int,
        address: str | None = None,
        also: Sequence[int] = (),
    ) -> None:
        """also: processes whose CPU time is this peer's too."""
        self.name = name
        self._also = list(also)
        kept = {key: value for key, value in os.environ.items() if not key.startswith("KT_")}
        kept.update(peer_environment(threads))
        if address is not None:
            kept["KT_COPROC"] = address
        command = [sys.executable, str(HERE / "peer_process.py"), name, str(model)]
        command += [json.dumps(dataclasses.asdict(shape)), "--tokens-max", str(tokens_max), "--threads", str(threads)]
        self._process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=kept
        )
        self._said = Drain(self._process.stderr)
        try:
            self.about = self._answer()
        except BaseException:
            self.stop()
            raise
        self._pause()

    def _pause(self) -> None:
        self._process.send_signal(signal.SIGSTOP)

    def _answer(self) -> dict[str, Any]:
        ready, _, _ = select.select([self._process.stdout], [], [], machine.TIMEOUT)
        line = self._process.stdout.readline() if ready else ""
        if not line:
            why = f"no answer within {machine.TIMEOUT} s" if not ready else f"it ended: {self._said.text()[-1500:]}"
            raise PeerFailed(self.name, why)
        message = json.loads(line)
        if "error" in message:
            raise PeerFailed(self.name, message["error"])
        return message

    def _ask(self, **command: Any) -> dict[str, Any]:
        self._process.send_signal(signal.SIGCONT)
        self._process.stdin.write(json.dumps(command) + "\n")
        self._process.stdin.flush()
        answer = self._answer()
        self._pause()
        return answer

    def check(self, mode: str, num_tokens: int, file: Path) -> dict[str, Any]:
        """Call 0's results, and the adapter's gradients, to a safetensors file in fp32. Returns the peer's settings."""
        return self._ask(do="check", mode=mode, tokens=num_tokens, file=str(file))

    def measure(self, mode: str, num_tokens: int, first: int, calls: int) -> Sample:
        others = machine.OtherLoad([self._process.pid, *self._also])
        answer = self._ask(do="run", mode=mode, tokens=num_tokens, first=first, calls=calls)
        return Sample({"forward": answer["forward"], "backward": answer["backward"]}, others.is_disturbed())

    def stop(self) -> None:
        if self._process.poll() is None:
            self._process.send_signal(signal.SIGCONT)
            self._process.terminate()
            self._process.wait(machine.TIMEOUT)
        self._said.close()

    def __enter__(self) -> PeerProcess:
        return self

    def __exit__(self, *_: Any) -> None:
        self.stop()


def peer_environment(threads: int) -> dict[str, str]:
    """What every peer process gets.

    As many threads as the daemon has workers; they sleep while they wait, since one that spins takes the core of one
    that works. Large pages for torch's memory: it reads weights from DRAM, as the daemon does from its huge pages.
    """
    return {
        "OMP_NUM_THREADS": str(threads),
        "OMP_WAIT_POLICY": "passive",
        "THP_MEM_ALLOC_ENABLE": "1",
        "HF_HUB_OFFLINE": "1",
        "TOKENIZERS_PARALLELISM": "false",
    }


class Drain:
    """Reads what a process says, so that it never waits for a reader."""

    def __init__(self, stream: Any) -> None:
        self._lines: list[str] = []
        self._stream = stream
        self._thread = threading.Thread(target=lambda: self._lines.extend(stream), daemon=True)
        self._thread.start()

    def text(self) -> str:
        self._thread.join(2)
        return "".join(self._lines)

    def close(self) -> None:
        self._thread.join(2)
        self._stream.close()


@dataclasses.dataclass
class Sample:
    """Seconds of one call by direction."""

    seconds: dict[str, float]
    disturbed: bool


@dataclasses.dataclass
class Pairs:
    """Ours and a peer's samples of one mode and number of tokens, round by round."""

    mode: str
    num_tokens: int
    calls: dict[str, int]  # In a sample, by "ours", "peer".
    rounds: list[tuple[Sample, Sample]] = dataclasses.field(default_factory=list)

    def clean(self) -> list[tuple[Sample, Sample]]:
        return [pair for pair in self.rounds if not (pair[0].disturbed or pair[1].disturbed)]

    @property
    def is_disturbed(self) -> bool:
        """There was no clean pair, so the disturbed ones count."""
        return not self.clean()

    def counted(self) -> list[tuple[Sample, Sample]]:
        return self.clean() or self.rounds

    def ratio(self, direction: str) -> float:
        """Median of the peer's seconds over ours in the same round."""
        return statistics.median(peer.seconds[direction] / ours.seconds[direction] for ours, peer in self.counted())

    def best_seconds(self, direction: str) -> tuple[float, float]:
        """Ours, the peer's."""
        counted = self.counted()
        return tuple(min(pair[side].seconds[direction] for pair in counted) for side in (0, 1))


def calls_that_fill(sample: Sample) -> int:
    return max(1, min(CALLS_MAX, int(SAMPLE_SECONDS / sum(sample.seconds.values()))))


def sample_pairs(
    ours: PeerProcess,
    peer: PeerProcess,
    modes: Sequence[str],
    tokens: Sequence[int],
    num_samples: int,
    rounds_max: int,
) -> list[Pairs]:
    """Every mode and number of tokens of a peer beside ours; whose turn is first alternates from round to round."""
    found = []
    for num_tokens in tokens:
        for mode in modes:
            calls = {}
            for key, process in (("ours", ours), ("peer", peer)):
                process.measure(mode, num_tokens, 0, 1)  # Scratch memory grows, gradients get their memory.
                calls[key] = calls_that_fill(process.measure(mode, num_tokens, 0, 1))
            found.append(Pairs(mode, num_tokens, calls))
    for number in range(rounds_max):
        wanting = [pairs for pairs in found if len(pairs.clean()) < num_samples]
        if not wanting:
            break
        for pairs in wanting:
            turns = [("ours", ours), ("peer", peer)]
            first = 1 + number * CALLS_MAX
            taken = {
                key: process.measure(pairs.mode, pairs.num_tokens, first, pairs.calls[key])
                for key, process in (turns if number % 2 == 0 else turns[::-1])
            }
            pairs.rounds.append((taken["ours"], taken["peer"]))
    return found
