// Gradients of the LoRA matrices and their AdamW step. No include guard: see kernels/README.md.
namespace {

struct WgradArgs {
  const float* left;
  std::int64_t ldl;
  const Element* right;
  std::int64_t ldr;
  const float* row_scale;
  std::int64_t m;
  float scale;
  float* grad;
  std::int64_t ldg;
  bool transposed;
};

// Rows [row, row + R) and columns [column, column + count) of the gradient: R vectors summed over all m in registers.
template <std::int64_t R>
void wgrad_block(const WgradArgs& args, std::int64_t row, std::int64_t column, std::int64_t count) {
  Vectors<R> sum;
  for (std::int64_t token = 0; token < args.m; ++token) {
    const F32 right = load(args.right + token * args.ldr + column, count);
    const float token_scale = args.row_scale == nullptr ? 1.0f : args.row_scale[token];
    for (std::int64_t r = 0; r < R; ++r)
      sum[r] = multiply_add(splat(args.left[token * args.ldl + row + r] * token_scale), right, sum[r]);
  }
  for (std::int64_t r = 0; r < R; ++r) {
    const F32 added = sum[r] * args.scale;
    if (!args.transposed) {
      float* grad = args.grad + (row + r) * args.ldg + column;
      store(grad, load(grad, count) + added, count);
      continue;
    }
    float lanes[kLanes];
    store(lanes, added);
    for (std::int64_t c = 0; c < count; ++c) args.grad[(column + c) * args.ldg + row + r] += lanes[c];
  }
}

void lora_wgrad(const float* left, std::int64_t ldl, const void* right, std::int64_t ldr, const float* row_scale,
                std::int64_t m, std::int64_t r, std::int64_t n, float scale, float* grad, std::int64_t ldg,
                bool transposed) {
  constexpr std::int64_t kRows = 8;  // accumulators in flight: covers the latency of an addition
  const WgradArgs args = {left, ldl,       static_cast<const Element*>(right), ldr, row_scale, m, scale, grad,
                          ldg,  transposed};
  for_vectors(n, [&](std::int64_t column, std::int64_t count) {
    std::int64_t row = 0;
    for (; row + kRows <= r; row += kRows) wgrad_block<kRows>(args, row, column, count);
    for (; row < r; ++row) wgrad_block<1>(args, row, column, count);
  });
}

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
