"""Makes small Qwen3-MoE and HunYuan V4 checkpoints in real format, with a real tokenizer and real text.

The text is the source of torch.nn.Module as it is installed beside the tests (BSD licence). The weights are random.

    make_tiny.py DIR [--seed 0] [--dtype float32]           3 layers, 8 experts, top 2
    make_tiny.py DIR --clamped                              HunYuan V4, whose experts clamp
    make_tiny.py DIR --big                                  2.2 GB of bf16 experts under per-expert names, 4 shards
"""

from __future__ import annotations

import argparse
import json
import os
from collections.abc import Iterator

import torch


def write_documents(directory: str) -> list[str]:
    """docs.json in the directory: what the training scripts read."""
    with open(torch.nn.modules.module.__file__, encoding="utf-8") as file:
        documents = [part for part in file.read().split("\n\n") if len(part) > 200][:250]
    with open(os.path.join(directory, "docs.json"), "w", encoding="utf-8") as file:
        json.dump(documents, file)
    return documents


def write_tokenizer(directory: str, documents: list[str]) -> None:
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=512, special_tokens=["<pad>", "<s>", "</s>"], initial_alphabet=pre_tokenizers.ByteLevel.alphabet()
    )
    tokenizer.train_from_iterator(documents, trainer)
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", bos_token="<s>", eos_token="</s>"
    ).save_pretrained(directory)


def make_tiny(directory: str, seed: int = 0, dtype: torch.dtype = torch.float32) -> None:
    from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM

    os.makedirs(directory, exist_ok=True)
    write_tokenizer(directory, write_documents(directory))
    torch.manual_seed(seed)
    config = Qwen3MoeConfig(
        vocab_size=512,
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=16,
        num_experts=8,
        num_experts_per_tok=2,
        moe_intermediate_size=48,
        norm_topk_prob=True,
        decoder_sparse_step=1,
        max_position_embeddings=512,
        initializer_range=0.1,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
    )
    Qwen3MoeForCausalLM(config).to(dtype).save_pretrained(directory)


CLAMP = 0.6


def make_clamped(directory: str, seed: int = 0) -> None:
    """A HunYuan V4 checkpoint: 3 layers, of which 2 have 6 experts, top 2, whose gate and up are cut at CLAMP. fp32; no
    tokenizer, a vocabulary of 64."""
    from transformers import HYV4Config, HYV4ForCausalLM

    torch.manual_seed(seed)
    config = HYV4Config(
        vocab_size=64,
        hidden_size=64,
        intermediate_size=96,
        moe_intermediate_size=40,
        num_hidden_layers=3,
        num_attention_heads=4,
        n_routed_experts=6,
        num_experts_per_tok=2,
        q_lora_rank=32,
        kv_lora_rank=16,
        qk_nope_head_dim=16,
        qk_rope_head_dim=16,
        v_head_dim=16,
        index_topk=16,
        index_head_dim=16,
        index_n_heads=2,
        max_position_embeddings=128,
        initializer_range=0.2,
        swiglu_limit=CLAMP,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
    )
    HYV4ForCausalLM(config).to(torch.float32).save_pretrained(directory)


_BIG = {"layers": 44, "experts": 64, "intermediate": 256, "hidden": 512, "vocabulary": 2048}


def make_big(directory: str, shards: int = 4) -> None:
    """A checkpoint whose experts would be seen in a process's memory. No tokenizer."""
    from safetensors.torch import save_file
    from transformers import Qwen3MoeConfig

    os.makedirs(directory, exist_ok=True)
    size = _BIG
    Qwen3MoeConfig(
        vocab_size=size["vocabulary"],
        hidden_size=size["hidden"],
        intermediate_size=1024,
        num_hidden_layers=size["layers"],
        num_attention_heads=8,
        num_key_value_heads=4,
        head_dim=64,
        num_experts=size["experts"],
        num_experts_per_tok=4,
        moe_intermediate_size=size["intermediate"],
        norm_topk_prob=True,
        dtype="bfloat16",
        architectures=["Qwen3MoeForCausalLM"],
    ).save_pretrained(directory)
    where: dict[str, str] = {}
    for shard in range(shards):
        tensors = dict(_big_outside()) if shard == 0 else {}
        for layer in range(shard * size["layers"] // shards, (shard + 1) * size["layers"] // shards):
            tensors.update(_big_layer(layer))
        name = f"model-{shard + 1:05d}-of-{shards:05d}.safetensors"
        save_file(tensors, os.path.join(directory, name), metadata={"format": "pt"})
        where.update(dict.fromkeys(tensors, name))
    with open(os.path.join(directory, "model.safetensors.index.json"), "w", encoding="utf-8") as file:
        json.dump({"metadata": {}, "weight_map": where}, file)


def _random(*shape: int) -> torch.Tensor:
    return (torch.randn(*shape) * 0.02).bfloat16()


def _big_outside() -> Iterator[tuple[str, torch.Tensor]]:
    for name in ("model.embed_tokens", "lm_head"):
        yield name + ".weight", _random(_BIG["vocabulary"], _BIG["hidden"])
    yield "model.norm.weight", torch.ones(_BIG["hidden"]).bfloat16()


def _big_layer(layer: int) -> Iterator[tuple[str, torch.Tensor]]:
    hidden, intermediate = _BIG["hidden"], _BIG["intermediate"]
    prefix = f"model.layers.{layer}."
    for name, shape in (("q", (512, hidden)), ("k", (256, hidden)), ("v", (256, hidden)), ("o", (hidden, 512))):
        yield f"{prefix}self_attn.{name}_proj.weight", _random(*shape)
    for name in ("q_norm", "k_norm"):
        yield f"{prefix}self_attn.{name}.weight", torch.ones(64).bfloat16()
    for name in ("input_layernorm", "post_attention_layernorm"):
        yield f"{prefix}{name}.weight", torch.ones(hidden).bfloat16()
    yield prefix + "mlp.gate.weight", _random(_BIG["experts"], hidden)
    for expert in range(_BIG["experts"]):
        for name, shape in (
            ("gate", (intermediate, hidden)),
            ("up", (intermediate, hidden)),
            ("down", (hidden, intermediate)),
        ):
            yield f"{prefix}mlp.experts.{expert}.{name}_proj.weight", _random(*shape)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("directory")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--clamped", action="store_true")
    parser.add_argument("--big", action="store_true")
    arguments = parser.parse_args()
    if arguments.big:
        make_big(arguments.directory)
    elif arguments.clamped:
        make_clamped(arguments.directory, arguments.seed)
    else:
        make_tiny(arguments.directory, arguments.seed, getattr(torch, arguments.dtype))


if __name__ == "__main__":
    main()
