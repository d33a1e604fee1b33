"""Whether a peer computes what we compute."""

from __future__ import annotations

from pathlib import Path

from safetensors.torch import load_file

# rel-L2 between two engines that both round to bf16 in places of their own. Each is 0.5 to 1 % from fp32 on outputs and
# gradients; leaving LoRA out, or one expert of many, is far above.
TOLERANCE = 0.03


def relative_differences(actual: Path, expected: Path) -> dict[str, float]:
    """rel-L2 of every tensor of the two files, by name; both have the same names.

    Raises:
        ValueError: they do not, or shapes differ.
    """
    ours, theirs = load_file(actual), load_file(expected)
    if {name: tensor.shape for name, tensor in ours.items()} != {name: t.shape for name, t in theirs.items()}:
        raise ValueError(f"{sorted(ours)} beside {sorted(theirs)}, or other shapes")
    found = {}
    for name, tensor in theirs.items():
        scale = float(tensor.double().norm())
        difference = float((ours[name].double() - tensor.double()).norm())
        found[name] = difference / scale if scale else difference
    return found


def agrees(differences: dict[str, float]) -> bool:
    return all(value <= TOLERANCE for value in differences.values())
