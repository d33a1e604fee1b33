// Gradients of LoRA's matrices: products by gemm in which k is the tokens.
#pragma once
#include "kernels/generic/panel.inl"
#include "kernels/generic/vector.inl"
#include KT_GEMM

namespace kt::kernels::KT_TABLE {
namespace {

constexpr std::int64_t kWgradTokens = 128;  // of a product: k
constexpr std::int64_t kWgradRows = 64;     // of the gradient: m
constexpr std::int64_t kWgradPanels = 2;    // of 32 columns of the gradient: n
constexpr std::int64_t kWgradColumns = kWgradPanels * kPanelRows;
constexpr std::int64_t kTransposedRows = 8;

struct WgradArgs {
  const Element* right;
  std::int64_t ldr;
  std::int64_t panel_step;
  std::int64_t tokens;
  std::int64_t k;  // tokens, and zeros up to what gemm takes
  float* grad;
  std::int64_t ldg;
};

// out[row][token], kWgradTokens apart.
void scale_left(const float* left, std::int64_t ldl, const float* row_scale, std::int64_t tokens, std::int64_t k,
                std::int64_t rows, float scale, Element* out) {
  Element scaled[kWgradRows] = {};
  for (std::int64_t token = 0; token < k; ++token) {
    if (token < tokens) {
      const float factor = row_scale == nullptr ? scale : scale * row_scale[token];
      for_vectors(rows, [&](std::int64_t i, std::int64_t count) {
        store(scaled + i, load(left + token * ldl + i, count) * factor, count);
      });
    } else {
      __builtin_memset(scaled, 0, sizeof scaled);
    }
    for (std::int64_t row = 0; row < rows; ++row) out[row * kWgradTokens + token] = scaled[row];
  }
}

// Two tokens' 32 columns side by side: a unit of the panel for each column. One token's, of fp32.
inline void pack_tokens(const std::uint16_t* first, const std::uint16_t* second, std::uint32_t* units) {
  for (std::int64_t i = 0; i < kPanelRows; i += kLanes) {
    U16 low;
    U16 high;
    __builtin_memcpy(&low, first + i, sizeof low);
    __builtin_memcpy(&high, second + i, sizeof high);
    const U32 pair = widen(low) | widen(high) << 16;
    __builtin_memcpy(units + i, &pair, sizeof pair);
  }
}
inline void pack_tokens(const float* first, const float*, std::uint32_t* units) {
  __builtin_memcpy(units, first, kPanelRows * sizeof(float));
}

// One panel of right, `count` columns of it, zeros behind.
void pack_right(const WgradArgs& args, std::int64_t panel, std::int64_t count, std::uint32_t* units) {
  const Element* from = args.right + panel * args.panel_step;
  const Element zeros[kPanelRows] = {};
  Element padded[2][kPanelRows] = {};
  for (std::int64_t token = 0; token < args.k; token += kElementsPerUnit) {
    const Element* rows[2] = {zeros, zeros};
    for (std::int64_t t = 0; t < kElementsPerUnit && token + t < args.tokens; ++t) {
      rows[t] = from + (token + t) * args.ldr;
      if (count == kPanelRows) continue;
      __builtin_memcpy(padded[t], rows[t], static_cast<std::size_t>(count) * sizeof(Element));
      rows[t] = padded[t];
    }
    pack_tokens(rows[0], rows[1], units);
    units += kPanelRows;
  }
}

// Lanes of two vectors in turn, a first; from the lower halves, or from the upper ones.
template <bool kUpper>
inline F32 zip(F32 a, F32 b) {
  constexpr auto kFrom = [](int lane) { return lane / 2 + lane % 2 * kLanes + (kUpper ? kLanes / 2 : 0); };
  return shuffle(a, b, kFrom);
}

// Eight rows of kLanes columns become kLanes rows of eight, one after the other: three times two streams into one.
inline void transpose_rows(const F32* rows, F32* out) {
  F32 stage[kTransposedRows];
  const F32* in = rows;
  for (std::int64_t streams = kTransposedRows / 2; streams > 0; streams /= 2) {
    F32 next[kTransposedRows];
    const std::int64_t length = kTransposedRows / 2 / streams;  // Vectors of a stream before it is zipped.
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

// Of up to kTransposedRows floats.
inline void add_row(const float* from, std::int64_t count, float* to) {
  using Row = float __attribute__((vector_size(4 * kTransposedRows)));
  Row more;
  Row sum = {};
  __builtin_memcpy(&more, from, sizeof more);
  if (count == kTransposedRows) {
    __builtin_memcpy(&sum, to, sizeof sum);
    sum += more;
    __builtin_memcpy(to, &sum, sizeof sum);
    return;
  }
  const std::size_t bytes = static_cast<std::size_t>(count) * sizeof(float);
  __builtin_memcpy(&sum, to, bytes);
  sum += more;
  __builtin_memcpy(to, &sum, bytes);
}

// Adds `count` columns of a tile [rows, kWgradColumns] to the gradient.
void add_rows(const float* tile, std::int64_t rows, std::int64_t count, float* grad, std::int64_t ldg) {
  for (std::int64_t row = 0; row < rows; ++row) {
    for_vectors(count, [&](std::int64_t i, std::int64_t n) {
      float* to = grad + row * ldg + i;
      store(to, load(to, n) + load(tile + row * kWgradColumns + i), n);
    });
  }
}

// Adds `count` columns of a tile [rows, kWgradColumns] to the transposed gradient.
void add_transposed(const float* tile, std::int64_t rows, std::int64_t count, float* grad, std::int64_t ldg) {
  for (std::int64_t row = 0; row < rows; row += kTransposedRows) {
    const std::int64_t rows_here = rows - row < kTransposedRows ? rows - row : kTransposedRows;
    for (std::int64_t column = 0; column < count; column += kLanes) {
      F32 vectors[kTransposedRows] = {};
      for (std::int64_t r = 0; r < rows_here; ++r) vectors[r] = load(tile + (row + r) * kWgradColumns + column);
      F32 turned[kTransposedRows];
      transpose_rows(vectors, turned);
      float flat[kLanes * kTransposedRows];
      __builtin_memcpy(flat, turned, sizeof flat);
      const std::int64_t columns_here = count - column < kLanes ? count - column : kLanes;
      for (std::int64_t c = 0; c < columns_here; ++c)
        add_row(flat + c * kTransposedRows, rows_here, grad + (column + c) * ldg + row);
    }
  }
}

// The gradient two steps ahead of `grad`: nothing has touched it since the last batch.
Fetch gradient_ahead(const float* grad, std::int64_t ldg, std::int64_t rows, bool transposed) {
  constexpr std::int64_t kFloatBytes = sizeof(float);
  const float* ahead = grad + 2 * kWgradColumns * (transposed ? ldg : 1);
  const auto* data = static_cast<const std::byte*>(static_cast<const void*>(ahead));
  if (!transposed) return {data, kWgradColumns * kFloatBytes, ldg * kFloatBytes, rows};
  if (rows == ldg) return {data, kWgradColumns * rows * kFloatBytes, 0, 1};
  return {data, (rows * kFloatBytes + kLineBytes - 1) / kLineBytes * kLineBytes, ldg * kFloatBytes, kWgradColumns};
}

// Rows of the gradient from `left`, kWgradTokens apart, all columns; or of the transposed gradient.
void multiply_wgrad(const WgradArgs& args, const Element* left, std::int64_t rows, std::int64_t n, bool transposed) {
  constexpr std::int64_t kStride = panel_stride_bytes(kWgradTokens, sizeof(Element));
  alignas(64) std::byte panels[kWgradPanels * kStride];
  alignas(64) float tile[kWgradRows * kWgradColumns];
  for (std::int64_t column = 0; column < n; column += kWgradColumns) {
    const std::int64_t count = n - column < kWgradColumns ? n - column : kWgradColumns;
    const std::int64_t num_panels = (count + kPanelRows - 1) / kPanelRows;
    for (std::int64_t panel = 0; panel < num_panels; ++panel) {
      const std::int64_t left_over = count - panel * kPanelRows;
      pack_right(args, column / kPanelRows + panel, left_over < kPanelRows ? left_over : kPanelRows,
                 static_cast<std::uint32_t*>(static_cast<void*>(panels + panel * kStride)));
    }
    const Panels w = {panels, kStride, num_panels, args.k};
    float* grad = args.grad + column * (transposed ? args.ldg : 1);
    const bool is_last = n - column < 3 * kWgradColumns;
    gemm(left, kWgradTokens, rows, w, tile, kWgradColumns, false,
         is_last ? Fetch{} : gradient_ahead(grad, args.ldg, rows, transposed));
    (transposed ? add_transposed : add_rows)(tile, rows, count, grad, args.ldg);
  }
}

void lora_wgrad(const LoraWgradArgs& args) {
  alignas(64) Element scaled[kWgradRows * kWgradTokens];
  for (std::int64_t token = 0; token < args.m; token += kWgradTokens) {
    const std::int64_t tokens = args.m - token < kWgradTokens ? args.m - token : kWgradTokens;
    const std::int64_t k = (tokens + kDepthMultiple - 1) / kDepthMultiple * kDepthMultiple;
    const float* token_scale = args.row_scale == nullptr ? nullptr : args.row_scale + token;
    const Element* right = static_cast<const Element*>(args.right) + token * args.ld_right;
    for (std::int64_t row = 0; row < args.r; row += kWgradRows) {
      const std::int64_t rows = args.r - row < kWgradRows ? args.r - row : kWgradRows;
      scale_left(args.left + token * args.ld_left + row, args.ld_left, token_scale, tokens, k, rows, args.scale,
                 scaled);
      multiply_wgrad({right, args.ld_right, args.panel_step, tokens, k,
                      args.grad + row * (args.transposed ? 1 : args.ld_grad), args.ld_grad},
                     scaled, rows, args.n, args.transposed);
    }
  }
}

}  // namespace
}  // namespace kt::kernels::KT_TABLE
