"""`kt-coproc bench layer` in variants that take turns: formats, skewed routing, one worker.

One short run of each makes a round. Only a variant's seconds over the base's in the same round are worth comparing.
"""

from __future__ import annotations

import dataclasses
import statistics
from collections.abc import Callable, Sequence
from typing import Any

import machine

BASE = "bf16"


@dataclasses.dataclass(frozen=True)
class Variant:
    """How it differs from the base, which is bf16, uniform routing, two workers, without LoRA."""

    name: str
    tokens: tuple[int, ...]
    options: tuple[str, ...] = ()
    rank: int = 0


class Rounds:
    """Rows of all variants, round by round."""

    def __init__(self, variants: Sequence[Variant], common: Sequence[Any]) -> None:
        """common: options of every run, such as a layer's sizes."""
        self._variants = variants
        self._common = common
        self._rounds: list[dict[str, dict[tuple[str, int], dict[str, Any]]]] = []

    def run(self, num_samples: int, rounds_max: int, say: Callable[[str], None]) -> None:
        """Until num_samples rounds were not disturbed, at least so many rounds, and no more than rounds_max."""
        for number in range(rounds_max):
            if number >= num_samples and self._num_clean() >= num_samples:
                break
            say(f"round {number + 1}: {', '.join(variant.name for variant in self._variants)}")
            self._rounds.append({variant.name: self._measure(variant) for variant in self._variants})

    def _measure(self, variant: Variant) -> dict[tuple[str, int], dict[str, Any]]:
        report = machine.run_bench(
            "layer",
            *self._common,
            *("--samples", 1, "--rank", variant.rank, "--tokens", ",".join(map(str, variant.tokens))),
            *variant.options,
        )
        return {(row["name"], row["tokens"]): row for row in report["rows"]}

    @property
    def names(self) -> list[str]:
        return [variant.name for variant in self._variants]

    def _num_clean(self) -> int:
        """Rounds in which nothing was disturbed."""
        return sum(not any(row["disturbed"] for rows in one.values() for row in rows.values()) for one in self._rounds)

    def ratio(self, numerator: str, denominator: str, key: tuple[str, int]) -> tuple[float, bool]:
        """Median of one variant's seconds / another's in the same round; whether only disturbed pairs were there."""
        pairs = [(one[numerator][key], one[denominator][key]) for one in self._rounds]
        clean = [pair for pair in pairs if not (pair[0]["disturbed"] or pair[1]["disturbed"])]
        return statistics.median(a["seconds"] / b["seconds"] for a, b in clean or pairs), not clean

    def best(self, name: str) -> dict[tuple[str, int], dict[str, Any]]:
        """The fastest row of each direction and number of tokens."""
        return {
            key: min((one[name][key] for one in self._rounds), key=lambda row: row["seconds"])
            for key in self._rounds[0][name]
        }
