"""A Qwen3-MoE checkpoint in real format with the layers that are measured. Little else is in it."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import torch
import workload
from safetensors.torch import load_file, save_file

_HEAD = 64
_VOCABULARY = 64


def write_checkpoint(directory: Path, shape: workload.Shape) -> None:
    """One shard per layer, per-expert names, bf16."""
    from transformers import Qwen3MoeConfig

    directory.mkdir(parents=True, exist_ok=True)
    Qwen3MoeConfig(
        vocab_size=_VOCABULARY,
        hidden_size=shape.hidden,
        intermediate_size=shape.intermediate,
        num_hidden_layers=shape.layers,
        num_attention_heads=1,
        num_key_value_heads=1,
        head_dim=_HEAD,
        num_experts=shape.experts,
        num_experts_per_tok=shape.top_k,
        moe_intermediate_size=shape.intermediate,
        norm_topk_prob=True,
        dtype="bfloat16",
        architectures=["Qwen3MoeForCausalLM"],
    ).save_pretrained(directory)
    where: dict[str, str] = {}
    for layer in range(shape.layers):
        tensors = dict(_layer(shape, layer))
        if layer == 0:
            tensors.update(_outside(shape))
        name = _shard(shape, layer)
        save_file(tensors, directory / name, metadata={"format": "pt"})
        where.update(dict.fromkeys(tensors, name))
    with open(directory / "model.safetensors.index.json", "w", encoding="utf-8") as file:
        json.dump({"metadata": {}, "weight_map": where}, file)


def read_experts(directory: Path, shape: workload.Shape, layer: int) -> dict[str, torch.Tensor]:
    """gate_proj and up_proj [experts, intermediate, hidden], down_proj [experts, hidden, intermediate]; in memory of
    their own, not in the file's."""
    tensors = load_file(directory / _shard(shape, layer))
    return {
        name: torch.stack([tensors[f"{_prefix(layer)}mlp.experts.{e}.{name}.weight"] for e in range(shape.experts)])
        for name in ("gate_proj", "up_proj", "down_proj")
    }


def _shard(shape: workload.Shape, layer: int) -> str:
    return f"model-{layer + 1:05d}-of-{shape.layers:05d}.safetensors"


def _prefix(layer: int) -> str:
    return f"model.layers.{layer}."


def _outside(shape: workload.Shape) -> Iterator[tuple[str, torch.Tensor]]:
    for name in ("model.embed_tokens", "lm_head"):
        yield name + ".weight", torch.zeros(_VOCABULARY, shape.hidden).bfloat16()
    yield "model.norm.weight", torch.ones(shape.hidden).bfloat16()


def _layer(shape: workload.Shape, layer: int) -> Iterator[tuple[str, torch.Tensor]]:
    prefix, hidden = _prefix(layer), shape.hidden
    for name in ("q", "k", "v"):
        yield f"{prefix}self_attn.{name}_proj.weight", torch.zeros(_HEAD, hidden).bfloat16()
    yield f"{prefix}self_attn.o_proj.weight", torch.zeros(hidden, _HEAD).bfloat16()
    for name in ("q_norm", "k_norm"):
        yield f"{prefix}self_attn.{name}.weight", torch.ones(_HEAD).bfloat16()
    for name in ("input_layernorm", "post_attention_layernorm"):
        yield f"{prefix}{name}.weight", torch.ones(hidden).bfloat16()
    yield f"{prefix}mlp.gate.weight", torch.zeros(shape.experts, hidden).bfloat16()
    for expert in range(shape.experts):
        for name, weight in workload.expert_weights(shape, layer, expert).items():
            yield f"{prefix}mlp.experts.{expert}.{name}.weight", weight
