"""Our layer through a real daemon, beside other engines: times, ratios, and whether the results agree.

    tests/bench/compare_peers                            a few minutes per peer; on a quiet machine
    tests/bench/compare_peers --tokens 1,512 --peers linear,kt-kernel --json peers.json

Each peer has its own process and takes turns with ours, sample by sample. Ratios are peer time / our time.
"""

from __future__ import annotations

import argparse
import dataclasses
import sys
from pathlib import Path
from typing import Any

import agreement
import checkpoint
import machine
import peer_targets
import peers
import program
import rounds
import workload
from daemon import Daemon
from program import say


@dataclasses.dataclass
class Comparison:
    """A peer beside ours, or why there is none."""

    name: str
    about: dict[str, Any] = dataclasses.field(default_factory=dict)
    unavailable: str = ""
    pairs: list[rounds.Pairs] = dataclasses.field(default_factory=list)
    differences: dict[tuple[str, int], dict[str, float]] = dataclasses.field(default_factory=dict)
    settings: dict[tuple[str, int], dict[str, Any]] = dataclasses.field(default_factory=dict)


class Bench:
    """One daemon, and one peer after the other beside it: two or three copies of the weights at a time."""

    def __init__(self, arguments: argparse.Namespace, work: Path) -> None:
        self._arguments = arguments
        self._shape = workload.QUICK if arguments.quick else workload.Shape()
        self._work = work
        self._model = work / "model"
        say(f"writing {self._shape.layers} layers to {self._model}")
        checkpoint.write_checkpoint(self._model, self._shape)

    def run(self) -> dict[str, Any]:
        peaks = machine.run_bench("peaks")
        with Daemon(self._model) as daemon, self._process(peers.OURS, daemon) as ours:
            status = daemon.status
            results = [self._compare(name, ours, daemon) for name in self._arguments.peers]
        report = {
            "schema": 1,
            "machine": peaks["machine"],
            "peaks": peaks["peaks"],
            "kernels": status["kernels"],
            "worker_threads": status["worker_threads"],
            "kt_coproc": {"binary": machine.coproc_binary(), "version": status["version"]},
            "environment": rounds.peer_environment(daemon.num_workers),
            "layer": dataclasses.asdict(self._shape),
            "peers": [
                {"name": r.name, "what": peers.WHAT[r.name], "unavailable": r.unavailable or None, **r.about}
                for r in results
            ],
            "rows": [row for result in results for row in rows_of(result, self._shape, peaks["peaks"])],
        }
        report["targets_apply"] = not self._arguments.quick
        return report

    def _process(self, name: str, daemon: Daemon) -> rounds.PeerProcess:
        ours = name == peers.OURS
        return rounds.PeerProcess(
            name,
            self._model,
            self._shape,
            tokens_max=max(self._arguments.tokens),
            threads=1 if ours else daemon.num_workers,  # Our client computes nothing.
            address=daemon.address if ours else None,
            also=[daemon.pid] if ours else [],
        )

    def _compare(self, name: str, ours: rounds.PeerProcess, daemon: Daemon) -> Comparison:
        result = Comparison(name)
        say(f"{name}: loading")
        try:
            with self._process(name, daemon) as peer:
                result.about = peer.about
                self._sample(result, ours, peer)
        except rounds.PeerFailed as failure:
            if failure.name == peers.OURS:
                raise
            result.unavailable = failure.why
            say(f"{name}: not compared: {failure.why}")
        return result

    def _sample(self, result: Comparison, ours: rounds.PeerProcess, peer: rounds.PeerProcess) -> None:
        modes = [mode for mode in (peers.FROZEN, peers.LORA) if mode in peer.about["modes"]]
        for mode in modes:
            for num_tokens in self._arguments.tokens:
                files = [self._work / "ours.safetensors", self._work / "peer.safetensors"]
                ours.check(mode, num_tokens, files[0])
                result.settings[mode, num_tokens] = peer.check(mode, num_tokens, files[1])
                result.differences[mode, num_tokens] = agreement.relative_differences(files[1], files[0])
        say(f"{result.name}: sampling")
        wanted = (self._arguments.samples, program.rounds_max(self._arguments))
        result.pairs = rounds.sample_pairs(ours, peer, modes, self._arguments.tokens, *wanted)


def rows_of(result: Comparison, shape: workload.Shape, peaks: dict[str, float]) -> list[dict[str, Any]]:
    rows = []
    for pairs in result.pairs:
        differences = result.differences[pairs.mode, pairs.num_tokens]
        for direction in ("forward", "backward"):
            ours, peer = pairs.best_seconds(direction)
            row = {
                "name": f"{result.name} {pairs.mode} {direction}",
                "tokens": pairs.num_tokens,
                "seconds": peer,
                "ratio": pairs.ratio(direction),
                "of": peers.OURS,
                "peer": result.name,
                "mode": pairs.mode,
                "direction": direction,
                "seconds_ours": ours,
                "pairs": len(pairs.counted()),
                "pairs_discarded": 0 if pairs.is_disturbed else len(pairs.rounds) - len(pairs.clean()),
                "disturbed": pairs.is_disturbed,
                "relative_l2": differences,
                "agrees": agreement.agrees(differences),
                "settings": result.settings[pairs.mode, pairs.num_tokens],
            }
            limit = peer_targets.ratio_min(result.name, pairs.mode, direction, pairs.num_tokens)
            if limit is not None:
                most = peer / workload.roofline_seconds(shape, pairs.num_tokens, peaks)
                row["target"] = {"ratio_min": limit, "met": row["ratio"] >= limit, "ratio_of_roofline": most}
            rows.append(row)
    return rows


def table(report: dict[str, Any]) -> str:
    lines = [report["machine"], f"kt-coproc {report['kt_coproc']['version']}, kernels {report['kernels']}"]
    for peer in report["peers"]:
        versions = " ".join(f"{name} {version}" for name, version in peer.get("versions", {}).items())
        lines.append(f"  {peer['name']:<18} {peer['what']}; {peer['unavailable'] or versions}")
    environment = " ".join(f"{name}={value}" for name, value in report["environment"].items())
    lines += [f"  peers run with {environment}; ours with OMP_NUM_THREADS=1", ""]
    lines += [
        "best ms of each; ratio: median of peer / ours in the same round; roofline: what the ratio would be if ours",
        "took no longer than its FLOPs at the kernels' peak or its weights at DRAM bandwidth; rel-L2: the worst of all",
        "",
    ]
    lines.append(
        f"{'peer':<18}{'':<7}{'':<9}{'tokens':>6} {'peer ms':>9} {'ours ms':>9} {'ratio':>7}  {'target':<28}"
        f"{'pairs':>5} {'rel-L2':>8}"
    )
    for row in report["rows"]:
        lines.append(row_line(row, report["targets_apply"]))
    return "\n".join(lines)


def row_line(row: dict[str, Any], targets_apply: bool) -> str:
    target = ""
    if targets_apply and "target" in row:
        found = row["target"]
        target = f"{found['ratio_min']:.2f} "
        target += "met" if found["met"] else f"missed; roofline {found['ratio_of_roofline']:.2f}"
    line = (
        f"{row['peer']:<18}{row['mode']:<7}{row['direction']:<9}{row['tokens']:>6} {row['seconds'] * 1e3:>9.2f} "
        f"{row['seconds_ours'] * 1e3:>9.2f} {row['ratio']:>7.2f}  {target:<28}{row['pairs']:>5} "
        f"{max(row['relative_l2'].values()):>8.1e}"
    )
    line += "".join(f"  {name} {value}" for name, value in row["settings"].items())
    if row["pairs_discarded"]:
        line += f"  {row['pairs_discarded']} discarded"
    if row["disturbed"]:
        line += "  all disturbed by other processes"
    if not row["agrees"]:
        worst = max(row["relative_l2"], key=row["relative_l2"].__getitem__)
        line += f"  RESULTS DISAGREE ({worst})"
    return line


def parse() -> argparse.Namespace:
    parser = program.make_parser(__doc__, default_samples=5)
    parser.add_argument(
        "--tokens",
        type=lambda text: [int(number) for number in text.split(",")],
        metavar="T,T,…",
        help="numbers of tokens (default: 1,32,512,2048)",
    )
    parser.add_argument(
        "--peers",
        type=lambda text: text.split(","),
        default=list(peers.NAMES),
        metavar="NAME,…",
        help=f"some of {','.join(peers.NAMES)} (default: all)",
    )
    arguments = parser.parse_args()
    arguments.tokens = arguments.tokens or ([1, 16] if arguments.quick else [1, 32, 512, 2048])
    unknown = sorted(set(arguments.peers) - set(peers.NAMES))
    if unknown:
        parser.error(f"--peers knows {','.join(peers.NAMES)}, not {','.join(unknown)}")
    return arguments


def main() -> int:
    report = program.run(parse(), lambda arguments, work: Bench(arguments, work).run(), table)
    return 0 if report and all(row["agrees"] for row in report["rows"]) else 1


if __name__ == "__main__":
    sys.exit(main())
