"""Does everything that is refused, in one process with the co-process. Writes {case: [exception, text]} to --out."""

import argparse
import io
import json

import kt_coproc
import torch
import transformers
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM

parser = argparse.ArgumentParser()
parser.add_argument("--model", required=True)
parser.add_argument("--out", required=True)
args = parser.parse_args()
transformers.logging.set_verbosity_error()
TARGETS = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]
results = {}


def load():
    return AutoModelForCausalLM.from_pretrained(args.model, dtype=torch.float32)


def adapted():
    config = LoraConfig(r=2, target_modules=["q_proj"], target_parameters=TARGETS, init_lora_weights=False)
    return get_peft_model(load(), config)


def refused(name, action):
    try:
        action()
        results[name] = ["nothing was raised", ""]
    except Exception as error:
        results[name] = [type(error).__name__, str(error)]


bare, model = load(), adapted()
parameters = [p for p in model.parameters() if p.requires_grad]
ids = torch.tensor([[5, 6, 7, 8]])


def backward():
    model(input_ids=ids, labels=ids).loss.backward()


for name, kind, options in (
    ("SGD", torch.optim.SGD, {}),
    ("RMSprop", torch.optim.RMSprop, {}),
    ("Adafactor", torch.optim.Adafactor, {}),
    ("amsgrad", torch.optim.AdamW, {"amsgrad": True}),
    ("maximize", torch.optim.Adam, {"maximize": True}),
):
    refused(name, lambda kind=kind, options=options: kind(parameters, lr=1e-3, **options))
refused("base weights in an optimizer", lambda: torch.optim.AdamW(bare.parameters(), lr=1e-3))

optimizer = torch.optim.AdamW(parameters, lr=1e-3)
before = model.state_dict()
backward()
refused("closure", lambda: optimizer.step(lambda: backward()))
refused("GradScaler", lambda: torch.amp.GradScaler("cpu").step(optimizer))
refused("clip with another norm", lambda: torch.nn.utils.clip_grad_norm_(parameters, 1.0, norm_type=1.0))
refused("clip by value", lambda: torch.nn.utils.clip_grad_value_(parameters, 1.0))
refused(
    "clip with a norm from elsewhere", lambda: torch.nn.utils.clip_grads_with_norm_(parameters, 1.0, torch.tensor(1.0))
)
refused("clip a part", lambda: torch.nn.utils.clip_grad_norm_(parameters[:3], 1e-6))
after = model.state_dict()
results["nothing changed"] = [str(all(torch.equal(before[k], after[k]) for k in before if "lora" in k)), ""]
refused("gradient assigned", lambda: setattr(parameters[-1], "grad", torch.zeros(parameters[-1].shape)))

refused("merge", model.merge_and_unload)
refused("save_pretrained of the whole model", lambda: bare.save_pretrained(args.out + ".full"))
refused("torch.save of the model", lambda: torch.save(model, io.BytesIO()))
refused("torch.save of the state dict", lambda: torch.save(bare.state_dict(), io.BytesIO()))
refused("reading a base weight", lambda: bare.model.layers[0].mlp.experts.gate_up_proj + 1)
refused("changing a base weight", lambda: bare.model.layers[0].mlp.experts.down_proj.data.zero_())
refused(
    "loading base weights",
    lambda: bare.load_state_dict({**bare.state_dict(), "model.layers.0.mlp.experts.down_proj": torch.zeros(8, 64, 48)}),
)
refused("DataParallel", lambda: torch.nn.DataParallel(model))


def two_adapters():
    model.add_adapter("two", LoraConfig(r=2, target_modules=["q_proj"], target_parameters=TARGETS))
    model.base_model.set_adapter(["default", "two"])
    model(input_ids=ids)


refused("two adapters active at once", two_adapters)
model.set_adapter("default")


def scaled():
    for module in model.modules():
        if getattr(module, "parameter_name", None) == "down_proj":
            module.scaling["default"] = 0.25
    model(input_ids=ids)


refused("a changed scaling", scaled)
experts = kt_coproc.MoEExperts(0)
hidden, weights = torch.randn(3, 64), torch.rand(3, 2)
refused("a negative expert", lambda: experts(hidden, torch.tensor([[0, -1]] * 3), weights))
refused(
    "hidden states of another size", lambda: experts(torch.randn(3, 65), torch.zeros(3, 2, dtype=torch.long), weights)
)
refused("a layer without experts", lambda: kt_coproc.MoEExperts(99))
refused("join without torch.distributed", kt_coproc.join)
refused("attach a dense model", lambda: kt_coproc.attach(torch.nn.Linear(2, 2)))
with open(args.out, "w") as file:
    json.dump(results, file)
