// How much of an activation may be kept. A forward never waits for activation memory: keep all, keep less, refuse.
#pragma once
#include <cstdint>

#include "coproc/experts/dims.h"

namespace kt::coproc {

enum class Keep { kAll, kInputOnly, kRefused };  // kInputOnly: X, ids and weights; G and U are recomputed.

struct ActivationBudget {
  std::uint64_t bytes_max = 0;  // Of all jobs together.
  std::uint64_t num_jobs = 1;   // That share it equally.
  std::uint64_t job_bytes = 0;  // Live now, of this job.
  std::uint64_t all_bytes = 0;  // Live now, of all jobs.

  std::uint64_t share_bytes() const { return bytes_max / num_jobs; }
  // A job's share bounds what it keeps. G and U, which can be recomputed, also give way when other jobs still hold
  // memory from a time when there were fewer jobs and larger shares.
  Keep decide(std::uint64_t input_bytes, std::uint64_t gate_up_bytes) const;
};

// Bytes of SavedActivation::x, ids and weights, plus y if it is kept.
std::uint64_t activation_input_bytes(const ExpertDims& dims, std::uint64_t num_tokens, bool keep_y);
// Bytes of SavedActivation::gate_up.
std::uint64_t activation_gate_up_bytes(const ExpertDims& dims, std::uint64_t num_tokens);

}  // namespace kt::coproc
