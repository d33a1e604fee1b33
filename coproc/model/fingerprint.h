// The identity of a checkpoint: what a training process compares with the daemon's before it uses it. It is computed
// at both ends from the files, here and, independently, in Python.
//
// SHA-256, as 64 lower-case hexadecimal digits, over these bytes in this order:
//
//   1. architecture "\n"                            architectures[0] of config.json, UTF-8
//   2. for every routed-expert tensor, sorted by name byte by byte:
//      name "\t" dtype "\t" shape "\n"              dtype as spelled in the file, "BF16"; shape as "[d0,d1]", no blanks
//   3. for every MoE layer L, ascending, with e = (7·L) mod E; for gate, up, down, in this order:
//      the first min(4096, size) bytes of that expert's matrix, as they lie in the file
//
// A routed-expert tensor is one that holds experts of an MoE layer, by the name it has in the file: all 3·E per layer,
// or the fused two. In the fused gate_up_proj [E,2I,H] the gate matrix of e begins at row e·2I and the up matrix at
// row e·2I + I. Example: architecture Qwen3MoeForCausalLM, one layer, fused, E = 4, H = 64, I = 32, bf16 (a matrix has
// 4096 bytes):
//
//   Qwen3MoeForCausalLM⏎model.layers.0.mlp.experts.down_proj⇥BF16⇥[4,64,32]⏎
//   model.layers.0.mlp.experts.gate_up_proj⇥BF16⇥[4,64,64]⏎ and 4096 bytes from byte 0 of gate_up_proj's data, 4096
//   from byte 4096, 4096 from byte 0 of down_proj's.
//
// Files do not enter it: sharding a checkpoint anew or linking its files elsewhere keeps the fingerprint.
#pragma once
#include <string>

#include "coproc/model/checkpoint.h"
#include "shm/base/result.h"

namespace kt::coproc {

// Reads 12 KiB per MoE layer. kBadModel naming file and offset when they cannot be read.
Result<std::string> fingerprint(const Checkpoint& checkpoint);

}  // namespace kt::coproc
