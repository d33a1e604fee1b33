"""Which models go to the daemon, what happens when there is none, and that nothing happens without KT_COPROC."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
from conftest import TIMEOUT, Daemon, environment, run_script

LOAD = """
import sys, torch
from transformers import AutoModelForCausalLM
model = AutoModelForCausalLM.from_pretrained(sys.argv[1], dtype=torch.float32)
print("experts:", type(next(m for n, m in model.named_modules() if n.endswith("mlp.experts"))).__name__)
"""


def python(code: str, *args: object, address: str | None = None, fails: bool = False, **extra: str) -> str:
    result = subprocess.run(
        [sys.executable, "-c", code, *map(str, args)],
        capture_output=True,
        text=True,
        env=environment(address, **extra),
        timeout=TIMEOUT,
    )
    assert (result.returncode != 0) == fails, result.stdout + result.stderr
    return result.stdout + result.stderr


@pytest.fixture(scope="module")
def other(work: Path) -> Path:
    """A checkpoint of the same shapes with other weights."""
    subprocess.run(
        [sys.executable, str(Path(__file__).parent / "make_tiny.py"), str(work / "other"), "--seed", "1"],
        check=True,
        env=environment(),
        timeout=TIMEOUT,
    )
    return work / "other"


def test_another_model_raises_and_names_both(other: Path, tiny: Path, daemon: Daemon) -> None:
    text = python(LOAD, other, address=daemon.address, fails=True)
    assert "CoprocModelMismatch" in text and str(other) in text and str(tiny) in text
    assert "KT_COPROC_OTHER_MODELS=plain" in text


def test_another_model_runs_plainly_when_asked(other: Path, daemon: Daemon) -> None:
    text = python(LOAD, other, address=daemon.address, KT_COPROC_OTHER_MODELS="plain")
    assert "experts: Qwen3MoeExperts" in text


def test_without_a_daemon_loading_is_a_hard_error_and_importing_is_not(tiny: Path, work: Path) -> None:
    code = "import torch, transformers, kt_coproc; print('imported')\n" + LOAD
    text = python(code, tiny, address=f"unix:{work}/nobody.sock", fails=True)
    assert "imported" in text and "CoprocError" in text and "kt-coproc run --model" in text


def test_an_invalid_address_is_quoted(tiny: Path) -> None:
    text = python(LOAD, tiny, address="tcp://nowhere", fails=True)
    assert "CoprocError" in text and "tcp://nowhere" in text


@pytest.mark.parametrize("value", [None, *(pytest.param(v, marks=pytest.mark.slow) for v in ("off", ""))])
def test_without_kt_coproc_the_package_is_inert(tiny: Path, value: str | None) -> None:
    code = """
import sys
import kt_coproc
assert "torch" not in sys.modules, "importing the package imported torch"
import torch, torch.utils.checkpoint
import transformers.modeling_utils as mu, peft.tuners.lora.layer as layer, accelerate.accelerator as acc
loaded = sorted(name for name in sys.modules if name.startswith("kt_coproc"))
light = [f"kt_coproc.{name}" for name in ("_autoload", "environment", "errors", "patching")]
assert loaded == ["kt_coproc", *light], loaded
assert not any(type(finder).__module__.startswith("kt_coproc") for finder in sys.meta_path)
from torch.optim.optimizer import _global_optimizer_pre_hooks
assert not _global_optimizer_pre_hooks
touched = [torch.optim.Optimizer.zero_grad, torch.nn.Module.zero_grad, torch.nn.utils.clip_grad_norm_,
           torch.utils.checkpoint.checkpoint, torch.nn.parallel.DistributedDataParallel.__init__,
           mu.PreTrainedModel.from_pretrained.__func__, mu.PreTrainedModel.post_init, layer.ParamWrapper.forward,
           acc.fsdp2_prepare_model]
assert not any("kt_coproc" in f.__code__.co_filename for f in touched)
print("inert")
"""
    assert "inert" in python(code, address=value)


ORDERS = [
    "transformers.modeling_utils",
    "accelerate.accelerator",
    "kt_coproc.connection",
    pytest.param("torch", marks=pytest.mark.slow),
    pytest.param("peft", marks=pytest.mark.slow),
    pytest.param("accelerate", marks=pytest.mark.slow),
    pytest.param("transformers", marks=pytest.mark.slow),
    pytest.param("kt_coproc.experts", marks=pytest.mark.slow),
]


@pytest.mark.parametrize("first", ORDERS)
def test_every_order_of_imports_is_patched(first: str, work: Path) -> None:
    code = f"""
import {first}
import torch, transformers, peft, accelerate, torch.distributed.fsdp
import transformers.modeling_utils as mu, peft.tuners.lora.layer as layer, accelerate.accelerator as acc
from transformers.models.qwen3_moe import modeling_qwen3_moe
from kt_coproc import patching
assert patching.failure is None, patching.failure
touched = [torch.optim.Optimizer.zero_grad, torch.nn.Module.zero_grad, torch.nn.utils.clip_grad_norm_,
           torch.utils.checkpoint.checkpoint, mu.checkpoint, torch.nn.parallel.DistributedDataParallel.__init__,
           mu.PreTrainedModel.from_pretrained.__func__, mu.PreTrainedModel.post_init, layer.ParamWrapper.forward,
           acc.fsdp2_prepare_model, torch.distributed.fsdp.fully_shard]
missing = [f.__qualname__ for f in touched if "kt_coproc" not in f.__code__.co_filename]
assert not missing, missing
print("patched")
"""
    assert "patched" in python(code, address=f"unix:{work}/nobody.sock")


def test_a_dense_model_and_one_built_from_a_config_need_no_daemon(work: Path, tiny: Path) -> None:
    code = """
import sys, torch
from transformers import AutoConfig, AutoModelForCausalLM, Qwen3Config, Qwen3ForCausalLM
config = Qwen3Config(vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=1, num_attention_heads=2,
                     num_key_value_heads=2, head_dim=16)
Qwen3ForCausalLM(config).save_pretrained(sys.argv[2])
AutoModelForCausalLM.from_pretrained(sys.argv[2])
built = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(sys.argv[1]))
print(type(built.model.layers[0].mlp.experts).__name__)
"""
    text = python(code, tiny, work / "dense", address=f"unix:{work}/nobody.sock")
    assert "Qwen3MoeExperts" in text and "KtCoproc" not in text


def test_attaching_to_a_loaded_daemon_reads_no_weights_and_takes_a_moment(tiny: Path, daemon: Daemon) -> None:
    code = """
import time, kt_coproc, torch
start = time.monotonic()
with kt_coproc.connect() as client:
    print("attached in", round(time.monotonic() - start, 3), "s to", client.model["path"])
    assert client.stats()["ranks"]
"""
    load = daemon.status()["load"]
    text = python(code, address=daemon.address)
    print(text)
    assert str(tiny) in text and daemon.status()["load"] == load


@pytest.mark.slow
def test_loading_two_gigabytes_of_per_expert_weights_takes_no_memory_of_the_rank(work: Path) -> None:
    big = work / "big"
    subprocess.run(
        [sys.executable, str(Path(__file__).parent / "make_tiny.py"), str(big), "--big"],
        check=True,
        env=environment(),
        timeout=TIMEOUT,
    )
    daemon = Daemon(big, "--threads", "1")
    try:
        text = run_script("measure_loading.py", "--model", big, address=daemon.address)
    finally:
        daemon.stop()
    grown, outside = (int(word) for word in text.split("GROWN ")[1].split()[:2])
    print(f"anonymous memory grew by {grown >> 20} MiB; non-expert part {outside >> 20} MiB")
    assert grown < outside + 100_000_000
