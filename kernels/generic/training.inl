// Gradients of the LoRA matrices and their AdamW step. No include guard: see kernels/README.md.
namespace {

constexpr std::int64_t kWgradRows = 8;      // Of the gradient: accumulators in flight cover the latency of an addition.
constexpr std::int64_t kWgradTokens = 256;  // Summed before they are added to the gradient: 8 KiB of scaled `left`.
constexpr std::int64_t kWgradVectors = kLanes == 16 ? 2 : 1;  // Of columns; more do not fit in the registers.

struct WgradArgs {
  const Element* right;
  std::int64_t ldr;
  std::int64_t m;
  float scale;
  float* grad;
  std::int64_t ldg;
};

// Lanes of two vectors in turn, a first; from the lower halves, or from the upper ones.
template <bool kUpper>
inline F32 zip(F32 a, F32 b) {
  U32 lanes;
  for (int i = 0; i < kLanes; ++i)
    lanes[i] = static_cast<std::uint32_t>(i / 2 + i % 2 * kLanes + (kUpper ? kLanes / 2 : 0));
  return __builtin_shuffle(a, b, lanes);
}

// Eight rows of kLanes columns become kLanes rows of eight, one after the other: three times two streams into one.
void transpose_rows(const F32* rows, F32* out) {
  F32 stage[kWgradRows];
  const F32* in = rows;
  for (std::int64_t streams = kWgradRows / 2; streams > 0; streams /= 2) {
    F32 next[kWgradRows];
    const std::int64_t length = kWgradRows / 2 / streams;  // Vectors of a stream before it is zipped.
    for (std::int64_t s = 0; s < streams; ++s) {
      for (std::int64_t v = 0; v < length; ++v) {
        const F32 first = in[s * length + v];
        const F32 second = in[(s + streams) * length + v];
        next[(s * length + v) * 2] = zip<false>(first, second);
        next[(s * length + v) * 2 + 1] = zip<true>(first, second);
      }
    }
    __builtin_memcpy(stage, next, sizeof stage);
    in = stage;
  }
  __builtin_memcpy(out, stage, sizeof stage);
}

// kWgradRows floats.
using GradientRow = float __attribute__((vector_size(4 * kWgradRows)));

// Adds rows [row, row + rows) of columns [column, column + count) of the gradient, `added`, to what is there.
template <bool kTransposed>
void add_to_gradient(const WgradArgs& args, const F32* added, std::int64_t row, std::int64_t rows, std::int64_t column,
                     std::int64_t count) {
  if constexpr (!kTransposed) {
    for (std::int64_t r = 0; r < rows; ++r) {
      float* grad = args.grad + (row + r) * args.ldg + column;
      store(grad, load(grad, count) + added[r], count);
    }
    return;
  }
  float flat[kLanes * kWgradRows];
  F32 vectors[kWgradRows];
  transpose_rows(added, vectors);
  __builtin_memcpy(flat, vectors, sizeof flat);
  for (std::int64_t c = 0; c < count; ++c) {
    float* grad = args.grad + (column + c) * args.ldg + row;
    const std::size_t bytes = static_cast<std::size_t>(rows) * sizeof(float);
    GradientRow more;
    GradientRow sum = {};
    __builtin_memcpy(&more, flat + c * kWgradRows, sizeof more);
    if (rows == kWgradRows) {
      __builtin_memcpy(&sum, grad, sizeof sum);
      sum += more;
      __builtin_memcpy(grad, &sum, sizeof sum);
    } else {
      __builtin_memcpy(&sum, grad, bytes);
      sum += more;
      __builtin_memcpy(grad, &sum, bytes);
    }
  }
}

// V vectors of columns, of which the last one may have fewer lanes: all m in registers. left: [m, kWgradRows], scaled.
template <std::int64_t V, bool kTransposed>
void wgrad_block(const WgradArgs& args, const float* left, std::int64_t row, std::int64_t rows, std::int64_t column,
                 std::int64_t count) {
  Vectors<V * kWgradRows> sum;
  for (std::int64_t token = 0; token < args.m; ++token) {
    const Element* from = args.right + token * args.ldr + column;
    F32 right[static_cast<std::size_t>(V)];
    for (std::int64_t v = 0; v < V; ++v) right[v] = V == 1 ? load(from, count) : load(from + v * kLanes);
    for (std::int64_t r = 0; r < kWgradRows; ++r) {
      const F32 factor = splat(left[token * kWgradRows + r]);
      for (std::int64_t v = 0; v < V; ++v)
        sum[v * kWgradRows + r] = multiply_add(factor, right[v], sum[v * kWgradRows + r]);
    }
  }
  for (std::int64_t v = 0; v < V; ++v) {
    F32 added[kWgradRows];
    for (std::int64_t r = 0; r < kWgradRows; ++r) added[r] = sum[v * kWgradRows + r] * args.scale;
    add_to_gradient<kTransposed>(args, added, row, rows, column + v * kLanes, V == 1 ? count : kLanes);
  }
}

// One block of kWgradRows rows and at most kWgradTokens tokens. left: [tokens, kWgradRows], scaled.
template <bool kTransposed>
void wgrad_rows(const WgradArgs& args, const float* left, std::int64_t row, std::int64_t rows, std::int64_t n) {
  constexpr std::int64_t kBlockColumns = kWgradVectors * kLanes;
  std::int64_t column = 0;
  for (; column + kBlockColumns <= n; column += kBlockColumns)
    wgrad_block<kWgradVectors, kTransposed>(args, left, row, rows, column, kLanes);
  for (; column < n; column += kLanes)
    wgrad_block<1, kTransposed>(args, left, row, rows, column, n - column < kLanes ? n - column : kLanes);
}

void lora_wgrad(const float* left, std::int64_t ldl, const void* right, std::int64_t ldr, const float* row_scale,
                std::int64_t m, std::int64_t r, std::int64_t n, float scale, float* grad, std::int64_t ldg,
                bool transposed) {
  const auto multiply = transposed ? wgrad_rows<true> : wgrad_rows<false>;
  float scaled[kWgradTokens * kWgradRows];
  for (std::int64_t first = 0; first < m; first += kWgradTokens) {
    const std::int64_t tokens = m - first < kWgradTokens ? m - first : kWgradTokens;
    const WgradArgs args = {static_cast<const Element*>(right) + first * ldr, ldr, tokens, scale, grad, ldg};
    for (std::int64_t row = 0; row < r; row += kWgradRows) {
      const std::int64_t rows = r - row < kWgradRows ? r - row : kWgradRows;
      for (std::int64_t token = 0; token < tokens; ++token) {
        const float token_scale = row_scale == nullptr ? 1.0f : row_scale[first + token];
        for (std::int64_t i = 0; i < kWgradRows; ++i)
          scaled[token * kWgradRows + i] = i < rows ? left[(first + token) * ldl + row + i] * token_scale : 0.0f;
      }
      multiply(args, scaled, row, rows, n);
    }
  }
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
