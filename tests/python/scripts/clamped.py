"""Trains a model whose experts clamp gate and up, plainly or with the co-process, and saves what came of it."""

import argparse
import os

import torch
import transformers
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM
from transformers.models.hy_v4.modeling_hy_v4 import HYV4Experts

parser = argparse.ArgumentParser()
parser.add_argument("--model", required=True)
parser.add_argument("--out", required=True)
args = parser.parse_args()
transformers.logging.set_verbosity_error()
remote = bool(os.environ.get("KT_COPROC"))

torch.manual_seed(3)
model = AutoModelForCausalLM.from_pretrained(args.model, dtype=torch.float32)
lora = LoraConfig(
    r=4,
    lora_alpha=8,
    target_modules=["q_b_proj"],
    target_parameters=["mlp.experts.gate_up_proj", "mlp.experts.down_proj"],
    init_lora_weights=False,
)
model = get_peft_model(model, lora)
torch.manual_seed(4)
ids = torch.randint(3, 64, (2, 24))
optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
results = {}
for step in range(3):
    output = model(input_ids=ids, labels=ids)
    results[f"logits {step}"] = output.logits.detach()
    output.loss.backward()
    gradients = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
    if remote:
        import kt_coproc

        gradients.update(kt_coproc.expert_gradients(model))
    results.update({f"gradient {step} of {name}": gradients[name] for name in sorted(gradients)})
    optimizer.step()
    optimizer.zero_grad()
if not remote:
    # That the clamp is at work: how many of the values before it lie beyond it.
    gate, beyond = HYV4Experts._apply_gate, []

    def counted(experts, values):
        beyond.append((values.abs() > experts.swiglu_limit).float().mean())
        return gate(experts, values)

    HYV4Experts._apply_gate = counted
    model(input_ids=ids)
    share = float(torch.stack(beyond).mean())
    print(f"beyond the limit: {share:.2f}")
    assert 0.05 < share < 0.95
torch.save(results, args.out)
