"""Makes the demo's checkpoint directory: a small Qwen3-MoE in real format, a BPE tokenizer, and the text it learns.

The text is the language reference that every CPython carries as `pydoc_data.topics` (PSF-2.0 licence): real English
prose of about 450 kB, so that nothing is downloaded. The tokenizer is trained on it here.
"""

import argparse
import json
import pathlib
import pydoc_data.topics
import re

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast, Qwen3MoeConfig, Qwen3MoeForCausalLM

VOCABULARY = 2048


def paragraphs() -> list[str]:
    text = "\n\n".join(pydoc_data.topics.topics[name] for name in sorted(pydoc_data.topics.topics))
    return [re.sub(r"\s+", " ", p).strip() for p in text.split("\n\n") if len(p) > 200]


def train_tokenizer(texts: list[str]) -> PreTrainedTokenizerFast:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=["<pad>", "<s>", "</s>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>", bos_token="<s>", eos_token="</s>")


def make_model() -> Qwen3MoeForCausalLM:
    torch.manual_seed(0)
    config = Qwen3MoeConfig(
        vocab_size=VOCABULARY,
        hidden_size=128,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=32,
        intermediate_size=256,
        moe_intermediate_size=64,
        num_experts=16,
        num_experts_per_tok=4,
        norm_topk_prob=True,
        max_position_embeddings=512,
        initializer_range=0.05,
        tie_word_embeddings=False,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
    )
    return Qwen3MoeForCausalLM(config).to(torch.bfloat16)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("directory", type=pathlib.Path)
    directory = parser.parse_args().directory
    texts = paragraphs()
    tokenizer = train_tokenizer(texts)
    model = make_model()
    # The last directory to appear is the complete one: a cut run leaves nothing that looks like a checkpoint.
    model.save_pretrained(directory)
    tokenizer.save_pretrained(directory)
    (directory / "text.json").write_text(json.dumps(texts))
    experts = sum(p.numel() for n, p in model.named_parameters() if "experts" in n)
    total = sum(p.numel() for p in model.parameters())
    print(
        f"Qwen3-MoE, 4 layers x 16 experts, top-4: {total / 1e6:.1f} M parameters, {experts / total:.0%} in experts; "
        f"{len(texts)} paragraphs, vocabulary {len(tokenizer)}"
    )


if __name__ == "__main__":
    main()
