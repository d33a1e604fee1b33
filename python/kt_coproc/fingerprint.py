"""The identity of a checkpoint, computed from its files as coproc/model/fingerprint.h describes, byte by byte.

The daemon computes the same from its own view of the files; equal means: the same experts.
"""

from __future__ import annotations

import hashlib
import json
import os
import struct
from collections.abc import Iterable, Sequence
from typing import NamedTuple

from .expert_names import ExpertNames

_SAMPLE_BYTES = 4096
_HEADER_BYTES_MAX = 100_000_000  # As the safetensors library.


class _Tensor(NamedTuple):
    path: str
    dtype: str
    shape: tuple[int, ...]
    offset: int  # From the start of the file.
    size: int  # Bytes.


def read_header(path: str) -> dict[str, _Tensor]:
    """The tensors of one safetensors file.

    Raises:
        ValueError: the file is not a safetensors file.
        OSError: it cannot be read.
    """
    with open(path, "rb") as file:
        start = file.read(8)
        size = struct.unpack("<Q", start)[0] if len(start) == 8 else 0
        if not 2 <= size <= _HEADER_BYTES_MAX:
            raise ValueError(f"{path} is not a safetensors file")
        header = json.loads(file.read(size))
    tensors = {}
    for name, info in header.items():
        if name == "__metadata__":
            continue
        begin, end = info["data_offsets"]
        tensors[name] = _Tensor(path, info["dtype"], tuple(info["shape"]), 8 + size + begin, end - begin)
    return tensors


def _read(path: str, offset: int, size: int) -> bytes:
    with open(path, "rb") as file:
        file.seek(offset)
        return file.read(size)


def _sample(path: str, offset: int, size: int) -> bytes:
    return _read(path, offset, min(_SAMPLE_BYTES, size))


def _fused_samples(gate_up: _Tensor, down: _Tensor, layer: int) -> Iterable[bytes]:
    num_experts = gate_up.shape[0]
    expert = sampled_expert(layer, num_experts)
    half = gate_up.size // num_experts // 2
    yield _sample(gate_up.path, gate_up.offset + expert * 2 * half, half)
    yield _sample(gate_up.path, gate_up.offset + expert * 2 * half + half, half)
    size = down.size // num_experts
    yield _sample(down.path, down.offset + expert * size, size)


def _per_expert_samples(
    tensors: dict[tuple[int, str], _Tensor], layer: int, projections: Sequence[str]
) -> Iterable[bytes]:
    expert = sampled_expert(layer, 1 + max(expert for expert, _ in tensors))
    for projection in projections:
        tensor = tensors[expert, projection]
        yield _sample(tensor.path, tensor.offset, tensor.size)


def sampled_expert(layer: int, num_experts: int) -> int:
    """The expert whose weights enter the fingerprint."""
    return 7 * layer % num_experts


def first_rows(files: Sequence[str], names: ExpertNames) -> dict[int, tuple[str, bytes]]:
    """Layer -> dtype as in the file and bytes of the first row of the sampled expert's gate matrix. For files that have
    a fingerprint."""
    routed = [(*_layer_and_rest(name, names), tensor) for name, tensor in _routed_tensors(files, names).items()]
    num_experts = 1 + max((int(m[1]) for _, rest, _ in routed if (m := names.per_expert.match(rest))), default=0)
    rows = {}
    for layer, rest, tensor in routed:
        if rest == names.gate_up:
            part = tensor.size // tensor.shape[0]
            offset = tensor.offset + sampled_expert(layer, tensor.shape[0]) * part
            rows[layer] = tensor.dtype, _read(tensor.path, offset, part // tensor.shape[1])
        elif rest == f"{sampled_expert(layer, num_experts)}.{names.projections[0]}.weight":
            rows[layer] = tensor.dtype, _read(tensor.path, tensor.offset, tensor.size // tensor.shape[0])
    return rows


def _routed_tensors(files: Sequence[str], names: ExpertNames) -> dict[str, _Tensor]:
    routed: dict[str, _Tensor] = {}
    for path in files:
        routed.update({n: t for n, t in read_header(path).items() if names.tensor.match(n)})
    return routed


def _layer_and_rest(name: str, names: ExpertNames) -> tuple[int, str]:
    match = names.tensor.match(name)
    assert match is not None
    return int(match[1]), match[2]


def fingerprint(directory: str, files: Sequence[str], names: ExpertNames) -> str | None:
    """SHA-256 in hexadecimal, or None where the files do not hold experts under the daemon's names.

    Args:
        directory: where config.json is.
        files: the safetensors files that transformers resolved for this checkpoint.
        names: of the daemon's expert tensors.
    """
    try:
        with open(os.path.join(directory, "config.json"), encoding="utf-8") as file:
            architecture = json.load(file)["architectures"][0]
        routed = _routed_tensors(files, names)
        if not routed:
            return None
        digest = hashlib.sha256(f"{architecture}\n".encode())
        layers: dict[int, dict[str, _Tensor]] = {}
        for name in sorted(routed, key=str.encode):
            tensor = routed[name]
            shape = ",".join(str(size) for size in tensor.shape)
            digest.update(f"{name}\t{tensor.dtype}\t[{shape}]\n".encode())
            layer, rest = _layer_and_rest(name, names)
            layers.setdefault(layer, {})[rest] = tensor
        for layer in sorted(layers):
            for sample in _layer_samples(layers[layer], layer, names):
                digest.update(sample)
        return digest.hexdigest()
    except (OSError, ValueError, KeyError, IndexError, TypeError, ZeroDivisionError):
        return None  # Not a checkpoint that a daemon could serve; whoever loads it says what is wrong with it.


def _layer_samples(tensors: dict[str, _Tensor], layer: int, names: ExpertNames) -> Iterable[bytes]:
    if names.gate_up in tensors:
        return _fused_samples(tensors[names.gate_up], tensors[names.down], layer)
    per_expert = {}
    for rest, tensor in tensors.items():
        match = names.per_expert.match(rest)
        if match is None:
            raise ValueError(rest)
        per_expert[int(match[1]), match[2]] = tensor
    return _per_expert_samples(per_expert, layer, names.projections)
