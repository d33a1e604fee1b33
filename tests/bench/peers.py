"""The engines that are compared, as a peer process holds them: all with the same weights, tokens and LoRA.

A peer computes a layer's forward, and the backward for hidden states, routing weights and, in mode "lora", the
adapter's matrices. Only what a training loop would wait for is timed.
"""

from __future__ import annotations

import abc
import dataclasses
import os
import statistics
import time
from pathlib import Path
from typing import Any

import checkpoint
import machine
import torch
import workload
from torch import nn
from torch.nn import functional

FROZEN, LORA = "frozen", "lora"


@dataclasses.dataclass
class Ran:
    """One forward and backward."""

    forward_seconds: float
    backward_seconds: float
    tensors: dict[str, torch.Tensor]  # output, grad_hidden, grad_weights


class Peer(abc.ABC):
    """A layer number and a call in, times and results out."""

    modes: tuple[str, ...] = (FROZEN, LORA)
    needs = ("torch",)  # Packages whose versions say which peer this was.

    @abc.abstractmethod
    def run(self, mode: str, layer: int, call: workload.Call) -> Ran: ...

    @abc.abstractmethod
    def lora_gradients(self, layer: int) -> dict[str, torch.Tensor]:
        """What LoRA runs added up since the last forget(), in the shapes of workload.lora_weights."""

    @abc.abstractmethod
    def forget(self) -> None:
        """Drops the LoRA gradients."""

    def prepare(self, call: workload.Call) -> dict[str, Any]:
        """Chooses what runs calls of this many tokens fastest; returns what that is. It may change gradients."""
        del call
        return {}

    def about(self) -> dict[str, Any]:
        return {"versions": {name: machine.version_of(name) for name in self.needs}}


class AutogradPeer(Peer):
    """One that is called as a torch module is."""

    @abc.abstractmethod
    def module(self, mode: str, layer: int) -> nn.Module: ...

    def run(self, mode: str, layer: int, call: workload.Call) -> Ran:
        module = self.module(mode, layer)
        hidden, weights = call.hidden.clone().requires_grad_(), call.weights.clone().requires_grad_()
        begin = time.perf_counter()
        output = module(hidden, call.ids, weights)
        middle = time.perf_counter()
        output.backward(call.grad_output)
        end = time.perf_counter()
        results = {"output": output.detach(), "grad_hidden": hidden.grad, "grad_weights": weights.grad}
        return Ran(middle - begin, end - middle, results)


class TransformersPeer(AutogradPeer):
    """The experts modules of a Qwen3MoeForCausalLM, with PEFT's LoRA on them by target_parameters.

    With KT_COPROC in the environment the same lines are our peer: what a script gets that does not know of us.
    """

    needs = ("torch", "transformers", "peft")

    def __init__(self, model: Path, shape: workload.Shape, implementation: str | None) -> None:
        import peft
        import transformers

        transformers.logging.set_verbosity_error()
        options = {"experts_implementation": implementation} if implementation else {}
        plain = transformers.AutoModelForCausalLM.from_pretrained(model, dtype=torch.bfloat16, **options)
        plain.requires_grad_(False)
        self._shape = shape
        self._frozen = [layer.mlp.experts for layer in plain.model.layers]
        config = peft.LoraConfig(
            r=shape.rank,
            lora_alpha=workload.SCALING * shape.rank,
            target_modules=[],
            target_parameters=["mlp.experts.gate_up_proj", "mlp.experts.down_proj"],
        )
        self.model = peft.get_peft_model(plain, config)
        self._lora = [layer.mlp.experts for layer in plain.model.layers]
        for number in range(shape.layers):
            for name, values in workload.lora_weights(shape, number).items():
                with torch.no_grad():
                    self._parameter(number, name).copy_(_to_peft(name, values).float())

    def module(self, mode: str, layer: int) -> nn.Module:
        return self._lora[layer] if mode == LORA else self._frozen[layer]

    def _parameter(self, layer: int, name: str) -> nn.Parameter:
        wrapper = self._lora[layer]  # PEFT's wrappers of the two parameters are nested.
        while wrapper.parameter_name != ("down_proj" if name.startswith("down") else "gate_up_proj"):
            wrapper = wrapper.base_layer
        return (wrapper.lora_A if name.endswith("_a") else wrapper.lora_B)["default"].weight

    def lora_gradients(self, layer: int) -> dict[str, torch.Tensor]:
        names = workload.lora_weights(self._shape, layer)
        return {name: self._from_peft(name, self._gradient(self._parameter(layer, name))) for name in names}

    def _gradient(self, parameter: nn.Parameter) -> torch.Tensor:
        assert parameter.grad is not None
        return parameter.grad

    def _from_peft(self, name: str, tensor: torch.Tensor) -> torch.Tensor:
        experts, rank = self._shape.experts, self._shape.rank
        if name.endswith("_a"):
            return tensor.reshape(experts, rank, -1)
        return tensor.reshape(-1, rank, experts).permute(2, 0, 1)

    def forget(self) -> None:
        self.model.zero_grad()


def _to_peft(name: str, values: torch.Tensor) -> torch.Tensor:
    """PEFT stacks experts: A's rows are e * rank + j, B's columns are j * experts + e."""
    if name.endswith("_a"):
        return values.flatten(0, 1)
    return values.permute(1, 2, 0).flatten(1, 2)


class CoprocPeer(TransformersPeer):
    """Ours: the same script, with KT_COPROC set."""

    needs = ("torch", "transformers", "peft", "kt-coproc")

    def __init__(self, model: Path, shape: workload.Shape) -> None:
        super().__init__(model, shape, None)
        assert type(self._frozen[0]).__name__.startswith("KtCoproc"), "the model does not use the co-process"

    def lora_gradients(self, layer: int) -> dict[str, torch.Tensor]:
        import kt_coproc

        names = {parameter: name for name, parameter in self.model.named_parameters()}
        self._gradients = kt_coproc.expert_gradients(self.model)
        self._names = names
        return super().lora_gradients(layer)

    def _gradient(self, parameter: nn.Parameter) -> torch.Tensor:
        return self._gradients[self._names[parameter]]


class LinearExperts(nn.Module):
    """What a good user of torch writes: one F.linear per matrix of each expert that has tokens, tokens sorted by expert
    once, LoRA as two thin products in bf16, frozen matrices without a gradient."""

    def __init__(self, shape: workload.Shape, weights: dict[str, torch.Tensor], lora: dict[str, torch.Tensor]) -> None:
        super().__init__()
        self.shape = shape
        self.gate_up = torch.cat([weights["gate_proj"], weights["up_proj"]], dim=1)  # [experts, 2 * inter, hidden]
        self.down = weights["down_proj"]
        # A parameter per expert: the gradient of a slice of a stacked one would be as large as the whole.
        self.lora = nn.ParameterDict(
            {name: nn.ParameterList([nn.Parameter(one.clone()) for one in stacked]) for name, stacked in lora.items()}
        )
        self.with_lora = False

    def forward(self, hidden: torch.Tensor, ids: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
        order = ids.flatten().argsort(stable=True)
        counts = torch.bincount(ids.flatten(), minlength=self.shape.experts).tolist()
        tokens = order // self.shape.top_k
        outputs, begin = [], 0
        gathered = hidden[tokens]
        for expert, count in enumerate(counts):
            if count:
                outputs.append(self._expert(expert, gathered[begin : begin + count]))
                begin += count
        scaled = torch.cat(outputs) * weights.flatten()[order, None]
        return torch.zeros_like(hidden).index_add(0, tokens, scaled)

    def _expert(self, expert: int, rows: torch.Tensor) -> torch.Tensor:
        gate, up = self._linear("gate_up", self.gate_up[expert], expert, rows).chunk(2, dim=-1)
        return self._linear("down", self.down[expert], expert, functional.silu(gate) * up)

    def _linear(self, name: str, weight: torch.Tensor, expert: int, rows: torch.Tensor) -> torch.Tensor:
        output = functional.linear(rows, weight)
        if not self.with_lora:
            return output
        thin = functional.linear(rows, self.lora[name + "_a"][expert])
        return output + workload.SCALING * functional.linear(thin, self.lora[name + "_b"][expert])


class LinearPeer(AutogradPeer):
    """LinearExperts."""

    def __init__(self, model: Path, shape: workload.Shape) -> None:
        self._layers = [
            LinearExperts(shape, checkpoint.read_experts(model, shape, n), workload.lora_weights(shape, n))
            for n in range(shape.layers)
        ]

    def module(self, mode: str, layer: int) -> nn.Module:
        self._layers[layer].with_lora = mode == LORA
        return self._layers[layer]

    def lora_gradients(self, layer: int) -> dict[str, torch.Tensor]:
        return {
            name: torch.stack([torch.zeros_like(one) if one.grad is None else one.grad for one in parameters])
            for name, parameters in self._layers[layer].lora.items()
        }

    def forget(self) -> None:
        for layer in self._layers:
            layer.zero_grad()


class KtKernelPeer(Peer):
    """The published kt-kernel wheel: its bf16 backend for fine-tuning, through its own Python classes.

    rebuilds: backward's transposed copy of the weights is one for all layers and made anew for each, which is the
    wheel's default (kt_share_backward_bb) and takes half the memory; otherwise each layer keeps its own.
    """

    modes = (LORA,)
    needs = ("torch", "kt-kernel")

    def __init__(self, model: Path, shape: workload.Shape, tokens_max: int, rebuilds: bool) -> None:
        before = set(os.listdir("/proc/self/task"))
        self._shape = shape
        self._gradients: list[dict[str, torch.Tensor]] = []
        self._niceness: dict[int, int] = {}
        self._layers = [self._make_layer(model, number, tokens_max, rebuilds) for number in range(shape.layers)]
        self._dispatchers = _dispatchers(before)

    def _make_layer(self, model: Path, number: int, tokens_max: int, rebuilds: bool) -> Any:
        from kt_kernel.sft.amx import AMXSFTMoEWrapper

        shape = self._shape
        layer = AMXSFTMoEWrapper(
            layer_idx=number,
            num_experts=shape.experts,
            num_experts_per_tok=shape.top_k,
            hidden_size=shape.hidden,
            moe_intermediate_size=shape.intermediate,
            num_gpu_experts=0,
            cpuinfer_threads=torch.get_num_threads(),
            threadpool_count=1,
            weight_path=str(model),
            chunked_prefill_size=tokens_max,
            lora_rank=shape.rank,
            lora_alpha=workload.SCALING * shape.rank,
            max_cache_depth=1,
            method="AMXBF16_SFT",
        )
        layer.share_backward_bb = rebuilds
        weights = checkpoint.read_experts(model, shape, number)
        layer.load_weights_from_tensors(
            weights["gate_proj"], weights["up_proj"], weights["down_proj"], torch.arange(shape.experts)
        )
        # The wheel knows no A in common: gate and up get one each.
        lora = workload.lora_weights(shape, number)
        gate_b, up_b = lora["gate_up_b"].chunk(2, dim=1)
        values = {
            "gate_lora_a": lora["gate_up_a"],
            "gate_lora_b": gate_b,
            "up_lora_a": lora["gate_up_a"],
            "up_lora_b": up_b,
            "down_lora_a": lora["down_a"],
            "down_lora_b": lora["down_b"],
        }
        parameters = {name: nn.Parameter(value.clone().contiguous()) for name, value in values.items()}
        gradients = {"grad_" + name: torch.zeros_like(value).contiguous() for name, value in parameters.items()}
        layer.init_lora_weights(**parameters, **gradients)
        self._gradients.append(gradients)
        return layer

    def prepare(self, call: workload.Call) -> dict[str, Any]:
        """Tries priorities of the wheel's dispatcher, whose spinning takes time from its own two workers.

        Which is best depends on the kernel's scheduler and the length of a call: lowered, it leaves the workers their
        cores, but wakes late when these have done their work and spin themselves. Only root can raise it again.
        """
        tokens = call.hidden.shape[0]
        usual = os.getpriority(os.PRIO_PROCESS, 0)
        took = {}
        for niceness in [usual] if os.geteuid() != 0 else sorted({usual, max(usual, 5), 19}):
            self._niceness[tokens] = niceness
            runs = [self.run(LORA, number % self._shape.layers, call) for number in range(4)]
            took[niceness] = statistics.median(ran.forward_seconds + ran.backward_seconds for ran in runs)
        self._niceness[tokens] = min(took, key=took.__getitem__)
        return {"dispatcher_nice": self._niceness[tokens]}

    def run(self, mode: str, layer: int, call: workload.Call) -> Ran:
        for thread in self._dispatchers:
            os.setpriority(os.PRIO_PROCESS, thread, self._niceness[call.hidden.shape[0]])
        wrapper = self._layers[layer]
        begin = time.perf_counter()
        output = wrapper.forward(call.hidden, call.ids, call.weights)
        middle = time.perf_counter()
        grad_hidden, grad_weights = wrapper.backward(call.grad_output)
        end = time.perf_counter()
        results = {"output": output, "grad_hidden": grad_hidden, "grad_weights": grad_weights}
        return Ran(middle - begin, end - middle, results)

    def lora_gradients(self, layer: int) -> dict[str, torch.Tensor]:
        found = {name: gradient.float() for name, gradient in self._gradients[layer].items()}
        return {
            "gate_up_a": found["grad_gate_lora_a"] + found["grad_up_lora_a"],
            "gate_up_b": torch.cat([found["grad_gate_lora_b"], found["grad_up_lora_b"]], dim=1),
            "down_a": found["grad_down_lora_a"],
            "down_b": found["grad_down_lora_b"],
        }

    def forget(self) -> None:
        for layer in self._layers:
            layer.release_authoritative_optimizer_grads()

    def about(self) -> dict[str, Any]:
        import kt_kernel

        return {**super().about(), "kernels": kt_kernel.__cpu_variant__}


def _dispatchers(before: set[str]) -> list[int]:
    """Threads that came since `before` and are none of the wheel's workers, which are named after their NUMA node."""
    found = []
    for thread in set(os.listdir("/proc/self/task")) - before:
        with open(f"/proc/self/task/{thread}/comm", encoding="ascii") as file:
            if not file.read().startswith("numa_"):
                found.append(int(thread))
    return found


OURS = "kt-coproc"
NAMES = ("eager", "grouped_mm", "linear", "kt-kernel", "kt-kernel-rebuild")
WHAT = {
    OURS: "this project: a script that does not know of us, KT_COPROC set",
    "eager": "transformers, experts_implementation=eager; LoRA: PEFT's target_parameters",
    "grouped_mm": "transformers, experts_implementation=grouped_mm; LoRA: PEFT's target_parameters",
    "linear": "by hand: F.linear per expert, LoRA as thin products",
    "kt-kernel": "the kt-kernel wheel, a transposed copy of the weights kept for every layer",
    "kt-kernel-rebuild": "the kt-kernel wheel as by default: one transposed copy, made anew by every backward",
}


def make_peer(name: str, model: Path, shape: workload.Shape, tokens_max: int) -> Peer:
    """Raises ImportError where a package is not installed, and whatever a peer says that cannot run here."""
    if name == OURS:
        return CoprocPeer(model, shape)
    if name in ("eager", "grouped_mm"):
        return TransformersPeer(model, shape, name)
    if name == "linear":
        return LinearPeer(model, shape)
    return KtKernelPeer(model, shape, tokens_max, rebuilds=name == "kt-kernel-rebuild")
