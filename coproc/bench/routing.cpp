#include "coproc/bench/routing.h"

#include <algorithm>
#include <cmath>
#include <numeric>

#include "shm/base/result.h"

namespace kt::coproc {

Router::Router(std::int64_t num_experts, std::int64_t top_k, double skew, std::uint64_t seed)
    : top_k_(top_k), skew_(skew), random_(seed), deck_(static_cast<std::size_t>(num_experts)) {
  KT_CHECK(top_k <= num_experts);
  std::iota(deck_.begin(), deck_.end(), 0);
  std::shuffle(deck_.begin(), deck_.end(), random_);
  for (std::int64_t n = 0; n < num_experts; ++n) popularity_.push_back(std::pow(static_cast<double>(n + 1), -skew));
}

// The top_k smallest of exponential variables with these rates are a draw without replacement.
void Router::draw_token(std::int32_t* ids) {
  std::exponential_distribution<double> exponential;
  keys_.clear();
  for (const double rate : popularity_) keys_.push_back(exponential(random_) / rate);
  std::vector<std::int32_t> order(deck_.size());
  std::iota(order.begin(), order.end(), 0);
  std::partial_sort(order.begin(), order.begin() + top_k_, order.end(), [&](std::int32_t a, std::int32_t b) {
    return keys_[static_cast<std::size_t>(a)] < keys_[static_cast<std::size_t>(b)];
  });
  for (std::int64_t j = 0; j < top_k_; ++j) {
    ids[j] = deck_[static_cast<std::size_t>(order[static_cast<std::size_t>(j)])];
  }
}

std::vector<std::int32_t> Router::route(std::int64_t num_tokens) {
  std::vector<std::int32_t> ids(static_cast<std::size_t>(num_tokens * top_k_));
  if (skew_ > 0) {
    for (std::int64_t token = 0; token < num_tokens; ++token) draw_token(ids.data() + token * top_k_);
    return ids;
  }
  for (std::int32_t& id : ids) {
    if (next_ == deck_.size()) {
      std::shuffle(deck_.begin(), deck_.end(), random_);
      next_ = 0;
    }
    id = deck_[next_++];
  }
  return ids;
}

}  // namespace kt::coproc
