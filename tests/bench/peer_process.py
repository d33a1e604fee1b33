"""A peer in a process of its own: reads commands, a JSON object a line, and answers each with one.

    {"do": "check", mode, tokens, file}                  call 0 through layer 0; results to a safetensors file
        -> what the peer chose for that many tokens
    {"do": "run", mode, tokens, first, calls}            calls first, first + 1, …, each through the next layer
        -> {"forward": seconds, "backward": seconds}     of one call, on average

The first line out says what it is: {versions, modes}, or {error} if this peer cannot run here.
"""

from __future__ import annotations

import argparse
import contextlib
import gc
import json
import os
import sys
import traceback
from pathlib import Path
from typing import Any

import peers
import torch
import workload
from safetensors.torch import save_file


def check(peer: peers.Peer, shape: workload.Shape, command: dict[str, Any]) -> dict[str, Any]:
    mode, call = command["mode"], workload.make_call(shape, command["tokens"], 0)
    settings = peer.prepare(call)
    peer.forget()
    tensors = peer.run(mode, 0, call).tensors
    if mode == peers.LORA:
        tensors.update({"grad_" + name: gradient for name, gradient in peer.lora_gradients(0).items()})
        peer.forget()
    save_file({name: tensor.float().contiguous() for name, tensor in tensors.items()}, command["file"])
    return settings


def run(peer: peers.Peer, shape: workload.Shape, command: dict[str, Any]) -> dict[str, Any]:
    first, count = command["first"], command["calls"]
    numbers = range(first, first + count)
    calls = [workload.make_call(shape, command["tokens"], number) for number in numbers]
    if count > 1:  # Short calls: the threads have just been woken.
        peer.run(command["mode"], (first + 1) % shape.layers, calls[0])
    gc.collect()
    gc.disable()
    forward = backward = 0.0
    for number, call in zip(numbers, calls, strict=True):
        ran = peer.run(command["mode"], number % shape.layers, call)
        forward += ran.forward_seconds / count
        backward += ran.backward_seconds / count
    gc.enable()
    return {"forward": forward, "backward": backward}


def main() -> None:
    # Libraries print to stdout: the answers go to a copy, and what is printed to stderr.
    answers = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)

    def answer(message: dict[str, Any]) -> None:
        answers.write(json.dumps(message) + "\n")
        answers.flush()

    parser = argparse.ArgumentParser()
    parser.add_argument("name")
    parser.add_argument("model", type=Path)
    parser.add_argument("shape", type=json.loads)
    parser.add_argument("--tokens-max", type=int, required=True)
    parser.add_argument("--threads", type=int, required=True)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    shape = workload.Shape(**arguments.shape)
    try:
        peer = peers.make_peer(arguments.name, arguments.model, shape, arguments.tokens_max)
    except Exception as error:  # Whatever a library raises that does not run on this machine.
        traceback.print_exc()
        answer({"error": f"{type(error).__name__}: {error}"})
        return
    answer({**peer.about(), "modes": peer.modes})
    with contextlib.suppress(KeyboardInterrupt):
        for line in sys.stdin:
            command = json.loads(line)
            answer({"check": check, "run": run}[command["do"]](peer, shape, command))


if __name__ == "__main__":
    main()
