"""What the experts should reach on this machine, and whether they do.

    tests/bench/expert_targets                       about fifteen minutes, on a quiet machine
    tests/bench/expert_targets --samples 9 --json targets.json

Runs `kt-coproc bench` in variants that take turns, and a real daemon with one rank. What is missed is printed with the
stages of that row: bytes beyond L2, and the workers' time.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

import daemon_rows
import machine
import program
import targets
import variants
import workload
from program import say
from targets import Verdict

TOKENS = (1, 32, 512, 2048)


def layer_options(shape: workload.Shape) -> list[Any]:
    return [
        *("--hidden", shape.hidden, "--intermediate", shape.intermediate),
        *("--experts", shape.experts, "--top-k", shape.top_k),
    ]


def run_variants(shape: workload.Shape, workers: int, arguments: argparse.Namespace) -> variants.Rounds:
    compute_bound = (512, targets.COMPUTE_BOUND)
    found = [
        variants.Variant(variants.BASE, TOKENS),
        variants.Variant("int8", (1, 32, targets.COMPUTE_BOUND), ("--weight-format", "int8")),
        variants.Variant("int4", (1, 32), ("--weight-format", "int4")),
        variants.Variant("Zipf 1.0", compute_bound, ("--skew", "1.0")),
        *(variants.Variant(f"workers: {n}", (targets.COMPUTE_BOUND,), ("--threads", str(n))) for n in (1, 2)),
    ]
    rounds = variants.Rounds(found if workers > 1 else found[:-2], layer_options(shape))
    rounds.run(arguments.samples, program.rounds_max(arguments), say)
    return rounds


def variant_verdicts(rounds: variants.Rounds) -> list[Verdict]:
    verdicts = []

    def add(name: str, slow: str, fast: str, of: str, tokens: int, limit: float, at_least: bool = True) -> None:
        """Time of `slow` / time of `fast`; the stages are those of the one that is not the base."""
        for direction in ("forward", "backward"):
            ratio, disturbed = rounds.ratio(slow, fast, (direction, tokens))
            row = rounds.best(slow if fast == variants.BASE else fast)[direction, tokens]
            verdict = Verdict(f"{direction}, {name}", tokens, ratio, limit, of, at_least, disturbed=disturbed)
            verdict.profile = targets.profile_of(row)
            verdicts.append(verdict)

    for name, tokens, limit in targets.FORMATS:
        add(name, variants.BASE, name, "bf16's speed", tokens, limit)
    for tokens in (512, targets.COMPUTE_BOUND):
        add("Zipf 1.0", "Zipf 1.0", variants.BASE, "uniform routing's time", tokens, targets.SKEW_MAX, at_least=False)
    if "workers: 2" in rounds.names:
        add("2 workers", "workers: 1", "workers: 2", "1 worker's speed", targets.COMPUTE_BOUND, targets.TWO_WORKERS_MIN)
    return verdicts


def through_daemon(
    work: Path, shape: workload.Shape, rows: list[dict[str, Any]], arguments: argparse.Namespace
) -> tuple[list[dict[str, Any]], list[Verdict]]:
    """rows: of the bench without a daemon, for the bytes."""
    bytes_of = {(row["name"], row["tokens"]): row["bytes"] for row in rows if row["tokens"] in targets.DAEMON_SHARES}
    found = daemon_rows.measure(work, shape, bytes_of, arguments.samples, program.rounds_max(arguments), say)
    profiles = {(row["name"], row["tokens"]): targets.profile_of(row) for row in rows}
    verdicts = []
    for row, key in zip(found, bytes_of, strict=True):
        if row["name"].startswith("forward"):
            limit = targets.DAEMON_SHARES[row["tokens"]]
            verdict = Verdict(row["name"], row["tokens"], row["ratio"], limit, "dram", disturbed=row["disturbed"])
            verdict.profile = profiles[key]
            verdicts.append(verdict)
    return found, verdicts


def measure(arguments: argparse.Namespace, work: Path) -> dict[str, Any]:
    shape = workload.QUICK if arguments.quick else workload.Shape()
    samples = arguments.samples
    say("the layer in bf16, with and without LoRA")
    tokens = ",".join(map(str, TOKENS))
    sizes = layer_options(shape)
    base = machine.run_bench("layer", *sizes, "--rank", 8, "--tokens", tokens, "--samples", samples)
    verdicts = targets.layer_verdicts(base["rows"], 8)
    say("LoRA r=64")
    wide = machine.run_bench("layer", *sizes, "--rank", 64, "--tokens", "512,2048", "--samples", samples)
    verdicts += targets.lora_verdicts(wide["rows"], 64, targets.LORA_64_ADDS)
    rounds = run_variants(shape, base["worker_threads"], arguments)
    verdicts += variant_verdicts(rounds)
    rows, more = through_daemon(work, shape, base["rows"], arguments)
    verdicts += more
    named = [("", base["rows"]), (" r=64", [row for row in wide["rows"] if row["name"].endswith("lora")])]
    named += [(f", {name}", list(rounds.best(name).values())) for name in rounds.names if name != variants.BASE]
    return {
        "schema": 1,
        "machine": base["machine"],
        "peaks": base["peaks"],
        "kernels": base["kernels"],
        "worker_threads": base["worker_threads"],
        "binary": machine.coproc_binary(),
        "layer": base["layer"],
        "rows": [{**row, "name": row["name"] + suffix} for suffix, group in named for row in group] + rows,
        "targets": [verdict.as_json() for verdict in verdicts],
        "targets_apply": not arguments.quick,
    }


def table(report: dict[str, Any]) -> str:
    peaks, layer = report["peaks"], report["layer"]
    lines = [
        report["machine"],
        f"peak {peaks['bf16_flops'] * 1e-9:.0f} GFLOP/s in bf16, "
        f"memory {peaks['dram_bytes_per_second'] * 1e-9:.1f} GB/s",
        f"layer: hidden {layer['hidden_size']}, intermediate {layer['intermediate_size']}, "
        f"{layer['num_experts']} experts, top {layer['top_k']}; weights cold",
        "",
        f"{'':<36}{'tokens':>6} {'measured':>9} {'limit':>9}  of",
    ]
    lines += [target_line(target) for target in report["targets"]]
    missed = [target for target in report["targets"] if not target["met"]]
    lines += ["", f"{len(report['targets']) - len(missed)} of {len(report['targets'])} met"]
    for target in missed:
        lines += ["", f"missed: {target['name']}, {target['tokens']} tokens: {number(target, 'measured').strip()}"]
        lines += profile_lines(target["profile"], peaks)
    if not report["targets_apply"]:
        lines += ["", "--quick: a small layer, for which nothing is aimed at"]
    return "\n".join(lines)


def number(target: dict[str, Any], key: str) -> str:
    value = target[key]
    if target["of"] == "bytes":
        return f"{value * 1e-3:>6.1f} KB"
    return f"{value * 100:>7.1f} %" if target["of"] in ("dram", "peak") else f"{value:>8.2f}x"


def target_line(target: dict[str, Any]) -> str:
    of = {"dram": "DRAM bandwidth", "peak": "bf16 peak", "bytes": "activations beyond L2"}.get(
        target["of"], target["of"]
    )
    bound = "≥" if target["at_least"] else "≤"
    line = f"{target['name']:<36}{target['tokens']:>6} {number(target, 'measured')} "
    line += f"{bound}{number(target, 'limit')}  {of:<24}"
    line += "met" if target["met"] else "missed"
    if target["stretch"] is not None:
        reached = "met" if target["stretch_met"] else "missed"
        line += f"; stretch {target['stretch'] * 100:.0f} % {reached}"
    return line + ("  (disturbed by other processes)" if target["disturbed"] else "")


def profile_lines(profile: dict[str, Any], peaks: dict[str, float]) -> list[str]:
    """Why: the row's two bounds, and what each stage moves beyond L2 and takes of all workers' time."""
    bandwidth = peaks["dram_bytes_per_second"]
    lines = [
        f"  best {profile['seconds'] * 1e3:.2f} ms, {profile['barriers']} barriers; "
        f"its FLOPs take {profile['flops'] / peaks['bf16_flops'] * 1e3:.2f} ms at the best peak of the run, "
        f"its bytes {profile['bytes'] / bandwidth * 1e3:.2f} ms at the best bandwidth",
        f"  {'stage':<18}{'weights MB':>11}{'activations MB':>16}{'LoRA MB':>9}{'their ms':>10}"
        f"{'worker ms':>11}{'share':>8}",
    ]
    total = sum(stage["worker_seconds"] for stage in profile["stages"]) or 1
    for stage in profile["stages"]:
        moved = [stage[key] for key in ("weight_bytes", "activation_bytes", "lora_bytes")]
        line = f"  {stage['name']:<18}{moved[0] * 1e-6:>11.2f}{moved[1] * 1e-6:>16.2f}{moved[2] * 1e-6:>9.2f}"
        line += f"{sum(moved) / bandwidth * 1e3:>10.2f}{stage['worker_seconds'] * 1e3:>11.2f}"
        lines.append(line + f"{100 * stage['worker_seconds'] / total:>6.1f} %")
    return lines


def main() -> int:
    arguments = program.make_parser(__doc__, default_samples=5).parse_args()
    return 0 if program.run(arguments, measure, table) else 1


if __name__ == "__main__":
    sys.exit(main())
