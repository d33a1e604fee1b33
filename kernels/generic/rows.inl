// Kernels on rows of activations: rounding, the weighted sum over routes, SwiGLU and its gradient. Nothing here mixes
// rows, so a row's result does not depend on its company.
#pragma once
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

void sum_routes(const void* rows, std::int64_t ld, const std::int32_t* route_row, const float* weight, std::int64_t t,
                std::int64_t k, std::int64_t n, float* sum, std::int64_t lds) {
  for (std::int64_t token = 0; token < t; ++token) {
    const std::int32_t* route = route_row + token * k;
    float* to = sum + token * lds;
    for_vectors(n, [&](std::int64_t i, std::int64_t count) {
      F32 total = {};
      for (std::int64_t j = 0; j < k; ++j) {
        if (route[j] < 0) continue;
        const F32 value = load(static_cast<const Element*>(rows) + route[j] * ld + i, count);
        total += weight == nullptr ? value : value * weight[token * k + j];
      }
      store(to + i, total, count);
    });
  }
}

void swiglu(const float* gate_up, std::int64_t ld, std::int64_t m, std::int64_t i, void* saved, std::int64_t ld_saved,
            void* z, std::int64_t ldz) {
  for (std::int64_t row = 0; row < m; ++row) {
    const float* in = gate_up + row * ld;
    Element* keep = saved == nullptr ? nullptr : static_cast<Element*>(saved) + row * ld_saved;
    Element* out = static_cast<Element*>(z) + row * ldz;
    for (std::int64_t c = 0; c < i; c += kLanes) {
      const std::int64_t gate = c / kPanelRows * 2 * kPanelRows + c % kPanelRows;
      const std::int64_t up = gate + kPanelRows;
      const F32 g = load(in + gate);
      const F32 u = load(in + up);
      if (keep != nullptr) {
        store(keep + gate, g);
        store(keep + up, u);
      }
      store(out + c, g * sigmoid(g) * u);
    }
  }
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

// 32 columns of one row of swiglu_backward; returns Σ p·z. Everything is read before anything is written in its place.
float swiglu_backward_panel(const Element* saved, const float* p, float weight, Element* z, Element* grad) {
  Sum16 dot;
  for (std::int64_t c = 0; c < kPanelRows; c += 16) {
    for (std::int64_t v = 0; v < Sum16::kVectors; ++v) {
      const std::int64_t column = c + v * kLanes;
      const F32 g = load(saved + column);
      const F32 u = load(saved + column + kPanelRows);
      const F32 s = sigmoid(g);
      const F32 silu = g * s;
      const F32 z_value = silu * u;
      const F32 p_value = load(p + column);
      const F32 dz = p_value * weight;
      dot.sum[v] += p_value * z_value;
      if (z != nullptr) store(z + column, z_value);
      store(grad + column, dz * u * s * (1.0f + g * (1.0f - s)));
      store(grad + column + kPanelRows, dz * silu);
    }
  }
  return dot.total();
}

void swiglu_backward(const void* saved, std::int64_t ld_saved, const std::int32_t* saved_row, const float* p,
                     std::int64_t ldp, const float* weight, std::int64_t m, std::int64_t i, float* grad_weight,
                     std::int64_t ldw, void* z, std::int64_t ldz, void* grad_gate_up, std::int64_t ldg) {
  for (std::int64_t row = 0; row < m; ++row) {
    const std::int64_t from = saved_row == nullptr ? row : saved_row[row];
    const Element* gate_up = static_cast<const Element*>(saved) + from * ld_saved;
    Element* grad = static_cast<Element*>(grad_gate_up) + row * ldg;
    for (std::int64_t c = 0; c < i; c += kPanelRows)
      grad_weight[c / kPanelRows * ldw + row] =
          swiglu_backward_panel(gate_up + 2 * c, p + row * ldp + c, weight[row],
                                z == nullptr ? nullptr : static_cast<Element*>(z) + row * ldz + c, grad + 2 * c);
  }
}

}  // namespace
}  // namespace kt::kernels::KT_TABLE
