#include "coproc/engine/fair_share.h"

#include <algorithm>

namespace kt::coproc {

std::size_t FairShare::pick(std::span<const Claim> claims) {
  std::map<std::uint64_t, std::uint64_t> kept;
  std::uint64_t quantum_ns = 1;
  for (const Claim& claim : claims) {
    kept[claim.job_key] = saved_ns_[claim.job_key];
    quantum_ns = std::max(quantum_ns, claim.cost_ns);
  }
  saved_ns_ = std::move(kept);

  // The job whose turn it is, else the next one in order. A new turn pays for any batch, so this ends within a round.
  const auto not_before = [&](const Claim& claim) { return claim.job_key >= current_key_; };
  std::size_t i = static_cast<std::size_t>(std::find_if(claims.begin(), claims.end(), not_before) - claims.begin());
  if (i == claims.size()) i = 0;
  bool new_turn = claims[i].job_key != current_key_;
  for (;; new_turn = true, i = (i + 1) % claims.size()) {
    std::uint64_t& saved_ns = saved_ns_[claims[i].job_key];
    if (new_turn) saved_ns += quantum_ns;
    if (saved_ns < claims[i].cost_ns) continue;
    saved_ns -= claims[i].cost_ns;
    current_key_ = claims[i].job_key;
    return i;
  }
}

std::uint64_t CostEstimate::batch_ns(std::uint64_t num_tokens) const {
  return static_cast<std::uint64_t>(ns_per_token_ * static_cast<double>(num_tokens)) + 1;
}

void CostEstimate::observe(std::uint64_t num_tokens, std::uint64_t elapsed_ns) {
  constexpr double kWeight = 0.125;  // About the last eight batches count.
  if (num_tokens == 0) return;
  ns_per_token_ += kWeight * (static_cast<double>(elapsed_ns) / static_cast<double>(num_tokens) - ns_per_token_);
}

}  // namespace kt::coproc
