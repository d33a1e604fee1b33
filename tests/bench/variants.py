"""`kt-coproc bench layer` in variants that take turns: formats, skewed routing, one worker.

One short run of each makes a round. Only a variant's seconds over the base's in the same round are worth comparing.
"""

from __future__ import annotations

import dataclasses
import statistics
from collections.abc import Callable, Sequence
from typing import Any

import machine

ROUNDS_PER_SAMPLE = 3
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

    def run(self, num_samples: int, say: Callable[[str], None]) -> None:
        """Until every row has num_samples clean pairs, or for three times as many rounds."""
        for number in range(num_samples * ROUNDS_PER_SAMPLE):
            if number >= num_samples and all(
                len(self._pairs(variant.name, key, clean=True)) >= num_samples
                for variant in self._variants
                for key in self._rounds[0][variant.name]
            ):
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

    def _pairs(self, name: str, key: tuple[str, int], clean: bool) -> list[tuple[dict[str, Any], dict[str, Any]]]:
        pairs = [(one[BASE][key], one[name][key]) for one in self._rounds if key in one[BASE]]
        return [pair for pair in pairs if not clean or not (pair[0]["disturbed"] or pair[1]["disturbed"])]

    def over_base(self, name: str, key: tuple[str, int]) -> tuple[float, bool]:
        """Median of the variant's seconds / the base's; whether only disturbed pairs were there."""
        clean = self._pairs(name, key, clean=True)
        pairs = clean or self._pairs(name, key, clean=False)
        return statistics.median(variant["seconds"] / base["seconds"] for base, variant in pairs), not clean

    def best(self, name: str) -> list[dict[str, Any]]:
        """The fastest row of each number of tokens and direction."""
        return [min((one[name][key] for one in self._rounds), key=lambda row: row["seconds"]) for key in self._rounds[0][name]]
