"""Forks after the model was loaded."""

import argparse
import os

import kt_coproc
import torch
from transformers import AutoModelForCausalLM

parser = argparse.ArgumentParser()
parser.add_argument("--model", required=True)
args = parser.parse_args()
model = AutoModelForCausalLM.from_pretrained(args.model, dtype=torch.float32)
ids = torch.arange(8)[None]
with torch.no_grad():
    before = model(input_ids=ids).logits
child = os.fork()
if child == 0:
    try:
        with torch.no_grad():
            model(input_ids=ids)
        print("child: no error", flush=True)
    except kt_coproc.CoprocError as error:
        print(f"child: {type(error).__name__}: {error}", flush=True)
    with kt_coproc.connect() as client:
        print("child's own session:", "works" if client.stats()["pid"] else "?", flush=True)
    os._exit(0)
os.waitpid(child, 0)
with torch.no_grad():
    print("parent:", "still works" if torch.equal(model(input_ids=ids).logits, before) else "differs")
