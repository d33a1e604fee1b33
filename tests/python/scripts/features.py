"""Everything a script may do with a model, its adapters and their gradients, once plainly and once with the co-process.

Writes {name: tensor, number or text} to --out; the tests compare the two runs. Names that begin with "kt " exist only
with the co-process: counters of the daemon.
"""

import argparse
import copy
import gc
import os
import time

import torch
import transformers
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer

parser = argparse.ArgumentParser()
parser.add_argument("--model", required=True)
parser.add_argument("--out", required=True)
args = parser.parse_args()
transformers.logging.set_verbosity_error()
remote = bool(os.environ.get("KT_COPROC"))
if remote:
    import kt_coproc

results = {}
tokenizer = AutoTokenizer.from_pretrained(args.model)
TARGETS = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]


def batch(text):
    tokens = tokenizer([text], return_tensors="pt")
    return {**tokens, "labels": tokens["input_ids"].clone()}


first, second = batch("def forward(self, x): return x"), batch("import torch as something else")


def load(**kwargs):
    return AutoModelForCausalLM.from_pretrained(args.model, dtype=torch.float32, **kwargs)


def lora(**kwargs):
    options = {
        "r": 4,
        "lora_alpha": 8,
        "target_modules": ["q_proj"],
        "target_parameters": TARGETS,
        "init_lora_weights": False,
    }
    return LoraConfig(**{**options, **kwargs})


def adapted(seed=1, **kwargs):
    torch.manual_seed(seed)
    return get_peft_model(load(), lora(**kwargs))


def logits(model, inputs=first):
    with torch.no_grad():
        return model(input_ids=inputs["input_ids"]).logits


def gradients(model):
    found = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
    if remote:
        found.update(
            {n: g for n, g in kt_coproc.expert_gradients(model).items() if model.get_parameter(n).requires_grad}
        )
    found = [found[name].flatten() for name in sorted(found) if found[name].any()]  # The daemon has zeros for None.
    return torch.cat(found) if found else torch.zeros(0)


KEYS = ("forward_requests", "backward_requests", "fetch_requests")


class counted:
    """Counts the daemon's requests inside, per MoE layer."""

    def __init__(self, name):
        self.name = name

    def __enter__(self):
        self.before = kt_coproc.stats()["totals"] if remote else None

    def __exit__(self, *exception):
        if remote:
            after = kt_coproc.stats()["totals"]
            results["kt " + self.name] = [(after[key] - self.before[key]) / 3 for key in KEYS]


def activations_freed(name):
    gc.collect()
    if not remote:
        return
    deadline = time.monotonic() + 30
    while (left := kt_coproc.stats()["memory_bytes"]["activations"]) and time.monotonic() < deadline:
        time.sleep(0.02)
    results["kt activations left, " + name] = left


def base_model():
    model = load()
    results["parameters"] = model.num_parameters()
    results["footprint"] = model.get_memory_footprint()
    results["dtype and device"] = f"{model.dtype} {model.device}"
    results["logits of the base model"] = logits(model)
    results["generated"] = model.generate(input_ids=first["input_ids"], max_new_tokens=8, do_sample=False)
    torch.manual_seed(4)
    head = AutoModelForSequenceClassification.from_pretrained(args.model, num_labels=2, dtype=torch.float32)
    results["another head on the same checkpoint"] = logits(head)
    built = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(args.model))
    results["a model built from a config is untouched"] = type(built.model.layers[0].mlp.experts).__name__
    for name in ("bfloat16", "float"):
        getattr(model, name)()
        results["placeholders follow " + name] = str(model.model.layers[0].mlp.experts.gate_up_proj.dtype)
    results["logits after casts"] = logits(model).bfloat16()


def training_gradients():
    model = adapted()
    model.train()
    results["trainable"] = str(model.get_nb_trainable_parameters())
    with counted("one forward and backward"):
        loss = model(**first).loss
        loss.backward()
    results["loss"] = loss
    results["gradients"] = gradients(model)
    model(**second).loss.backward()
    results["accumulated gradients"] = gradients(model)
    model.zero_grad()
    results["gradients after zero_grad"] = gradients(model).abs().sum()
    one, two = model(**first).loss, model(**second).loss
    two.backward()
    one.backward()
    results["two live forwards, last first"] = gradients(model)
    model.zero_grad()
    (model(**first).loss + model(**first).loss).backward()
    results["the same input twice in one backward"] = gradients(model)
    for parameter in model.parameters():
        parameter.grad = None
    results["gradients after grad = None"] = gradients(model).abs().sum()
    attention = [p for n, p in model.named_parameters() if p.requires_grad and "experts" not in n]
    found = torch.autograd.grad(model(**first).loss, attention)
    results["autograd.grad"] = torch.cat([g.flatten() for g in found])
    results["autograd.grad leaves no trace"] = gradients(model).abs().sum()
    loss = model(**first).loss
    loss.backward(retain_graph=True)
    loss.backward()
    results["retained graph, backward twice"] = gradients(model)
    try:
        loss.backward()
        results["third backward"] = "worked"
    except RuntimeError as error:
        results["third backward"] = "RuntimeError"
        results["text of third backward"] = str(error)
    del loss
    model.zero_grad()
    with counted("no_grad"):
        logits(model)
    model.eval()
    with model.disable_adapter():
        results["logits with the adapter disabled"] = logits(model)
        disabled = model(**first).loss
    results["disabled adapter needs no gradient"] = disabled.requires_grad
    activations_freed("after no_grad")
    dropped = model(**first).loss
    del dropped
    activations_freed("after a dropped graph")
    results["logits unchanged by all this"] = logits(model)


def checkpointing():
    for reentrant in (False, True):
        mode = "reentrant" if reentrant else "non-reentrant"
        model = adapted()
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": reentrant})
        model.enable_input_require_grads()
        model.train()
        with counted(mode + ", one forward and backward"):
            model(**first).loss.backward()
        results[mode + ": gradients"] = gradients(model)
        model.zero_grad()
        one, two = model(**first).loss, model(**second).loss
        one.backward()
        two.backward()
        results[mode + ": two live forwards"] = gradients(model)
        model.zero_grad()
        one = model(**first).loss
        model.eval()
        logits(model, second)
        model.train()
        one.backward()
        results[mode + ": evaluation between forward and backward"] = gradients(model)
        model.zero_grad()
        hook = model.base_model.model.model.layers[1].mlp.register_full_backward_hook(lambda *_: 1 / 0)
        try:
            model(**first).loss.backward()
        except ZeroDivisionError:
            results[mode + ": exception in backward"] = "raised"
        hook.remove()
        model.zero_grad()
        model(**first).loss.backward()
        results[mode + ": after an exception in backward"] = gradients(model)
        model.zero_grad()
        dropped = model(**first).loss
        del dropped, one, two
        activations_freed("checkpointed, " + mode)


def nested_checkpointing():
    from torch.utils.checkpoint import checkpoint

    model = adapted()
    model.train()
    layers = model.base_model.model.model.layers
    captured = {}
    handle = layers[1].register_forward_pre_hook(lambda m, a, k: captured.update(a=a, k=k), with_kwargs=True)
    logits(model)
    handle.remove()
    hidden = captured["a"][0].detach().requires_grad_()
    layer, kwargs = layers[1], captured["k"]

    def record(name, out):
        out.sum().backward()
        results[name + ": input"] = hidden.grad.clone()
        results[name + ": adapter"] = gradients(model)
        hidden.grad = None
        model.zero_grad()

    for reentrant in (False, True):

        def inner(x, reentrant=reentrant):
            return checkpoint(lambda y: layer(y, **kwargs), x, use_reentrant=reentrant)

        outer = checkpoint(lambda x, inner=inner: inner(x).sin(), hidden, use_reentrant=reentrant)
        record(f"nested checkpoints, reentrant {reentrant}", outer)


def adapters():
    model = adapted(seed=5)
    model.eval()
    before = logits(model)
    results["adapter one"] = before
    torch.manual_seed(6)
    model.add_adapter("two", lora(r=2, use_rslora=True, alpha_pattern={"mlp.experts.gate_up_proj": 3}))
    model.set_adapter("two")
    results["adapter two"] = logits(model)
    results["trainable with two"] = str(model.get_nb_trainable_parameters())
    model.set_adapter("default")
    results["back to one"] = logits(model)
    model.delete_adapter("two")
    results["after delete_adapter"] = logits(model)
    other = copy.deepcopy(model)
    results["deepcopy"] = logits(other)
    with torch.no_grad():
        for name, parameter in other.named_parameters():
            if "experts" in name and "lora_B" in name:
                parameter.zero_()
    results["a changed copy"] = logits(other)
    results["the original of a changed copy"] = logits(model)
    averaged = torch.optim.swa_utils.AveragedModel(model)
    averaged.update_parameters(model)
    averaged.update_parameters(model)
    results["averaged model"] = logits(averaged.module)
    name, parameter = next((n, p) for n, p in model.named_parameters() if "experts" in n and "lora_A" in n)
    results["norm of an adapter tensor"] = parameter.norm()
    parameter.data = torch.ones(parameter.shape)
    results["assigned data"] = model.state_dict()[name]
    patterns = adapted(
        seed=7,
        rank_pattern={"mlp.experts.gate_up_proj": 6, "mlp.experts.down_proj": 3},
        alpha_pattern={"mlp.experts.down_proj": 5},
    )
    results["rank_pattern"] = logits(patterns)
    half = adapted(seed=8, target_parameters=["mlp.experts.down_proj"])
    half(**first).loss.backward()
    results["only down_proj"] = gradients(half)
    half = adapted(seed=8, target_parameters=["mlp.experts.gate_up_proj"])
    half(**first).loss.backward()
    results["only gate_up_proj"] = gradients(half)


def saving():
    directory = args.out + ".adapter"
    model = adapted(seed=5)
    model.save_pretrained(directory)
    results["saved keys"] = str(sorted((k, tuple(v.shape)) for k, v in model.state_dict().items() if "lora" in k))
    for name, kwargs in (("", {}), (" with low_cpu_mem_usage", {"low_cpu_mem_usage": True})):
        loaded = PeftModel.from_pretrained(load(), directory, **kwargs).eval()
        results["a loaded adapter" + name] = logits(loaded)
    results["an adapter's directory"] = logits(
        AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32).eval()
    )
    trainable = PeftModel.from_pretrained(load(), directory, is_trainable=True, low_cpu_mem_usage=True)
    optimizer = torch.optim.AdamW([p for p in trainable.parameters() if p.requires_grad], lr=1e-2)
    for _ in range(2):
        trainable(**first).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    state = optimizer.state_dict()
    results["optimizer state keys"] = str(list(state["state"])) + str(sorted(state["state"][0]))
    results["steps in the optimizer state"] = str([float(s["step"]) for s in state["state"].values()])
    results["exp_avg"] = torch.cat([s["exp_avg"].flatten() for s in state["state"].values()])
    results["exp_avg_sq"] = torch.cat([s["exp_avg_sq"].flatten() for s in state["state"].values()])
    state = copy.deepcopy(state)
    trainable(**first).loss.backward()
    optimizer.step()
    optimizer.load_state_dict(state)
    results["loaded exp_avg"] = torch.cat([s["exp_avg"].flatten() for s in optimizer.state_dict()["state"].values()])
    fresh = torch.optim.AdamW([p for p in trainable.parameters() if p.requires_grad], lr=1e-2).state_dict()
    optimizer.load_state_dict(fresh)
    optimizer.zero_grad()
    trainable(**first).loss.backward()
    optimizer.step()
    optimizer.zero_grad()
    results["after loading an empty state"] = logits(trainable)
    first_optimizer, second_optimizer = (
        torch.optim.AdamW([p for p in trainable.parameters() if p.requires_grad], lr=1e-2) for _ in range(2)
    )
    for stepping in (first_optimizer, first_optimizer, second_optimizer):
        trainable(**second).loss.backward()
        stepping.step()
        stepping.zero_grad()
    results["a second optimizer starts with moments of its own"] = logits(trainable)
    from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict

    results["state of a new optimizer through torch's DCP"] = str(
        len(
            get_optimizer_state_dict(
                trainable, torch.optim.AdamW([p for p in trainable.parameters() if p.requires_grad])
            )["state"]
        )
        > 0
    )
    results["after DCP"] = logits(trainable)


def optimizers():
    for kind, options in ((torch.optim.AdamW, {}), (torch.optim.AdamW, {"fused": True}), (torch.optim.Adam, {})):
        model = adapted(seed=9)
        optimizer = kind((p for p in model.parameters() if p.requires_grad), lr=1e-2, weight_decay=0.1, **options)
        for text in (first, second, first):
            model(**text).loss.backward()
            results[f"{kind.__name__}{options}: norm {len(text['input_ids'][0])}"] = torch.nn.utils.clip_grad_norm_(
                model.parameters(), 0.1
            )
            optimizer.step()
            optimizer.zero_grad()
        results[f"{kind.__name__}{options}"] = logits(model)
    optimizer.step()
    results["a step without gradients"] = logits(model)
    model(**first).loss.backward()
    results["norm without clipping"] = torch.nn.utils.clip_grad_norm_(model.parameters(), float("inf"))


def compiled():
    model = adapted()
    model.train()
    loss = torch.compile(model, backend="aot_eager")(**first).loss
    loss.backward()
    results["compiled: loss"] = loss
    results["compiled: gradients"] = gradients(model)


for section in (base_model, training_gradients, checkpointing, nested_checkpointing, adapters, saving, optimizers):
    section()
if os.environ.get("KT_TEST_ALL"):
    compiled()
torch.save({k: v.detach() if isinstance(v, torch.Tensor) else v for k, v in results.items()}, args.out)
