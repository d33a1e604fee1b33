"""A user's training script: HF Trainer and PEFT LoRA on attention and experts. It does not know kt-coproc."""

import argparse
import json
import os
import pathlib

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
from transformers.trainer_utils import get_last_checkpoint


class WriteLosses(TrainerCallback):
    """Appends one JSON line per step: step, loss, grad_norm."""

    def __init__(self, path: pathlib.Path) -> None:
        self.path = path

    def on_log(self, args, state, control, logs=None, **kwargs) -> None:
        if state.is_world_process_zero and logs and "loss" in logs:
            line = {"step": state.global_step, "loss": float(logs["loss"]), "grad_norm": float(logs["grad_norm"])}
            with self.path.open("a") as file:
                file.write(json.dumps(line) + "\n")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", required=True)
    parser.add_argument("--output", type=pathlib.Path, required=True)
    parser.add_argument("--steps", type=int, default=120)
    parser.add_argument("--resume", action="store_true", help="go on from the last checkpoint in --output")
    options = parser.parse_args()

    set_seed(0)
    model = AutoModelForCausalLM.from_pretrained(options.model, dtype=torch.bfloat16)
    tokenizer = AutoTokenizer.from_pretrained(options.model)
    lora = LoraConfig(
        r=8,
        lora_alpha=16,
        target_modules=["q_proj", "v_proj"],
        target_parameters=["mlp.experts.gate_up_proj", "mlp.experts.down_proj"],
        modules_to_save=["lm_head"],
    )
    set_seed(1)
    model = get_peft_model(model, lora)
    texts = json.loads((pathlib.Path(options.model) / "text.json").read_text())
    dataset = [dict(tokenizer(text, truncation=True, max_length=96)) for text in texts]
    options.output.mkdir(parents=True, exist_ok=True)
    arguments = TrainingArguments(
        str(options.output),
        max_steps=options.steps,
        per_device_train_batch_size=4,
        learning_rate=3e-3,
        warmup_steps=5,
        lr_scheduler_type="linear",
        max_grad_norm=1.0,
        weight_decay=0.01,
        logging_steps=1,
        save_strategy="steps",
        save_steps=options.steps // 4,
        report_to=[],
        disable_tqdm=True,
        use_cpu=True,
        seed=3,
    )
    trainer = Trainer(
        model,
        arguments,
        train_dataset=dataset,
        data_collator=DataCollatorForLanguageModeling(tokenizer, mlm=False),
        callbacks=[WriteLosses(options.output / "losses.jsonl")],
    )
    last = get_last_checkpoint(str(options.output)) if options.resume else None
    trainer.train(resume_from_checkpoint=last)
    if trainer.is_world_process_zero():
        trainer.model.save_pretrained(options.output / "adapter")
        print(f"rank 0 of {os.environ.get('WORLD_SIZE', '1')}: adapter saved", flush=True)
    trainer.accelerator.wait_for_everyone()
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main()
