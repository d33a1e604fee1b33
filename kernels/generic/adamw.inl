// AdamW steps.
#pragma once
#include "kernels/generic/vector.inl"
#include "kernels/kernel_table.h"

namespace kt::kernels::KT_TABLE {
namespace {

// The order of operations is that of torch.optim._functional's single-tensor path, operand by operand.
void adamw(float* p, float* m, float* v, const float* s, std::int64_t n, const AdamwArgs& args) {
  const bool lerp_from_start = args.one_minus_beta1 < 0.5f;  // torch.lerp works from the nearer end
  for_vectors(n, [&](std::int64_t i, std::int64_t count) {
    const F32 param = load(p + i, count) * args.decay;
    const F32 grad = load(s + i, count) * args.grad_scale + args.l2 * param;
    const F32 old_m = load(m + i, count);
    const F32 new_m = lerp_from_start ? old_m + args.one_minus_beta1 * (grad - old_m)
                                      : grad - (grad - old_m) * (1.0f - args.one_minus_beta1);
    const F32 new_v = load(v + i, count) * args.beta2 + args.one_minus_beta2 * grad * grad;
    const F32 denominator = square_root(new_v) / args.bias_correction2_sqrt + args.eps;
    store(p + i, param + (-args.step_size * new_m) / denominator, count);
    store(m + i, new_m, count);
    store(v + i, new_v, count);
  });
}

}  // namespace
}  // namespace kt::kernels::KT_TABLE
