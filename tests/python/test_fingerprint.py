"""The identity of a checkpoint, as coproc/model/fingerprint.h defines it."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import torch
from conftest import Daemon
from kt_coproc.expert_names import expert_names
from kt_coproc.fingerprint import fingerprint
from safetensors.torch import load_file, save_file

NAMES = expert_names(
    {
        "expert_names": {
            "prefixes": ["model.", "", "transformer."],
            "path": "mlp.experts",
            "projections": ["gate_proj", "up_proj", "down_proj"],
            "fused": ["gate_up_proj", "down_proj"],
        }
    }
)


def test_both_ends_compute_the_same(tiny: Path, daemon: Daemon) -> None:
    ours = fingerprint(str(tiny), [str(tiny / "model.safetensors")], NAMES)
    assert ours == daemon.status()["model"]["fingerprint"]


def test_the_example_of_the_definition(tmp_path: Path) -> None:
    gate_up = torch.randn(4, 64, 64).bfloat16()
    down = torch.randn(4, 64, 32).bfloat16()
    tensors = {
        "model.layers.0.mlp.experts.gate_up_proj": gate_up,
        "model.layers.0.mlp.experts.down_proj": down,
        "model.norm.weight": torch.ones(64),
    }
    save_file(tensors, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text(json.dumps({"architectures": ["Qwen3MoeForCausalLM"]}))
    expected = hashlib.sha256()
    expected.update(b"Qwen3MoeForCausalLM\nmodel.layers.0.mlp.experts.down_proj\tBF16\t[4,64,32]\n")
    expected.update(b"model.layers.0.mlp.experts.gate_up_proj\tBF16\t[4,64,64]\n")
    for part in (gate_up[0, :32], gate_up[0, 32:], down[0]):
        expected.update(part.contiguous().view(torch.int16).numpy().tobytes())
    assert fingerprint(str(tmp_path), [str(tmp_path / "model.safetensors")], NAMES) == expected.hexdigest()


def test_sharding_anew_keeps_it_and_another_weight_changes_it(tiny: Path, tmp_path: Path) -> None:
    tensors = load_file(tiny / "model.safetensors")
    original = fingerprint(str(tiny), [str(tiny / "model.safetensors")], NAMES)
    names = sorted(tensors)
    shards = [str(tmp_path / "a.safetensors"), str(tmp_path / "b.safetensors")]
    save_file({name: tensors[name] for name in names[::2]}, shards[0])
    save_file({name: tensors[name] for name in names[1::2]}, shards[1])
    (tmp_path / "config.json").write_text((tiny / "config.json").read_text())
    assert fingerprint(str(tmp_path), shards[::-1], NAMES) == original
    sampled = "model.layers.1.mlp.experts.7.up_proj.weight"  # (7 · layer) mod 8.
    tensors[sampled] = tensors[sampled] * 1.0001
    save_file(tensors, shards[0])
    assert fingerprint(str(tmp_path), shards[:1], NAMES) not in (original, None)


def test_what_is_no_checkpoint_of_experts_has_none(tmp_path: Path) -> None:
    assert fingerprint(str(tmp_path), [], NAMES) is None
    (tmp_path / "config.json").write_text(json.dumps({"architectures": ["X"]}))
    (tmp_path / "model.safetensors").write_bytes(b"no header at all")
    assert fingerprint(str(tmp_path), [str(tmp_path / "model.safetensors")], NAMES) is None
    save_file({"model.norm.weight": torch.ones(3)}, tmp_path / "model.safetensors")
    assert fingerprint(str(tmp_path), [str(tmp_path / "model.safetensors")], NAMES) is None
