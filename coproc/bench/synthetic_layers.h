// A few MoE layers with random weights and an adapter on each.
#pragma once
#include <cstdint>
#include <memory>
#include <string>

#include "coproc/experts/adapter.h"
#include "coproc/experts/dims.h"
#include "coproc/experts/weights.h"
#include "coproc/experts/worker_pool.h"
#include "kernels/kernel_table.h"
#include "shm/base/result.h"

namespace kt::coproc {

struct SyntheticLayers {
  ExpertDims dims;
  std::unique_ptr<ExpertWeights> weights;
  std::unique_ptr<Adapter> adapter;  // nullptr: rank 0.
};

// dims: every layer has experts. All experts have the same numbers, in memory of their own: no kernel's speed depends
// on them. nodes: as for ExpertWeights::create. rank: of LoRA on all three matrices, one A for gate and up as in PEFT's
// fused layout; 0: none. kNoResources.
Result<SyntheticLayers> make_synthetic_layers(const ExpertDims& dims, const std::string& weight_format,
                                              std::uint32_t rank, const kernels::KernelTable& table, WorkerPool& pool,
                                              std::span<const int> nodes = {});

}  // namespace kt::coproc
