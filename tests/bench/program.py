"""What the two programs have in common: arguments, messages, a table or JSON."""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import machine

_ROUNDS_PER_SAMPLE = 3


def say(text: str) -> None:
    """Progress, on stderr."""
    print(text, file=sys.stderr, flush=True)


def make_parser(description: str | None, default_samples: int) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--samples",
        type=int,
        default=default_samples,
        metavar="N",
        help=f"undisturbed samples wanted of each row (default: {default_samples})",
    )
    parser.add_argument("--json", metavar="FILE", help="also write the result as JSON; -: to stdout, without the table")
    parser.add_argument("--work", type=Path, help="folder for a checkpoint, 2.4 GB (default: a temporary one)")
    parser.add_argument("--quick", action="store_true", help="a small layer: shows that everything runs, not how fast")
    return parser


def rounds_max(arguments: argparse.Namespace) -> int:
    """Disturbed samples are tried again, up to so many rounds in all; not where times mean nothing."""
    return arguments.samples * (1 if arguments.quick else _ROUNDS_PER_SAMPLE)


def run(
    arguments: argparse.Namespace,
    measure: Callable[[argparse.Namespace, Path], dict[str, Any]],
    table: Callable[[dict[str, Any]], str],
) -> dict[str, Any] | None:
    """Measures and prints. None: it could not, and the reason was printed."""
    try:
        with tempfile.TemporaryDirectory(prefix="kt-bench-", dir=arguments.work) as work:
            report = measure(arguments, Path(work))
    except machine.BenchError as error:
        say(str(error))
        return None
    if arguments.json != "-":
        print(table(report))
    if arguments.json:
        text = json.dumps(report, indent=2, allow_nan=False) + "\n"
        if arguments.json == "-":
            sys.stdout.write(text)
        else:
            Path(arguments.json).write_text(text, encoding="utf-8")
    return report
