// Kernels on rows of activations: rounding, the weighted sum over routes, the activation and its gradient. Nothing here
// mixes rows, so a row's result does not depend on its company.
#pragma once
#include "kernels/generic/activation.inl"
#include "kernels/generic/panel.inl"
#include "kernels/generic/vector.inl"

namespace kt::kernels::KT_TABLE {
namespace {

void round_rows(const float* in, std::int64_t ldi, std::int64_t m, std::int64_t n, float scale, void* out,
                std::int64_t ldo) {
  for (std::int64_t row = 0; row < m; ++row) {
    const float* from = in + row * ldi;
    Element* to = static_cast<Element*>(out) + row * ldo;
    for_vectors(n, [&](std::int64_t i, std::int64_t count) { store(to + i, load(from + i, count) * scale, count); });
  }
}

void sum_routes(const SumRoutesArgs& args) {
  for (std::int64_t token = 0; token < args.num_tokens; ++token) {
    const std::int32_t* route = args.route_row + token * args.top_k;
    const float* weight = args.weight == nullptr ? nullptr : args.weight + token * args.top_k;
    float* to = args.sum + token * args.ld_sum;
    for_vectors(args.n, [&, top_k = args.top_k, ld = args.ld_rows, rows = static_cast<const Element*>(args.rows)](
                            std::int64_t i, std::int64_t count) {
      F32 total = {};
      for (std::int64_t j = 0; j < top_k; ++j) {
        if (route[j] < 0) continue;
        const F32 value = load(rows + route[j] * ld + i, count);
        total += weight == nullptr ? value : value * weight[j];
      }
      store(to + i, total, count);
    });
  }
}

template <typename Function>
void activate_rows(const Function& function, const ActivateArgs args) {
  for (std::int64_t row = 0; row < args.m; ++row) {
    const float* in = args.gate_up + row * args.ld_gate_up;
    const std::int64_t to = args.saved_row == nullptr ? row : args.saved_row[row];
    Element* saved = args.saved == nullptr ? nullptr : static_cast<Element*>(args.saved) + to * args.ld_saved;
    Element* z = static_cast<Element*>(args.z) + row * args.ld_z;
    for (std::int64_t c = 0; c < args.n; c += kLanes) {
      const std::int64_t gate = c / kPanelRows * 2 * kPanelRows + c % kPanelRows;
      const std::int64_t up = gate + kPanelRows;
      const F32 g = load(in + gate);
      const F32 u = load(in + up);
      if (saved != nullptr) {
        store(saved + gate, g);
        store(saved + up, u);
      }
      store(z + c, function.value(g, u));
    }
  }
}

void activate(const ActivateArgs& args) {
  with_activation(args.activation, [&](const auto& function) { activate_rows(function, args); });
}

// Sixteen running sums, element i added to sum i mod 16, then folded in halves: the same order for every kLanes.
struct Sum16 {
  static constexpr std::int64_t kVectors = 16 / kLanes;
  F32 sum[kVectors] = {};

  float total() const {
    float s[16];
    for (std::int64_t v = 0; v < kVectors; ++v) store(s + v * kLanes, sum[v]);
    for (std::int64_t half = 8; half > 0; half /= 2)
      for (std::int64_t j = 0; j < half; ++j) s[j] += s[j + half];
    return s[0];
  }
};

// 32 columns of one row of activate_backward; returns Σ p·z. Everything is read before anything is written in its
// place. Not inlined: in the loop over rows g++ folds the sums by shuffles of lanes, which no kernel else needs.
template <typename Function>
[[gnu::noinline]] float activate_backward_panel(const Function& function, const Element* saved, const float* p,
                                                float weight, Element* z, Element* grad) {
  Sum16 dot;
  for (std::int64_t c = 0; c < kPanelRows; c += 16) {
    for (std::int64_t v = 0; v < Sum16::kVectors; ++v) {
      const std::int64_t column = c + v * kLanes;
      const F32 g = load(saved + column);
      const F32 u = load(saved + column + kPanelRows);
      const F32 z_value = function.value(g, u);
      const F32 p_value = load(p + column);
      const GateUp grad_value = function.gradient(g, u, p_value * weight);
      dot.sum[v] += p_value * z_value;
      if (z != nullptr) store(z + column, z_value);
      store(grad + column, grad_value.gate);
      store(grad + column + kPanelRows, grad_value.up);
    }
  }
  return dot.total();
}

template <typename Function>
void activate_backward_rows(const Function& function, const ActivateBackwardArgs args) {
  for (std::int64_t row = 0; row < args.m; ++row) {
    const std::int64_t from = args.saved_row == nullptr ? row : args.saved_row[row];
    const Element* saved = static_cast<const Element*>(args.saved) + from * args.ld_saved;
    const float* p = args.p + row * args.ld_p;
    Element* z = args.z == nullptr ? nullptr : static_cast<Element*>(args.z) + row * args.ld_z;
    Element* grad = static_cast<Element*>(args.grad_gate_up) + row * args.ld_grad;
    for (std::int64_t c = 0; c < args.n; c += kPanelRows)
      args.grad_weight[c / kPanelRows * args.ld_grad_weight + row] = activate_backward_panel(
          function, saved + 2 * c, p + c, args.weight[row], z == nullptr ? nullptr : z + c, grad + 2 * c);
  }
}

void activate_backward(const ActivateBackwardArgs& args) {
  with_activation(args.activation, [&](const auto& function) { activate_backward_rows(function, args); });
}

}  // namespace
}  // namespace kt::kernels::KT_TABLE
