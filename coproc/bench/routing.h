// Which experts a token goes to.
#pragma once
#include <cstdint>
#include <random>
#include <vector>

namespace kt::coproc {

class Router {
 public:
  // skew 0: every expert equally often; experts are dealt from shuffled decks, so one comes again when all others have.
  // skew s > 0: expert number n of a random order with probability ~ 1/(n+1)^s, a token's experts all different.
  Router(std::int64_t num_experts, std::int64_t top_k, double skew, std::uint64_t seed);

  // ids[num_tokens, top_k].
  std::vector<std::int32_t> route(std::int64_t num_tokens);

 private:
  void draw_token(std::int32_t* ids);

  std::int64_t top_k_;
  double skew_;
  std::mt19937_64 random_;
  std::vector<std::int32_t> deck_;  // A random order of the experts; dealt from next_ on.
  std::size_t next_ = 0;
  std::vector<double> popularity_;  // Of deck_[n].
  std::vector<double> keys_;
};

}  // namespace kt::coproc
