"""One forward and backward of one layer's experts in bf16, against fp64 on the same bf16-rounded values. The last line
printed is {name: rel-L2}."""

import argparse
import json

import kt_coproc
import torch
import transformers
from peft import LoraConfig, get_peft_model
from safetensors import safe_open
from transformers import AutoModelForCausalLM

parser = argparse.ArgumentParser()
parser.add_argument("--model", required=True)
args = parser.parse_args()
transformers.logging.set_verbosity_error()
LAYER, E, H, R, K, T = 1, 8, 64, 4, 2, 128


def rounded(values):
    return values.bfloat16().double()


weights = {}
with safe_open(f"{args.model}/model.safetensors", "pt") as file:
    for name in ("gate_proj", "up_proj", "down_proj"):
        key = f"model.layers.{LAYER}.mlp.experts.{{}}.{name}.weight"
        weights[name] = rounded(torch.stack([file.get_tensor(key.format(e)) for e in range(E)]))

torch.manual_seed(0)
model = AutoModelForCausalLM.from_pretrained(args.model, dtype=torch.bfloat16)
targets = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]
model = get_peft_model(model, LoraConfig(r=R, lora_alpha=2 * R, target_modules=[], target_parameters=targets))
wanted = {n: p for n, p in model.named_parameters() if f"layers.{LAYER}." in n and "lora" in n}
values = {}
with torch.no_grad():
    for name, parameter in wanted.items():
        values[name] = rounded(torch.randn(parameter.shape) * 0.1).requires_grad_()
        parameter.copy_(values[name].detach())

x = torch.randn(T, H).bfloat16()
scores, index = torch.randn(T, E).softmax(-1).topk(K)
upstream = torch.randn(T, H).bfloat16()

ours_x, ours_w = x.clone().requires_grad_(), scores.clone().requires_grad_()
output = model.get_base_model().model.layers[LAYER].mlp.experts(ours_x, index, ours_w)
output.backward(upstream)
gradients = kt_coproc.expert_gradients(model)

exact_x, exact_w = x.double().requires_grad_(), scores.double().requires_grad_()
lora = {("down" if "base_layer" not in n else "gate_up", "A" if "lora_A" in n else "B"): v for n, v in values.items()}
exact = torch.zeros(T, H, dtype=torch.double)
for e in range(E):
    token, slot = torch.where(index == e)
    rows = exact_x[token]

    def adapted(half, inputs, expert=e):
        a = lora[half, "A"].reshape(E, R, -1)[expert]
        b = lora[half, "B"].reshape(-1, R, E)[:, :, expert]
        return 2.0 * (inputs @ a.T) @ b.T

    gate_up = rows @ torch.cat([weights["gate_proj"][e], weights["up_proj"][e]]).T + adapted("gate_up", rows)
    gate, up = gate_up.chunk(2, -1)
    inner = torch.nn.functional.silu(gate) * up
    down = inner @ weights["down_proj"][e].T + adapted("down", inner)
    exact = exact.index_add(0, token, down * exact_w[token, slot, None])
exact.backward(upstream.double())


def error(actual, expected):
    return float((actual.detach().double() - expected.detach()).norm() / expected.detach().norm())


errors = {
    "output": error(output, exact),
    "grad_input": error(ours_x.grad, exact_x.grad),
    "grad_topk_weights": error(ours_w.grad, exact_w.grad),
}
errors.update({name.split("experts.")[1]: error(gradients[name], values[name].grad) for name in wanted})
print(json.dumps(errors))
