"""Loads a checkpoint and prints how much the process's anonymous memory grew at its peak, and the non-expert bytes."""

import argparse
import threading

import torch
from transformers import AutoModelForCausalLM

parser = argparse.ArgumentParser()
parser.add_argument("--model", required=True)
args = parser.parse_args()


def anonymous() -> int:
    with open("/proc/self/status") as file:
        return next(int(line.split()[1]) for line in file if line.startswith("RssAnon")) * 1024


peak, done = 0, threading.Event()


def watch() -> None:
    global peak
    while not done.wait(0.002):
        peak = max(peak, anonymous())


watcher = threading.Thread(target=watch)
before = anonymous()
watcher.start()
model = AutoModelForCausalLM.from_pretrained(args.model, dtype=torch.bfloat16)
with torch.no_grad():
    model(input_ids=torch.arange(32)[None])
done.set()
watcher.join()
outside = sum(p.numel() * p.element_size() for n, p in model.named_parameters() if "mlp.experts" not in n)
print("GROWN", max(peak, anonymous()) - before, outside)
