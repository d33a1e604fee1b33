"""A mistake: two ranks, torch.distributed initialised, but no DDP. With --alone it is meant: every rank trains
alone."""

import argparse
import os

import torch
import torch.distributed as dist
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM

parser = argparse.ArgumentParser()
parser.add_argument("--model", required=True)
parser.add_argument("--alone", action="store_true")
parser.add_argument("--join", action="store_true")
parser.add_argument("--no-process-group", action="store_true")
args = parser.parse_args()
if not args.no_process_group:
    dist.init_process_group("gloo")
model = AutoModelForCausalLM.from_pretrained(args.model, dtype=torch.float32)
targets = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]
torch.manual_seed(int(os.environ["RANK"]))
model = get_peft_model(model, LoraConfig(r=2, target_modules=[], target_parameters=targets, init_lora_weights=False))
if args.alone or args.join:
    import kt_coproc

    kt_coproc.join(None) if args.alone else kt_coproc.join()
ids = torch.tensor([[5, 6, 7, 8 + int(os.environ["RANK"])]])
optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
model(input_ids=ids, labels=ids).loss.backward()
optimizer.step()
value = float(sum(p.double().norm() for p in model.parameters() if p.requires_grad))
# One write: print() makes two of it, and the ranks share their output.
os.write(1, f"rank {os.environ['RANK']} stepped: {value:.6f}\n".encode())
