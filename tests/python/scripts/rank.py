"""One rank of a job that trains until something dies. It is started by hand, not by torchrun, which would end the
survivors itself. Appends a line per step to --log, and says at the end which exception came, and when."""

import argparse
import sys
import time

import kt_coproc
import torch
import torch.distributed as dist
import transformers
from peft import LoraConfig, get_peft_model
from torch.nn.parallel import DistributedDataParallel
from transformers import AutoModelForCausalLM

parser = argparse.ArgumentParser()
parser.add_argument("--model", required=True)
parser.add_argument("--log", required=True)
parser.add_argument("--steps", type=int, default=10**9)
args = parser.parse_args()
transformers.logging.set_verbosity_error()
dist.init_process_group("gloo")
model = AutoModelForCausalLM.from_pretrained(args.model, dtype=torch.float32)
targets = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]
model = get_peft_model(model, LoraConfig(r=2, target_modules=["q_proj"], target_parameters=targets))
module = DistributedDataParallel(model)
optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-3)
ids = torch.arange(24)[None] + dist.get_rank()


def step() -> None:
    loss = module(input_ids=ids, labels=ids).loss
    loss.backward()
    torch.nn.utils.clip_grad_norm_(module.parameters(), 1.0)
    optimizer.step()
    optimizer.zero_grad()


with open(f"{args.log}.{dist.get_rank()}", "a", buffering=1) as log:
    print("ready", file=log)
    for number in range(args.steps):
        try:
            step()
        except kt_coproc.CoprocError as error:
            print(f"DIED {time.time()} {type(error).__name__}: {error}", file=log)
            sys.exit(1)
        except Exception as error:
            # Another library came first (gloo lost its peer): the next use of the co-process raises ours.
            print(f"first {type(error).__name__}", file=log)
            try:
                with torch.no_grad():
                    model(input_ids=ids)
                print("no error after that", file=log)
            except kt_coproc.CoprocError as ours:
                print(f"DIED {time.time()} {type(ours).__name__}: {ours}", file=log)
            sys.exit(1)
        print(f"step {number}", file=log)
    print("finished", file=log)
