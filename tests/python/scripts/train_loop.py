"""An ordinary training loop with DDP, accumulation, clipping and two parameter groups. It knows nothing of the
co-process. Ranks get unequal numbers of tokens. With --blocks only the MoE blocks of the model are used, only experts
are trained, and a rank has no tokens at all in every third micro-batch. Plain transformers does not take that: with
--masked it has tokens and a loss of zero, which gives the same gradients."""

import argparse
import contextlib
import json
import os

import torch
import torch.distributed as dist
from peft import LoraConfig, get_peft_model
from torch.nn.parallel import DistributedDataParallel
from transformers import AutoModelForCausalLM, AutoTokenizer

parser = argparse.ArgumentParser()
parser.add_argument("--model", required=True)
parser.add_argument("--out", required=True)
parser.add_argument("--steps", type=int, default=6)
parser.add_argument("--blocks", action="store_true")
parser.add_argument("--masked", action="store_true")
args = parser.parse_args()

rank, world_size = 0, int(os.environ.get("WORLD_SIZE", "1"))
if world_size > 1:
    dist.init_process_group("gloo")
    rank = dist.get_rank()
torch.manual_seed(rank)  # The ranks draw different adapters: DDP makes them equal.
# eager: transformers' other implementations of experts do not take zero tokens.
model = AutoModelForCausalLM.from_pretrained(args.model, dtype=torch.float32, experts_implementation="eager")
tokenizer = AutoTokenizer.from_pretrained(args.model)
lora = LoraConfig(
    r=4,
    target_modules=[] if args.blocks else ["q_proj"],
    target_parameters=["mlp.experts.gate_up_proj", "mlp.experts.down_proj"],
    init_lora_weights=False,
)
peft_model = get_peft_model(model, lora)


class Blocks(torch.nn.Module):
    """The model without its attention."""

    def __init__(self, whole):
        super().__init__()
        self.whole = whole

    def forward(self, ids):
        model = self.whole.get_base_model().model
        hidden = model.embed_tokens(ids)
        for layer in model.layers:
            hidden = hidden + layer.mlp(layer.post_attention_layernorm(hidden))
        return self.whole.get_base_model().lm_head(model.norm(hidden))


class Logits(torch.nn.Module):
    def __init__(self, whole):
        super().__init__()
        self.whole = whole

    def forward(self, ids):
        return self.whole(input_ids=ids).logits


module = Blocks(peft_model) if args.blocks else Logits(peft_model)
if world_size > 1:
    module = DistributedDataParallel(module)
named = [(n, p) for n, p in peft_model.named_parameters() if p.requires_grad]
optimizer = torch.optim.AdamW(
    [
        {"params": [p for n, p in named if "lora_A" in n], "lr": 2e-3, "weight_decay": 0.1},
        {"params": [p for n, p in named if "lora_B" in n], "lr": 4e-3, "betas": (0.8, 0.99)},
    ]
)
schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1.0 / (1 + step))
with open(os.path.join(args.model, "docs.json")) as file:
    documents = json.load(file)
module.train()
log = []
for step in range(args.steps):
    total = 0.0
    for micro in range(2):
        number = 2 * step + micro
        document = documents[100 + number * world_size + rank]
        ids = tokenizer(
            document, truncation=True, max_length=16 + 12 * ((number + rank) % 3), return_tensors="pt"
        ).input_ids
        without_tokens = args.blocks and (number + 2 * rank) % 3 == 2
        if without_tokens and not args.masked:
            ids = ids[:0]
        sync = contextlib.nullcontext() if micro == 1 or world_size == 1 else module.no_sync()
        with sync:
            logits = module(ids)[:, :-1]
            loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten(), reduction="sum") / 40
            if without_tokens:
                loss = loss * 0
            loss.backward()
        total += float(loss.detach())
    norm = torch.nn.utils.clip_grad_norm_(module.parameters(), 0.5)
    optimizer.step()
    schedule.step()
    optimizer.zero_grad()
    log.append((total, float(norm)))
with open(f"{args.out}.{rank}.json", "w") as file:
    json.dump(log, file)
torch.save({k: v for k, v in peft_model.state_dict().items() if "lora" in k}, f"{args.out}.{rank}.pt")
if world_size > 1:
    dist.destroy_process_group()
