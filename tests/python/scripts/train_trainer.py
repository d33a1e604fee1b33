"""An ordinary fine-tuning script with HF Trainer and PEFT. It knows nothing of the co-process."""

import argparse
import json
import os

import torch
from peft import LoraConfig, get_peft_model
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    DataCollatorForLanguageModeling,
    Trainer,
    TrainerCallback,
    TrainingArguments,
    set_seed,
)

parser = argparse.ArgumentParser()
parser.add_argument("--model", required=True)
parser.add_argument("--out", required=True)
parser.add_argument("--steps", type=int, default=20)
parser.add_argument("--checkpointing", choices=["no", "re"])
parser.add_argument("--save", type=int, default=0)
parser.add_argument("--resume")
parser.add_argument("--evaluate", type=int, default=0)
parser.add_argument("--bf16", action="store_true")
parser.add_argument("--experts-only", action="store_true")
parser.add_argument("--seed", type=int, default=2)
parser.add_argument("--workers", type=int, default=0)
args = parser.parse_args()

set_seed(0)
model = AutoModelForCausalLM.from_pretrained(args.model, dtype=torch.bfloat16 if args.bf16 else torch.float32)
tokenizer = AutoTokenizer.from_pretrained(args.model)
set_seed(args.seed)
lora = LoraConfig(
    r=4,
    lora_alpha=8,
    target_modules=[] if args.experts_only else ["q_proj", "v_proj"],
    target_parameters=["mlp.experts.gate_up_proj", "mlp.experts.down_proj"],
)
model = get_peft_model(model, lora)
with open(os.path.join(args.model, "docs.json")) as file:
    documents = json.load(file)
dataset = [dict(tokenizer(d, truncation=True, max_length=48 + 8 * (i % 5))) for i, d in enumerate(documents)]

log = []


class Log(TrainerCallback):
    def on_log(self, args, state, control, logs=None, **kwargs):
        for key in ("loss", "grad_norm", "eval_loss"):
            if key in logs:
                log.append((state.global_step, key, float(logs[key])))


checkpointing = {}
if args.checkpointing:
    checkpointing = {
        "gradient_checkpointing": True,
        "gradient_checkpointing_kwargs": {"use_reentrant": args.checkpointing == "re"},
    }
arguments = TrainingArguments(
    args.out + ".trainer",
    per_device_train_batch_size=2,
    gradient_accumulation_steps=2,
    max_steps=args.steps,
    learning_rate=5e-3,
    weight_decay=0.05,
    lr_scheduler_type="linear",
    max_grad_norm=0.5,
    logging_steps=1,
    report_to=[],
    save_strategy="steps" if args.save else "no",
    save_steps=args.save or 500,
    eval_strategy="steps" if args.evaluate else "no",
    eval_steps=args.evaluate or 500,
    use_cpu=True,
    disable_tqdm=True,
    seed=2 + args.seed,
    dataloader_num_workers=args.workers,
    **checkpointing,
)
trainer = Trainer(
    model,
    arguments,
    train_dataset=dataset,
    eval_dataset=dataset[:16],
    data_collator=DataCollatorForLanguageModeling(tokenizer, mlm=False),
    callbacks=[Log()],
)
trainer.train(resume_from_checkpoint=args.resume)
if trainer.is_world_process_zero():
    torch.save({k: v for k, v in model.state_dict().items() if "lora" in k}, args.out + ".pt")
    with open(args.out + ".json", "w") as file:
        json.dump(log, file)
