#include "tests/support/expert_reference.h"

#include <algorithm>
#include <cmath>
#include <limits>

namespace kt::test {
namespace {

enum Tensor : std::size_t { kGateA, kGateB, kUpA, kUpB, kDownA, kDownB };

// y[n] += scale · M[n, k] · x[k]
void multiply(const double* m, std::int64_t n, std::int64_t k, const double* x, double scale, double* y) {
  for (std::int64_t row = 0; row < n; ++row) {
    double sum = 0;
    for (std::int64_t col = 0; col < k; ++col) sum += m[row * k + col] * x[col];
    y[row] += scale * sum;
  }
}

// y[k] += scale · M[n, k]ᵀ · x[n]
void multiply_transposed(const double* m, std::int64_t n, std::int64_t k, const double* x, double scale, double* y) {
  for (std::int64_t row = 0; row < n; ++row) {
    for (std::int64_t col = 0; col < k; ++col) y[col] += scale * m[row * k + col] * x[row];
  }
}

// M[n, k] += scale · a[n] ⊗ b[k]
void add_outer(const double* a, std::int64_t n, const double* b, std::int64_t k, double scale, double* m) {
  for (std::int64_t row = 0; row < n; ++row) {
    for (std::int64_t col = 0; col < k; ++col) m[row * k + col] += scale * a[row] * b[col];
  }
}

double sigmoid(double x) { return 1 / (1 + std::exp(-x)); }

// One route: one token through one expert.
class Route {
 public:
  Route(const ReferenceLayer& layer, std::int64_t expert, const double* x)
      : layer_(layer), expert_(expert), x_(x), h_(layer.hidden), i_(layer.intermediate) {
    gate_ = half(layer.gate, kGateA, kGateB, gate_low_);
    up_ = half(layer.up, up_a(), kUpB, up_low_);
    z_.resize(size(i_));
    gate_passes_.assign(z_.size(), 1);
    up_passes_.assign(z_.size(), 1);
    for (std::size_t n = 0; n < z_.size(); ++n) {
      if (layer_.limit > 0) clamp(n);
      z_[n] = gate_[n] * sigmoid(gate_[n]) * up_[n];
    }
  }

  Doubles output() const {
    Doubles d(size(h_));
    multiply(matrix(layer_.down, h_, i_), h_, i_, z_.data(), 1, d.data());
    if (const std::int64_t r = layer_.lora.down_r; r > 0) {
      Doubles low(size(r));
      multiply(lora(kDownA), r, i_, z_.data(), 1, low.data());
      multiply(lora(kDownB), h_, r, low.data(), layer_.lora.down_scaling, d.data());
    }
    return d;
  }

  // Adds to dx[H] and to the LoRA gradients; returns ∂/∂w.
  double backward(double w, const double* dy, double* dx, LoraTensors& grads) const {
    const std::int64_t r = layer_.lora.down_r;
    const double s = layer_.lora.down_scaling;
    Doubles p(size(i_));
    multiply_transposed(matrix(layer_.down, h_, i_), h_, i_, dy, 1, p.data());
    if (r > 0) {
      Doubles from_b(size(r));
      Doubles low(size(r));
      multiply_transposed(lora(kDownB), h_, r, dy, 1, from_b.data());
      multiply_transposed(lora(kDownA), r, i_, from_b.data(), s, p.data());
      multiply(lora(kDownA), r, i_, z_.data(), 1, low.data());
      add_outer(from_b.data(), r, z_.data(), i_, s * w, gradient(grads, kDownA));
      add_outer(dy, h_, low.data(), r, s * w, gradient(grads, kDownB));
    }
    double dw = 0;
    Doubles dgate(size(i_));
    Doubles dup(size(i_));
    for (std::size_t n = 0; n < p.size(); ++n) {
      const double sig = sigmoid(gate_[n]);
      dw += p[n] * z_[n];
      dgate[n] = gate_passes_[n] * w * p[n] * up_[n] * sig * (1 + gate_[n] * (1 - sig));
      dup[n] = up_passes_[n] * w * p[n] * gate_[n] * sig;
    }
    half_backward(layer_.gate, kGateA, kGateB, gate_low_, dgate, dx, grads);
    half_backward(layer_.up, up_a(), kUpB, up_low_, dup, dx, grads);
    return dw;
  }

 private:
  static std::size_t size(std::int64_t n) { return static_cast<std::size_t>(n); }
  Tensor up_a() const { return layer_.lora.shared_a ? kGateA : kUpA; }
  const double* matrix(const Doubles& m, std::int64_t rows, std::int64_t cols) const {
    return m.data() + expert_ * rows * cols;
  }
  std::int64_t lora_offset(Tensor tensor) const {
    return expert_ * layer_.lora_rows(tensor) * layer_.lora_cols(tensor);
  }
  const double* lora(Tensor tensor) const { return layer_.lora.tensors[tensor].data() + lora_offset(tensor); }
  double* gradient(LoraTensors& grads, Tensor tensor) const { return grads[tensor].data() + lora_offset(tensor); }

  void clamp(std::size_t n) {
    gate_passes_[n] = gate_[n] <= layer_.limit ? 1 : 0;
    up_passes_[n] = std::abs(up_[n]) <= layer_.limit ? 1 : 0;
    gate_[n] = std::min(gate_[n], layer_.limit);
    up_[n] = std::clamp(up_[n], -layer_.limit, layer_.limit);
  }

  // G or U; `low` is X·Aᵀ.
  Doubles half(const Doubles& weight, Tensor a, Tensor b, Doubles& low) const {
    Doubles out(size(i_));
    multiply(matrix(weight, i_, h_), i_, h_, x_, 1, out.data());
    if (const std::int64_t r = layer_.lora.gate_up_r; r > 0) {
      low.resize(size(r));
      multiply(lora(a), r, h_, x_, 1, low.data());
      multiply(lora(b), i_, r, low.data(), layer_.lora.gate_up_scaling, out.data());
    }
    return out;
  }

  void half_backward(const Doubles& weight, Tensor a, Tensor b, const Doubles& low, const Doubles& grad, double* dx,
                     LoraTensors& grads) const {
    multiply_transposed(matrix(weight, i_, h_), i_, h_, grad.data(), 1, dx);
    const std::int64_t r = layer_.lora.gate_up_r;
    if (r == 0) return;
    const double s = layer_.lora.gate_up_scaling;
    Doubles from_b(size(r));
    multiply_transposed(lora(b), i_, r, grad.data(), 1, from_b.data());
    multiply_transposed(lora(a), r, h_, from_b.data(), s, dx);
    add_outer(from_b.data(), r, x_, h_, s, gradient(grads, a));
    add_outer(grad.data(), i_, low.data(), r, s, gradient(grads, b));
  }

  const ReferenceLayer& layer_;
  std::int64_t expert_;
  const double* x_;
  std::int64_t h_;
  std::int64_t i_;
  Doubles gate_low_;
  Doubles up_low_;
  Doubles gate_;
  Doubles up_;
  Doubles z_;
  Doubles gate_passes_, up_passes_;  // 1, or 0 where the clamp holds the value.
};

// Calls visit(token, slot, route) for every slot with a real expert.
template <class Visit>
void for_each_route(const ReferenceLayer& layer, const ReferenceBatch& batch, const Visit& visit) {
  for (std::int64_t token = 0; token < batch.num_tokens; ++token) {
    for (std::int64_t j = 0; j < layer.top_k; ++j) {
      const std::int64_t slot = token * layer.top_k + j;
      const std::int32_t expert = batch.ids[static_cast<std::size_t>(slot)];
      if (expert == layer.num_experts) continue;
      visit(token, static_cast<std::size_t>(slot), Route(layer, expert, batch.x.data() + token * layer.hidden));
    }
  }
}

}  // namespace

std::int64_t ReferenceLayer::lora_rows(std::size_t tensor) const {
  switch (tensor) {
    case kGateA:
      return lora.gate_up_r;
    case kUpA:
      return lora.shared_a ? 0 : lora.gate_up_r;
    case kGateB:
    case kUpB:
      return lora.gate_up_r > 0 ? intermediate : 0;
    case kDownA:
      return lora.down_r;
    default:
      return lora.down_r > 0 ? hidden : 0;
  }
}

std::int64_t ReferenceLayer::lora_cols(std::size_t tensor) const {
  if (lora_rows(tensor) == 0) return 0;
  switch (tensor) {
    case kGateA:
    case kUpA:
      return hidden;
    case kGateB:
    case kUpB:
      return lora.gate_up_r;
    case kDownA:
      return intermediate;
    default:
      return lora.down_r;
  }
}

Doubles reference_forward(const ReferenceLayer& layer, const ReferenceBatch& batch) {
  Doubles y(static_cast<std::size_t>(batch.num_tokens * layer.hidden));
  for_each_route(layer, batch, [&](std::int64_t token, std::size_t slot, const Route& route) {
    const Doubles d = route.output();
    double* to = y.data() + token * layer.hidden;
    for (std::size_t n = 0; n < d.size(); ++n) to[n] += static_cast<double>(batch.weights[slot]) * d[n];
  });
  return y;
}

ReferenceGradients reference_backward(const ReferenceLayer& layer, const ReferenceBatch& batch, const Doubles& dy) {
  ReferenceGradients grads;
  grads.dx.resize(static_cast<std::size_t>(batch.num_tokens * layer.hidden));
  grads.dw.resize(static_cast<std::size_t>(batch.num_tokens * layer.top_k));
  for (std::size_t tensor = 0; tensor < kNumLoraTensors; ++tensor) {
    const std::int64_t size = layer.num_experts * layer.lora_rows(tensor) * layer.lora_cols(tensor);
    grads.lora[tensor].resize(static_cast<std::size_t>(size));
  }
  for_each_route(layer, batch, [&](std::int64_t token, std::size_t slot, const Route& route) {
    grads.dw[slot] = route.backward(static_cast<double>(batch.weights[slot]), dy.data() + token * layer.hidden,
                                    grads.dx.data() + token * layer.hidden, grads.lora);
  });
  return grads;
}

double relative_l2(const Doubles& got, const Doubles& want) {
  if (got.size() != want.size()) return std::numeric_limits<double>::infinity();
  double error = 0;
  double norm = 0;
  for (std::size_t n = 0; n < want.size(); ++n) {
    error += (got[n] - want[n]) * (got[n] - want[n]);
    norm += want[n] * want[n];
  }
  return norm > 0 ? std::sqrt(error / norm) : std::sqrt(error);
}

void reference_step(const ReferenceAdamw& hyper, const Doubles& grad, Doubles& param, ReferenceMoments& moments) {
  moments.m.resize(param.size());
  moments.v.resize(param.size());
  const auto t = static_cast<double>(++moments.t);
  for (std::size_t n = 0; n < param.size(); ++n) {
    double g = grad[n];
    if (hyper.decoupled) {
      param[n] *= 1 - hyper.lr * hyper.weight_decay;
    } else {
      g += hyper.weight_decay * param[n];
    }
    moments.m[n] = hyper.beta1 * moments.m[n] + (1 - hyper.beta1) * g;
    moments.v[n] = hyper.beta2 * moments.v[n] + (1 - hyper.beta2) * g * g;
    const double m_hat = moments.m[n] / (1 - std::pow(hyper.beta1, t));
    const double v_hat = moments.v[n] / (1 - std::pow(hyper.beta2, t));
    param[n] -= hyper.lr * m_hat / (std::sqrt(v_hat) + hyper.eps);
  }
}

}  // namespace kt::test
