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
LORA_ADDS = {"forward": 1.04, "backward": 1.08}  # At 512 tokens and more.
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
    profile: list[dict[str, Any]] = dataclasses.field(default_factory=list)  # Stages of the row that was measured.

    @property
    def met(self) -> bool:
        return self.measured >= self.limit if self.at_least else self.measured <= self.limit

    def as_json(self) -> dict[str, Any]:
        found = dataclasses.asdict(self)
        found["met"] = self.met
        if self.met:
            del found["profile"]
        return found


def layer_verdicts(rows: list[dict[str, Any]], rank: int) -> list[Verdict]:
    """Of one `kt-coproc bench layer` run in bf16. The frozen layer and the one with LoRA are held to the same shares."""
    verdicts = []
    by_key = {(row["name"], row["tokens"]): row for row in rows}
    for tokens, direction, of, at_least, stretch in SHARES:
        for name in (direction, direction + " lora"):
            row = by_key[name, tokens]
            verdicts.append(
                Verdict(name, tokens, row[f"ratio_of_{of}"], at_least, of, stretch=stretch, **_from(row))
            )
    for (name, tokens), row in by_key.items():
        if name.endswith("lora") and tokens >= 512:
            verdicts += lora_verdicts(row, rank, LORA_ADDS)
        if tokens >= 512:
            measured, limit = row["activation_bytes_per_route"], BYTES_PER_ROUTE[name.split()[0]]
            verdicts.append(
                Verdict(f"{name}, bytes per route", tokens, measured, limit, "bytes", at_least=False, **_from(row))
            )
    return verdicts


def lora_verdicts(row: dict[str, Any], rank: int, limits: dict[str, float]) -> list[Verdict]:
    """What LoRA adds to the frozen layer; nothing where no limit is set for the row's direction."""
    direction = row["name"].split()[0]
    if direction not in limits:
        return []
    name = f"{direction}, LoRA r={rank}"
    # Without a clean sample of both in one round there is no ratio.
    measured = row.get("ratio_to_frozen", float("nan"))
    verdict = Verdict(name, row["tokens"], measured, limits[direction], "frozen", at_least=False, **_from(row))
    verdict.disturbed |= "ratio_to_frozen" not in row
    return [verdict]


def _from(row: dict[str, Any]) -> dict[str, Any]:
    return {"disturbed": row["disturbed"], "profile": stages_of(row)}


def stages_of(row: dict[str, Any]) -> list[dict[str, Any]]:
    """The stages of a bench row: their bytes, and their seconds where the bench measures them."""
    return list(row.get("stages") or row["traffic"])
