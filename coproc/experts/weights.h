// The frozen expert weights: one packed copy, read by forward and backward, shared by all jobs.
#pragma once
#include <cstdint>
#include <memory>

#include "coproc/experts/dims.h"
#include "kernels/kernel_table.h"
#include "shm/base/result.h"

namespace kt::coproc {

class ExpertWeights {
 public:
  // Reserves the memory (kNoResources with numbers when it is not there); nothing is packed yet.
  static Result<std::unique_ptr<ExpertWeights>> create(const ExpertDims& dims, const kernels::KernelTable& table);
  ~ExpertWeights();
  ExpertWeights(const ExpertWeights&) = delete;
  ExpertWeights& operator=(const ExpertWeights&) = delete;

  // Packs one expert from row-major elements: gate, up [I, H], down [H, I]. Thread-safe for different experts.
  void set_expert(std::uint32_t moe_index, std::uint32_t expert, const void* gate, const void* up, const void* down);

  // [2I, H], gate and up panels interleaved.
  kernels::Panels gate_up(std::uint32_t moe_index, std::uint32_t expert) const;
  // [H, I].
  kernels::Panels down(std::uint32_t moe_index, std::uint32_t expert) const;
  std::uint64_t bytes() const;

 private:
  ExpertWeights(const ExpertDims& dims, const kernels::KernelTable& table);
  struct State;
  std::unique_ptr<State> state_;
};

}  // namespace kt::coproc
