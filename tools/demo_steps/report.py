"""Compares the demo's two trainings and draws their losses, in the terminal and as PNG. Exit 1: they differ."""

import argparse
import json
import pathlib
import sys

ROWS, COLUMNS = 14, 70


def losses(path: pathlib.Path) -> dict[int, float]:
    """step -> loss. A step that was run again after the kill counts with its last value."""
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    return {line["step"]: line["loss"] for line in lines}


def draw(curves: dict[str, dict[int, float]]) -> str:
    """Curves of {mark: {step: loss}} as text; later ones lie on top, '@' where two meet."""
    steps = sorted(set.intersection(*(set(curve) for curve in curves.values())))
    values = [curve[step] for curve in curves.values() for step in steps]
    low, high = min(values), max(values)
    grid = [[" "] * COLUMNS for _ in range(ROWS)]
    for mark, curve in curves.items():
        for step in steps:
            column = (step - steps[0]) * (COLUMNS - 1) // max(1, steps[-1] - steps[0])
            row = round((high - curve[step]) * (ROWS - 1) / max(1e-9, high - low))
            grid[row][column] = mark if grid[row][column] in (" ", mark) else "@"
    labels = [f"{high - (high - low) * row / (ROWS - 1):6.3f} |" for row in range(ROWS)]
    lines = [label + "".join(cells) for label, cells in zip(labels, grid, strict=True)]
    return "\n".join([*lines, " " * 7 + "+" + "-" * COLUMNS, f"{'':8}step {steps[0]}{steps[-1]:>{COLUMNS - 6}}"])


def save_png(path: pathlib.Path, curves: dict[str, dict[int, float]], killed_at: int) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(8, 4.5))
    for (label, curve), style in zip(curves.items(), ("-", "--"), strict=True):
        axes.plot(list(curve), list(curve.values()), style, label=label)
    axes.axvline(killed_at, color="gray", linewidth=0.8, label="job killed and resumed")
    axes.set(xlabel="optimizer step", ylabel="training loss", title="Qwen3-MoE LoRA, 2 ranks")
    axes.legend()
    figure.tight_layout()
    figure.savefig(path, dpi=120)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--ours", type=pathlib.Path, required=True)
    parser.add_argument("--plain", type=pathlib.Path, required=True)
    parser.add_argument("--png", type=pathlib.Path, required=True)
    parser.add_argument("--killed-at", type=int, required=True)
    parser.add_argument("--tolerance", type=float, required=True, help="largest mean difference of the loss, nats")
    options = parser.parse_args()
    ours, plain = losses(options.ours), losses(options.plain)
    if ours.keys() != plain.keys() or len(ours) < 100:
        print(f"the trainings have {len(ours)} and {len(plain)} steps, expected the same ≥ 100", file=sys.stderr)
        return 1
    print(draw({"o": plain, "*": ours}))
    print("        * through the co-process   o plain transformers + PEFT   @ both")
    save_png(options.png, {"through the co-process": ours, "plain transformers + PEFT": plain}, options.killed_at)
    differences = [abs(ours[step] - plain[step]) for step in ours]
    mean, worst = sum(differences) / len(differences), max(differences)
    first, last = ours[min(ours)], sum(ours[step] for step in sorted(ours)[-10:]) / 10
    print(f"loss {first:.3f} -> {last:.3f} (mean of the last 10 steps); curve as PNG: {options.png}")
    print(f"difference to plain: mean {mean:.4f}, worst {worst:.4f}; tolerance {options.tolerance} (mean)")
    if last > first - 0.5:
        print("the loss did not fall: nothing was learned", file=sys.stderr)
        return 1
    return 0 if mean <= options.tolerance else 1


if __name__ == "__main__":
    sys.exit(main())
