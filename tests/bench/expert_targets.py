"""What the experts should reach on this machine, and whether they do.

    tests/bench/expert_targets                       about fifteen minutes, on a quiet machine
    tests/bench/expert_targets --samples 9 --json targets.json

Runs `kt-coproc bench` in variants that take turns, and a real daemon with one rank. What is missed is printed with the
stages of that row: bytes beyond L2, and seconds where the bench has them.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
import tempfile
from pathlib import Path
from typing import Any

import daemon_rows
import machine
import targets
import variants
import workload
from targets import Verdict

TOKENS = (1, 32, 512, 2048)


def layer_options(shape: workload.Shape) -> list[Any]:
    return [
        *("--hidden", shape.hidden, "--intermediate", shape.intermediate),
        *("--experts", shape.experts, "--top-k", shape.top_k),
    ]


def run_variants(shape: workload.Shape, workers: int, num_samples: int) -> tuple[variants.Rounds, list[Verdict]]:
    compute_bound = (512, targets.COMPUTE_BOUND)
    found = [
        variants.Variant(variants.BASE, TOKENS, ("--threads", str(workers))),
        variants.Variant("int8", (1, 32, 2048), ("--weight-format", "int8")),
        variants.Variant("int4", (1, 32), ("--weight-format", "int4")),
        variants.Variant("Zipf 1.0", compute_bound, ("--skew", "1.0")),
    ]
    if workers >= 2:
        found.append(variants.Variant("one worker", (targets.COMPUTE_BOUND,), ("--threads", "1")))
    if workers > 2:
        found.append(variants.Variant("two workers", (targets.COMPUTE_BOUND,), ("--threads", "2")))
    rounds = variants.Rounds(found, layer_options(shape))
    rounds.run(num_samples, say)
    return rounds, variant_verdicts(rounds, workers)


def variant_verdicts(rounds: variants.Rounds, workers: int) -> list[Verdict]:
    verdicts = []

    def add(name: str, variant: str, direction: str, tokens: int, limit: float, of: str, **options: Any) -> None:
        over_base, disturbed = rounds.over_base(variant, (direction, tokens))
        measured = 1 / over_base if options.get("at_least", True) and variant != "one worker" else over_base
        row = next(r for r in rounds.best(variant) if (r["name"], r["tokens"]) == (direction, tokens))
        profile = targets.stages_of(row)
        verdicts.append(
            Verdict(name, tokens, measured, limit, of, disturbed=disturbed, profile=profile, **options)
        )

    for direction in ("forward", "backward"):
        for weight_format, tokens, limit in targets.FORMATS:
            add(f"{direction}, {weight_format}", weight_format, direction, tokens, limit, "bf16's speed")
        for tokens in (512, targets.COMPUTE_BOUND):
            name = f"{direction}, Zipf 1.0"
            add(name, "Zipf 1.0", direction, tokens, targets.SKEW_MAX, "uniform's time", at_least=False)
        if workers == 2:
            name = f"{direction}, 2 workers"
            add(name, "one worker", direction, targets.COMPUTE_BOUND, targets.TWO_WORKERS_MIN, "1 worker's speed")
    return verdicts


def through_daemon(
    work: Path, shape: workload.Shape, rows: list[dict[str, Any]], num_samples: int
) -> tuple[list[dict[str, Any]], list[Verdict]]:
    """rows: of the bench without a daemon, for the bytes."""
    bytes_of = {(row["name"], row["tokens"]): row["bytes"] for row in rows if row["tokens"] in targets.DAEMON_SHARES}
    found = daemon_rows.measure(work, shape, bytes_of, num_samples, say)
    profiles = {(row["name"], row["tokens"]): targets.stages_of(row) for row in rows}
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
    for row in wide["rows"]:
        if row["name"].endswith("lora"):
            verdicts += targets.lora_verdicts(row, 64, targets.LORA_64_ADDS)
    rounds, more = run_variants(shape, base["worker_threads"], samples)
    rows, last = through_daemon(work, shape, base["rows"], samples)
    named = [("", base["rows"]), (" r=64", [row for row in wide["rows"] if row["name"].endswith("lora")])]
    named += [(f" {name}", rounds.best(name)) for name in rounds.names if name != variants.BASE]
    return {
        "schema": 1,
        "machine": base["machine"],
        "peaks": base["peaks"],
        "kernels": base["kernels"],
        "worker_threads": base["worker_threads"],
        "binary": machine.coproc_binary(),
        "layer": base["layer"],
        "rows": [{**row, "name": row["name"] + suffix} for suffix, group in named for row in group] + rows,
        "targets": [verdict.as_json() for verdict in verdicts + more + last],
        "targets_apply": not arguments.quick,
    }


def table(report: dict[str, Any]) -> str:
    peaks, layer = report["peaks"], report["layer"]
    lines = [
        report["machine"],
        f"peak {peaks['bf16_flops'] * 1e-9:.0f} GFLOP/s in bf16, memory {peaks['dram_bytes_per_second'] * 1e-9:.1f} GB/s",
        f"layer: hidden {layer['hidden_size']}, intermediate {layer['intermediate_size']}, {layer['num_experts']} experts, "
        f"top {layer['top_k']}; weights cold",
        "",
        f"{'':<36}{'tokens':>6} {'measured':>9} {'limit':>9}  of",
    ]
    lines += [target_line(target) for target in report["targets"]]
    missed = [target for target in report["targets"] if not target["met"]]
    lines += ["", f"{len(report['targets']) - len(missed)} of {len(report['targets'])} met"]
    for target in missed:
        lines += ["", f"missed: {target['name']}, {target['tokens']} tokens: {number(target, 'measured').strip()}"]
        lines += stage_lines(target["profile"])
    if not report["targets_apply"]:
        lines += ["", "--quick: a small layer, for which nothing is aimed at"]
    return "\n".join(lines)


def number(target: dict[str, Any], key: str) -> str:
    value = target[key]
    if math.isnan(value):
        return f"{'unknown':>9}"
    if target["of"] == "bytes":
        return f"{value * 1e-3:>6.1f} KB"
    return f"{value * 100:>7.1f} %" if target["of"] in ("dram", "peak") else f"{value:>8.2f}x"


def target_line(target: dict[str, Any]) -> str:
    of = {"dram": "DRAM bandwidth", "peak": "bf16 peak", "bytes": "activations beyond L2"}.get(target["of"], target["of"])
    bound = "≥" if target["at_least"] else "≤"
    line = f"{target['name']:<36}{target['tokens']:>6} {number(target, 'measured')} {bound}{number(target, 'limit')}  {of:<22}"
    line += "met" if target["met"] else "missed"
    if target["stretch"] is not None:
        reached = "met" if target["measured"] >= target["stretch"] else "missed"
        line += f"; stretch {target['stretch'] * 100:.0f} % {reached}"
    return line + ("  (disturbed by other processes)" if target["disturbed"] else "")


def stage_lines(stages: list[dict[str, Any]]) -> list[str]:
    """Bytes in MB, and seconds where there are any."""
    lines = [f"  {'stage':<20}{'weights MB':>11}{'activations MB':>16}{'LoRA MB':>9}{'ms':>9}"]
    for stage in stages:
        line = f"  {stage['name']:<20}"
        for key, width in (("weight_bytes", 11), ("activation_bytes", 16), ("lora_bytes", 9)):
            line += f"{stage[key] * 1e-6:>{width}.1f}" if key in stage else " " * width
        lines.append(line + (f"{stage['seconds'] * 1e3:>9.2f}" if "seconds" in stage else ""))
    return lines


def say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--samples", type=int, default=5, help="clean samples wanted of each row (default: 5)")
    parser.add_argument("--json", metavar="FILE", help="also write the result as JSON; -: to stdout, without the table")
    parser.add_argument("--work", type=Path, help="folder for a checkpoint, 2.4 GB (default: a temporary one)")
    parser.add_argument("--quick", action="store_true", help="a small layer: shows that everything runs, not how fast")
    arguments = parser.parse_args()
    try:
        with tempfile.TemporaryDirectory(prefix="kt-targets-", dir=arguments.work) as work:
            report = measure(arguments, Path(work))
    except machine.BenchError as error:
        say(str(error))
        return 1
    if arguments.json != "-":
        print(table(report))
    if arguments.json:
        text = json.dumps(report, indent=2) + "\n"
        if arguments.json == "-":
            sys.stdout.write(text)
        else:
            Path(arguments.json).write_text(text, encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
