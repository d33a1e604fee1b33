#include "coproc/engine/activation_budget.h"

namespace kt::coproc {

Keep ActivationBudget::decide(std::uint64_t input_bytes, std::uint64_t gate_up_bytes) const {
  const auto fits = [](std::uint64_t used, std::uint64_t more, std::uint64_t limit) {
    return used <= limit && more <= limit - used;
  };
  const std::uint64_t both = input_bytes + gate_up_bytes;
  if (fits(job_bytes, both, share_bytes()) && fits(all_bytes, both, bytes_max)) return Keep::kAll;
  return fits(job_bytes, input_bytes, share_bytes()) ? Keep::kInputOnly : Keep::kRefused;
}

std::uint64_t activation_input_bytes(const ExpertDims& dims, std::uint64_t num_tokens, bool keep_y) {
  const std::uint64_t rows = num_tokens * dims.hidden_size * dims.element_bytes;
  return rows * (keep_y ? 2 : 1) + num_tokens * dims.top_k * 8;
}

std::uint64_t activation_gate_up_bytes(const ExpertDims& dims, std::uint64_t num_tokens) {
  return num_tokens * dims.top_k * 2 * static_cast<std::uint64_t>(dims.intermediate_padded()) * dims.element_bytes;
}

}  // namespace kt::coproc
