"""Loads a saved adapter and writes the logits."""

import argparse

import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer

parser = argparse.ArgumentParser()
parser.add_argument("--model", required=True)
parser.add_argument("--adapter", required=True)
parser.add_argument("--out", required=True)
args = parser.parse_args()
model = AutoModelForCausalLM.from_pretrained(args.model, dtype=torch.float32)
model = PeftModel.from_pretrained(model, args.adapter).eval()
tokens = AutoTokenizer.from_pretrained(args.model)(["def forward(self, x): return x"], return_tensors="pt")
with torch.no_grad():
    torch.save(model(input_ids=tokens["input_ids"]).logits, args.out)
