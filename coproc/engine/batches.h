// FORWARD and BACKWARD: which requests run together, whose turn it is, and running them.
#pragma once
#include <cstdint>
#include <vector>

#include "coproc/engine/activations.h"
#include "coproc/engine/fair_share.h"
#include "coproc/engine/heads.h"
#include "coproc/experts/expert_compute.h"

namespace kt::coproc {

struct Batch {
  Job* job = nullptr;
  BatchKey key;
  std::vector<Session*> sessions;  // Ascending by rank; each one's head belongs to the batch.
  std::uint64_t num_tokens = 0;
};

class Batches {
 public:
  Batches(const ExpertDims& dims, const Registry& registry, const Heads& heads, const Activations& activations,
          ExpertCompute& compute, Accounting& accounting, std::uint32_t tokens_max)
      : dims_(dims),
        registry_(registry),
        heads_(heads),
        activations_(activations),
        compute_(compute),
        accounting_(accounting),
        tokens_max_(tokens_max) {}

  // Runs one batch of the job whose turn it is. False: none is ready.
  bool run_next();
  // Runs the heads of the batch's sessions, whatever waits elsewhere, and answers them.
  void run(Batch batch);
  // What can run together now: the job's oldest head and, in order of rank, what fits beside it. No sessions: nothing.
  Batch gather(Job& job) const;
  std::uint32_t tokens_max() const { return tokens_max_; }

 private:
  void run_forward(Batch& batch);
  void run_backward(const Batch& batch);
  CostEstimate& cost_of(const Batch& batch) {
    return batch.key.verb == shm::Verb::kForward ? forward_cost_ : backward_cost_;
  }

  const ExpertDims& dims_;
  const Registry& registry_;
  const Heads& heads_;
  const Activations& activations_;
  ExpertCompute& compute_;
  Accounting& accounting_;
  const std::uint32_t tokens_max_;
  FairShare fair_share_;
  CostEstimate forward_cost_, backward_cost_;
};

}  // namespace kt::coproc
