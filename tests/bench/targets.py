"""What the experts of Qwen3-30B-A3B's layer should reach. Only ratios: machines vary."""

from __future__ import annotations

import dataclasses
from typing import Any

BYTES_PER_ROUTE = {"forward": 18e3, "backward": 26e3}  # Activations beyond L2 at hidden 2048, intermediate 768.
SHARES = [  # tokens, direction, of, at least, stretch
    (1, "forward", "dram", 0.90, None),
    (32, "forward", "dram", 0.90, None),
    (512, "forward", "peak", 0.85, None),
    (2048, "forward", "peak", 0.90, None),
    (1, "backward", "dram", 0.60, 0.80),
    (32, "backward", "dram", 0.60, 0.80),
    (512, "backward", "peak", 0.60, 0.68),
    (2048, "backward", "peak", 0.78, 0.82),
]
MANY_TOKENS = 512  # From here on:
LORA_ADDS = {"forward": 1.04, "backward": 1.08}
LORA_64_ADDS = {"backward": 1.30}
DAEMON_SHARES = {1: 0.80, 32: 0.88}  # Of DRAM bandwidth, forward.
FORMATS = [("int8", 1, 1.8), ("int8", 32, 1.8), ("int8", 2048, 0.93), ("int4", 1, 3.0), ("int4", 32, 2.3)]
SKEW_MAX = 1.10
TWO_WORKERS_MIN = 1.9
COMPUTE_BOUND = 2048  # Tokens.


@dataclasses.dataclass
class Verdict:
    """One target: what was measured, and whether that is enough."""

    name: str
    tokens: int
    measured: float
    limit: float
    of: str  # What a measured 1.0 is.
    at_least: bool = True
    stretch: float | None = None
    disturbed: bool = False  # Nothing undisturbed could be measured.
    profile: dict[str, Any] = dataclasses.field(default_factory=dict)  # profile_of the row that was measured.

    @property
    def met(self) -> bool:
        return self._is_within(self.limit)

    def _is_within(self, limit: float) -> bool:
        return self.measured >= limit if self.at_least else self.measured <= limit

    def as_json(self) -> dict[str, Any]:
        found = dataclasses.asdict(self)
        found["met"] = self.met
        if self.stretch is not None:
            found["stretch_met"] = self._is_within(self.stretch)
        if self.met:
            del found["profile"]
        return found


def layer_verdicts(rows: list[dict[str, Any]], rank: int) -> list[Verdict]:
    """Of one `kt-coproc bench layer` run in bf16. Frozen and with LoRA, the layer is held to the same shares."""
    verdicts = []
    by_key = {(row["name"], row["tokens"]): row for row in rows}
    for tokens, direction, of, at_least, stretch in SHARES:
        for name in (direction, direction + " lora"):
            row = by_key[name, tokens]
            verdict = Verdict(name, tokens, row[f"ratio_of_{of}"], at_least, of, stretch=stretch)
            verdict.disturbed, verdict.profile = row["disturbed"], profile_of(row)
            verdicts.append(verdict)
    verdicts += lora_verdicts(rows, rank, LORA_ADDS)
    for (name, tokens), row in by_key.items():
        if tokens >= MANY_TOKENS:
            measured, limit = row["activation_bytes_per_route"], BYTES_PER_ROUTE[name.split()[0]]
            verdict = Verdict(f"{name}, bytes per route", tokens, measured, limit, "bytes", at_least=False)
            verdict.profile = profile_of(row)
            verdicts.append(verdict)
    return verdicts


def lora_verdicts(rows: list[dict[str, Any]], rank: int, limits: dict[str, float]) -> list[Verdict]:
    """What LoRA adds to the frozen layer, in the directions that have a limit."""
    verdicts = []
    by_key = {(row["name"], row["tokens"]): row for row in rows}
    for (name, tokens), row in by_key.items():
        direction, _, has_lora = name.partition(" ")
        if tokens < MANY_TOKENS or not has_lora or direction not in limits:
            continue
        # Without a clean sample of both in one round the bench knows no ratio.
        measured = row.get("ratio_to_frozen") or row["seconds"] / by_key[direction, tokens]["seconds"]
        of = "the frozen layer's time"
        verdict = Verdict(f"{direction}, LoRA r={rank}", tokens, measured, limits[direction], of, at_least=False)
        verdict.disturbed = "ratio_to_frozen" not in row
        verdict.profile = profile_of(row)
        verdicts.append(verdict)
    return verdicts


def profile_of(row: dict[str, Any]) -> dict[str, Any]:
    """Of a bench row: what bounds it, and its stages with their bytes and the workers' seconds."""
    kept = ("seconds", "roofline_seconds", "flops", "bytes", "barriers", "stages")
    return {key: row[key] for key in kept}
