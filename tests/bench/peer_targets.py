"""How much faster than its peers the layer of Qwen3-30B-A3B should be, peer time / our time."""

from __future__ import annotations

_KT = {
    "forward": {1: 2.6, 32: 2.4, 512: 2.0, 2048: 1.45},
    "backward": {1: 3.0, 32: 3.0, 512: 2.1, 2048: 1.6},
}
_KT_REBUILD = {"forward": _KT["forward"], "backward": {1: 3.0, 32: 3.0, 512: 5.0, 2048: 2.6}}
_PEFT_LORA = 10.0  # PEFT forms W + ΔW of all experts, and ΔW's gradient.
_AHEAD = 1.0


def ratio_min(peer: str, mode: str, direction: str, num_tokens: int) -> float | None:
    """None: nothing is aimed at there."""
    if peer == "kt-kernel":
        return _KT[direction].get(num_tokens)
    if peer == "kt-kernel-rebuild":
        return _KT_REBUILD[direction].get(num_tokens)
    if peer in ("eager", "grouped_mm") and mode == "lora":
        return _PEFT_LORA
    return _AHEAD if peer == "grouped_mm" else None
