// The experts of one layer in double, loop by loop from ARCHITECTURE.md: what every implementation is compared with.
//
// Knows nothing of the product's code. All matrices are dense and row-major; the LoRA tensors are numbered as on the
// wire: gate_a, gate_b, up_a, up_b, down_a, down_b. With shared_a the up half uses gate_a and up_a is empty.
#pragma once
#include <array>
#include <cstdint>
#include <vector>

namespace kt::test {

using Doubles = std::vector<double>;
inline constexpr std::size_t kNumLoraTensors = 6;
using LoraTensors = std::array<Doubles, kNumLoraTensors>;  // Each [E, rows, cols], or empty.

struct ReferenceLora {
  std::int64_t gate_up_r = 0;  // 0: not adapted.
  double gate_up_scaling = 0;
  bool shared_a = false;
  std::int64_t down_r = 0;
  double down_scaling = 0;
  LoraTensors tensors;
};

struct ReferenceLayer {
  // Rows and columns of a LoRA tensor; 0 × 0 when it does not exist.
  std::int64_t lora_rows(std::size_t tensor) const;
  std::int64_t lora_cols(std::size_t tensor) const;

  std::int64_t num_experts = 0;
  std::int64_t top_k = 0;
  std::int64_t hidden = 0;
  std::int64_t intermediate = 0;
  double limit = 0;  // Gate at most limit, up within ±limit, before SwiGLU; 0: none.
  Doubles gate;      // [E, I, H]
  Doubles up;        // [E, I, H]
  Doubles down;      // [E, H, I]
  ReferenceLora lora;
};

struct ReferenceBatch {
  std::int64_t num_tokens = 0;
  Doubles x;                      // [T, H]
  std::vector<std::int32_t> ids;  // [T, top_k]; num_experts: contributes zero.
  std::vector<float> weights;     // [T, top_k]
};

struct ReferenceGradients {
  Doubles dx;        // [T, H]
  Doubles dw;        // [T, top_k]
  LoraTensors lora;  // Of this batch alone.
};

Doubles reference_forward(const ReferenceLayer& layer, const ReferenceBatch& batch);
ReferenceGradients reference_backward(const ReferenceLayer& layer, const ReferenceBatch& batch, const Doubles& dy);

// ‖got - want‖ / ‖want‖; the norm of `got` itself when want is all zero. Infinite when the sizes differ.
double relative_l2(const Doubles& got, const Doubles& want);

// torch.optim.AdamW (decoupled) or Adam with L2, in double.
struct ReferenceAdamw {
  double lr = 0;
  double beta1 = 0;
  double beta2 = 0;
  double eps = 0;
  double weight_decay = 0;
  bool decoupled = true;
};
struct ReferenceMoments {
  Doubles m;
  Doubles v;
  std::int64_t t = 0;
};
void reference_step(const ReferenceAdamw& hyper, const Doubles& grad, Doubles& param, ReferenceMoments& moments);

}  // namespace kt::test
