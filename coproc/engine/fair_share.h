// Deficit round robin over jobs: whose batch runs next.
//
// Each turn gives a job a quantum, the most expensive batch that waits at the moment; it runs batches as long as what
// it has saved pays for them, and keeps the rest for its next turn. A job with nothing waiting loses what it saved.
#pragma once
#include <cstdint>
#include <map>
#include <span>

namespace kt::coproc {

class FairShare {
 public:
  struct Claim {
    std::uint64_t job_key = 0;
    std::uint64_t cost_ns = 1;  // ≥ 1: the estimate for the job's next batch.
  };

  // claims: every job with a batch ready, ascending by key, at least one. Returns the index of the one that runs now;
  // its cost has been paid.
  std::size_t pick(std::span<const Claim> claims);

 private:
  std::map<std::uint64_t, std::uint64_t> saved_ns_;  // By job_key.
  std::uint64_t current_key_ = 0;                    // Whose turn it is.
};

// Estimated nanoseconds of a batch: tokens times a moving average per direction.
class CostEstimate {
 public:
  std::uint64_t batch_ns(std::uint64_t num_tokens) const;
  void observe(std::uint64_t num_tokens, std::uint64_t elapsed_ns);

 private:
  double ns_per_token_ = 1000;  // Until the first batch: any number does, as all jobs are measured with the same.
};

}  // namespace kt::coproc
