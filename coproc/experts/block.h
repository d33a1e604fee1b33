// A block: some rows of one expert, with the arrays that the stages work on. One row per route, in the order of Routes.
// Hp and Ip are the padded sizes, ra and rd the padded widths of LoRA's halves (adapter_layer.h), s LoRA's scaling:
//
//   x        [rows, Hp | ra]   gathered X | s·xa            xa   [rows, ra]  X·gate_up_aᵀ
//   z        [rows, Ip | rd]   silu(G)⊙U  | s·za            za   [rows, rd]  Z·down_aᵀ
//   dy       [rows, Hp | rd]   gathered dY | s·yb           yb   [rows, rd]  dY·down_b
//   gate_up  [rows, 2Ip | ra]  interleaved | s·gb           gb   [rows, ra]  dG|dU·gate_up_b
//   dw       [Ip/32, rows]     ⟨P, Z⟩ of each 32 columns
//
// The arrays on the left hold elements; those on the right and dw hold f32. gate_up holds G and U where backward
// recomputes them, then dG and dU. LoRA is computed in the same GEMM: the r projected columns are appended to A and the
// r rows of LoRA's second matrix to W, so the inner dimension is k + r.
//
// The blocks of a whole expert use the arrays of the worker that computes it, one after the other. A shared expert is
// one block with arrays of its own. The results of a block lie in Node::out (schedule.h): D of every route in forward,
// dX before the sum in backward.
#pragma once
#include <array>
#include <bit>
#include <cstdint>

#include "coproc/experts/memory.h"

namespace kt::coproc {

// What a stage reads or writes, as one bit each: stages name their operands so that the barriers and the account of
// bytes follow from the list of stages.
enum Operand : std::uint32_t {
  // The arrays of a block. The columns behind | belong to the array of the same projection.
  kX = 1u << 0,
  kDy = 1u << 1,
  kZ = 1u << 2,
  kGateUp = 1u << 3,
  kXa = 1u << 4,
  kYb = 1u << 5,
  kZa = 1u << 6,
  kGb = 1u << 7,
  kDw = 1u << 8,
  // Memory outside a block: X and dY of the items, G and U as an activation keeps them, the rows of results, and LoRA's
  // gradient sums S of each half.
  kInput = 1u << 9,
  kGradOutput = 1u << 10,
  kKept = 1u << 11,
  kOut = 1u << 12,
  kGateUpSums = 1u << 13,
  kDownSums = 1u << 14,
  // The frozen weights, and LoRA's packed matrices in the order of Adapter::Layer::Part.
  kGateUpW = 1u << 15,
  kDownW = 1u << 16,
  kGateUpLoraA = 1u << 17,
  kGateUpLoraB = 1u << 18,
  kDownLoraA = 1u << 19,
  kDownLoraB = 1u << 20,
};
using Operands = std::uint32_t;
constexpr Operands when(bool condition, Operands operands) { return condition ? operands : 0; }
inline constexpr std::size_t kNumArrays = 9;
inline constexpr Operands kArrays = (1u << kNumArrays) - 1;

// Calls visit(operand) for each of them.
template <class Visit>
void for_each_operand(Operands operands, const Visit& visit) {
  for (; operands != 0; operands &= operands - 1) visit(static_cast<Operand>(operands & -operands));
}

struct Block {
  std::int64_t num_rows() const { return end - begin; }
  Scratch& operator[](Operand array) { return arrays[static_cast<std::size_t>(std::countr_zero<Operands>(array))]; }
  std::int32_t expert = 0;
  std::int64_t begin = 0;  // Rows of Routes.
  std::int64_t end = 0;
  std::byte* out = nullptr;  // [rows, Hp]: where its results go.
  std::array<Scratch, kNumArrays> arrays;
};

// Rows [begin, end) of a block, or panels [begin, end) of a matrix, or LoRA tensors.
struct Range {
  std::int64_t count() const { return end - begin; }
  std::int64_t begin = 0;
  std::int64_t end = 0;
};

}  // namespace kt::coproc
