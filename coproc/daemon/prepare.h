// Everything the daemon checks and decides before it starts anything.
#pragma once
#include <memory>
#include <string>

#include "coproc/daemon/options.h"
#include "coproc/engine/engine.h"
#include "coproc/experts/dims.h"
#include "coproc/experts/weights.h"
#include "coproc/machine/topology.h"
#include "coproc/model/checkpoint.h"
#include "coproc/model/convert.h"
#include "kernels/kernel_table.h"
#include "shm/base/result.h"
#include "shm/model_card.h"

namespace kt::coproc {

struct Prepared {
  Checkpoint checkpoint;
  shm::ModelCard card;  // What clients and monitors are told.
  ElementType element = ElementType::kBf16;
  ExpertDims dims;
  const kernels::KernelTable* table = nullptr;
  WorkerPlan workers;
  std::unique_ptr<ExpertWeights> weights;  // Reserved, not loaded.
  EngineOptions engine;
};

// kBadModel, then kNoResources: a CPU without the instructions, too little memory.
Result<Prepared> prepare(const RunOptions& options);

}  // namespace kt::coproc
