"""TRL's SFTTrainer, which wraps the model in PEFT itself. It knows nothing of the co-process."""

import argparse
import json
import os

import torch
from datasets import Dataset
from peft import LoraConfig
from transformers import AutoModelForCausalLM, AutoTokenizer, set_seed
from trl import SFTConfig, SFTTrainer

parser = argparse.ArgumentParser()
parser.add_argument("--model", required=True)
parser.add_argument("--out", required=True)
args = parser.parse_args()

model = AutoModelForCausalLM.from_pretrained(args.model, dtype=torch.float32)
with open(os.path.join(args.model, "docs.json")) as file:
    documents = json.load(file)
set_seed(2)
trainer = SFTTrainer(
    model,
    args=SFTConfig(
        args.out + ".trainer",
        per_device_train_batch_size=2,
        gradient_accumulation_steps=2,
        max_steps=10,
        learning_rate=5e-3,
        max_grad_norm=0.5,
        max_length=48,
        logging_steps=1,
        report_to=[],
        save_strategy="no",
        use_cpu=True,
        bf16=False,
        disable_tqdm=True,
        seed=3,
    ),
    train_dataset=Dataset.from_dict({"text": documents}),
    processing_class=AutoTokenizer.from_pretrained(args.model),
    peft_config=LoraConfig(
        r=4,
        lora_alpha=8,
        target_modules=["q_proj", "v_proj"],
        target_parameters=["mlp.experts.gate_up_proj", "mlp.experts.down_proj"],
        task_type="CAUSAL_LM",
    ),
)
trainer.train()
log = [(entry["step"], "loss", entry["loss"]) for entry in trainer.state.log_history if "loss" in entry]
torch.save({k: v for k, v in trainer.model.state_dict().items() if "lora" in k}, args.out + ".pt")
with open(args.out + ".json", "w") as file:
    json.dump(log, file)
