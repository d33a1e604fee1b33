"""One MoE layer, and the tokens that go through it: the same in every process that asks for the same numbers.

Everything is drawn from generators seeded by what it is, so no process has to be told any of it.
"""

from __future__ import annotations

import dataclasses
import functools

import torch


@dataclasses.dataclass(frozen=True)
class Shape:
    """Of a layer, and how many of them take turns so that no weights stay in a cache."""

    hidden: int = 2048  # The default sizes are Qwen3-30B-A3B's.
    intermediate: int = 768
    experts: int = 128
    top_k: int = 8
    rank: int = 8
    layers: int = 2


QUICK = Shape(hidden=256, intermediate=128, experts=16, top_k=4, rank=4)
SCALING = 2.0  # lora_alpha / r, as most people have it.


@dataclasses.dataclass
class Call:
    """What one call of the layer gets: bf16, ids int64."""

    hidden: torch.Tensor  # [num_tokens, hidden]
    ids: torch.Tensor  # [num_tokens, top_k]
    weights: torch.Tensor  # [num_tokens, top_k]; each token's sum to 1
    grad_output: torch.Tensor  # [num_tokens, hidden]


def _generator(*what: int) -> torch.Generator:
    seed = 0
    for number in what:
        seed = (seed * 1_000_003 + number + 1) % (1 << 62)
    return torch.Generator().manual_seed(seed)


def _normal(generator: torch.Generator, *shape: int, scale: float = 1.0) -> torch.Tensor:
    return (torch.randn(*shape, generator=generator) * scale).bfloat16()


@functools.lru_cache(maxsize=16)
def _tokens(shape: Shape, num_tokens: int) -> tuple[torch.Tensor, torch.Tensor]:
    generator = _generator(1, num_tokens)
    return _normal(generator, num_tokens, shape.hidden), _normal(generator, num_tokens, shape.hidden)


def make_call(shape: Shape, num_tokens: int, number: int) -> Call:
    """The call with this number: tokens depend on how many they are, routing also on the number.

    Routing is uniform: experts are dealt from shuffled decks, so that one comes again when all others have. top_k
    divides the number of experts: a token's experts are all of one deck, and different.
    """
    generator = _generator(2, num_tokens, number)
    num_decks = -(-num_tokens * shape.top_k // shape.experts)
    decks = torch.cat([torch.randperm(shape.experts, generator=generator) for _ in range(num_decks)])
    ids = decks[: num_tokens * shape.top_k].reshape(num_tokens, shape.top_k)
    weights = torch.randn(num_tokens, shape.top_k, generator=generator).softmax(dim=-1).bfloat16()
    hidden, grad_output = _tokens(shape, num_tokens)
    return Call(hidden, ids, weights, grad_output)


def expert_weights(shape: Shape, layer: int, expert: int) -> dict[str, torch.Tensor]:
    """gate_proj and up_proj [intermediate, hidden], down_proj [hidden, intermediate]."""
    generator = _generator(3, layer, expert)
    return {
        "gate_proj": _normal(generator, shape.intermediate, shape.hidden, scale=0.02),
        "up_proj": _normal(generator, shape.intermediate, shape.hidden, scale=0.02),
        "down_proj": _normal(generator, shape.hidden, shape.intermediate, scale=0.02),
    }


def lora_weights(shape: Shape, layer: int) -> dict[str, torch.Tensor]:
    """PEFT's adapters of the fused matrices, expert by expert: gate and up have one A in common.

    B is not zero, as it would be in a new adapter: an engine that leaves LoRA out must not agree.

    Returns:
        gate_up_a [experts, rank, hidden], gate_up_b [experts, 2 * intermediate, rank], down_a [experts, rank,
        intermediate], down_b [experts, hidden, rank]; bf16.
    """
    generator = _generator(4, layer)
    experts, rank = shape.experts, shape.rank
    return {
        "gate_up_a": _normal(generator, experts, rank, shape.hidden, scale=0.02),
        "gate_up_b": _normal(generator, experts, 2 * shape.intermediate, rank, scale=0.02),
        "down_a": _normal(generator, experts, rank, shape.intermediate, scale=0.02),
        "down_b": _normal(generator, experts, shape.hidden, rank, scale=0.02),
    }


def roofline_seconds(shape: Shape, num_tokens: int, peaks: dict[str, float]) -> float:
    """No engine here takes less for a direction: FLOPs without LoRA's, and each routed expert's weights once.

    peaks: bf16_flops and dram_bytes_per_second, as `kt-coproc bench peaks --json` has them.
    """
    routes = num_tokens * shape.top_k
    matrices = 3 * shape.hidden * shape.intermediate
    flops = 2 * matrices * routes
    weight_bytes = 2 * matrices * min(shape.experts, routes)
    return max(flops / peaks["bf16_flops"], weight_bytes / peaks["dram_bytes_per_second"])
