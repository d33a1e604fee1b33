// The frozen expert weights: one packed copy, read by forward and backward, shared by all jobs.
#pragma once
#include <cstddef>
#include <cstdint>
#include <memory>
#include <span>

#include "coproc/experts/dims.h"
#include "coproc/experts/memory.h"
#include "kernels/formats.h"
#include "kernels/kernel_table.h"
#include "shm/base/result.h"

namespace kt::coproc {

// A packed matrix as it is kept: panels of elements, or quantised ones.
struct WeightMatrix {
  // Panels [begin, begin + count) as elements: where they lie, or dequantised into `scratch`.
  kernels::Panels elements(const kernels::KernelTable& table, std::int64_t begin, std::int64_t count,
                           Scratch& scratch) const;
  kernels::QuantPanels codes(std::int64_t begin, std::int64_t count) const {
    return {data + begin * stride, stride, count, k, quantised->layout};
  }
  // Panels q … q + count - 1 of the transpose, in `transposed`, as far as they come from panels [first, first +
  // num_panels). Quantised weights pass through `scratch` as they do in elements(): both directions multiply by the
  // same numbers. If `more` has panels, its transpose is written after W's. The returned k counts W's rows only; the
  // caller adds the rows of `more` it needs.
  struct Piece {
    std::int64_t q = 0;
    std::int64_t count = 1;
    std::int64_t first = 0;
    std::int64_t num_panels = 0;
  };
  kernels::Panels transpose(const kernels::KernelTable& table, const Piece& piece, const kernels::Panels& more,
                            Scratch& transposed, Scratch& scratch, const kernels::Fetch& next) const;

  // What will be read for panels [begin, begin + count), or for a piece of the transpose.
  kernels::Fetch fetch(std::int64_t begin, std::int64_t count) const {
    return {data + begin * stride, count * stride, 0, 1};
  }
  kernels::Fetch fetch(const Piece& piece, std::int64_t element_bytes) const;

  const std::byte* data = nullptr;
  std::int64_t stride = 0;  // Bytes.
  std::int64_t num_panels = 0;
  std::int64_t k = 0;
  const kernels::QuantKernels* quantised = nullptr;  // null: elements.
};

class ExpertWeights {
 public:
  // Reserves the memory (kNoResources with numbers when it is not there); nothing is packed yet. The weights are kept
  // in `format` only, which the table must run; null: elements. `nodes`: a NUMA node for each pool of workers (-1:
  // any); expert e's weights are on that of pool e mod nodes.size().
  static Result<std::unique_ptr<ExpertWeights>> create(const ExpertDims& dims, const kernels::KernelTable& table,
                                                       const kernels::StorageFormat* format = nullptr,
                                                       std::span<const int> nodes = {});
  ~ExpertWeights();
  ExpertWeights(const ExpertWeights&) = delete;
  ExpertWeights& operator=(const ExpertWeights&) = delete;

  // Packs or quantises one expert from row-major elements: gate, up [I, H], down [H, I]. Thread-safe for different
  // experts.
  void set_expert(std::uint32_t moe_index, std::uint32_t expert, const void* gate, const void* up, const void* down);

  // One expert as it is kept, in one piece: what files keep of it.
  std::span<std::byte> expert_data(std::uint32_t moe_index, std::uint32_t expert);

  // [2I, H], gate and up panels interleaved.
  WeightMatrix gate_up(std::uint32_t moe_index, std::uint32_t expert) const;
  // [H, I].
  WeightMatrix down(std::uint32_t moe_index, std::uint32_t expert) const;
  std::uint64_t bytes() const;

 private:
  struct State;
  explicit ExpertWeights(std::unique_ptr<State> state);
  std::unique_ptr<State> state_;
};

}  // namespace kt::coproc
