"""FSDP2 on CPU: fully_shard per layer and for the whole, then a few steps. It knows nothing of the co-process."""

import argparse
import json
import os

import torch
import torch.distributed as dist
from peft import LoraConfig, get_peft_model
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from transformers import AutoModelForCausalLM, AutoTokenizer

parser = argparse.ArgumentParser()
parser.add_argument("--model", required=True)
parser.add_argument("--out", required=True)
args = parser.parse_args()
dist.init_process_group("gloo")
rank, world_size = dist.get_rank(), dist.get_world_size()
mesh = init_device_mesh("cpu", (world_size,))
torch.manual_seed(1)
model = AutoModelForCausalLM.from_pretrained(args.model, dtype=torch.float32)
tokenizer = AutoTokenizer.from_pretrained(args.model)
targets = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]
lora = LoraConfig(r=4, lora_alpha=8, target_modules=["q_proj", "v_proj"], target_parameters=targets)
model = get_peft_model(model, lora)
for layer in model.base_model.model.model.layers:
    fully_shard(layer, mesh=mesh)
fully_shard(model, mesh=mesh)
optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=5e-3)
with open(os.path.join(args.model, "docs.json")) as file:
    documents = json.load(file)
model.train()
log = []
for step in range(4):
    document = documents[step * world_size + rank]
    ids = tokenizer(document, truncation=True, max_length=48, return_tensors="pt").input_ids
    loss = model(input_ids=ids, labels=ids).loss
    loss.backward()
    norm = torch.nn.utils.clip_grad_norm_(model.parameters(), 0.5)
    optimizer.step()
    optimizer.zero_grad()
    log.append([float(loss.detach()), float(norm.full_tensor() if hasattr(norm, "full_tensor") else norm)])
with open(f"{args.out}.{rank}.json", "w") as file:
    json.dump(log, file)
dist.destroy_process_group()
