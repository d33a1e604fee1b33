// gemm and transpose_panels for any processor: acc = acc + a·b, each operation rounded to fp32, k ascending. Far slower
// than memory, so nothing is fetched ahead.
#pragma once
#include "kernels/generic/continued_gemm.inl"
#include "kernels/generic/panel.inl"
#include "kernels/generic/vector.inl"

namespace kt::kernels::KT_TABLE {
namespace {

// Register block: kRowsMax rows × kColumns columns, 8 accumulators of the 16 registers of a baseline x86-64.
constexpr std::int64_t kRowsMax = 4;
constexpr std::int64_t kDepthMultiple = 16;  // KernelTable::k_multiple
constexpr std::int64_t kColumns = 2 * kLanes;
constexpr std::int64_t kBlockK = 256;  // k at a time: the widened rows of A, 16 KiB, share L1 with a slice of the panel

// kElementsPerUnit steps of k for one group of columns: `unit` points at its 4-byte units in the panel.
template <std::int64_t R>
inline void multiply_unit(const F32* a, const std::uint32_t* unit, Vectors<2 * R>& acc) {
  for (std::int64_t half = 0; half < 2; ++half) {
    const U32 bits = load_u32(unit + half * kLanes);
    if constexpr (kElementsPerUnit == 1) {
      for (std::int64_t r = 0; r < R; ++r) acc[2 * r + half] = multiply_add(a[r], as_f32(bits), acc[2 * r + half]);
    } else {
      const F32 even = as_f32(bits << 16);
      const F32 odd = as_f32(bits & 0xffff0000u);
      for (std::int64_t r = 0; r < R; ++r) acc[2 * r + half] = multiply_add(a[r], even, acc[2 * r + half]);
      for (std::int64_t r = 0; r < R; ++r) acc[2 * r + half] = multiply_add(a[R + r], odd, acc[2 * r + half]);
    }
  }
}

// R rows of A, widened and one vector per element, times 32 columns of one panel from k on.
template <std::int64_t R>
void multiply_panel(const F32* a, const std::uint32_t* panel, std::int64_t num_units, float* c, std::int64_t ldc,
                    bool accumulate) {
  for (std::int64_t column = 0; column < kPanelRows; column += kColumns) {
    Vectors<2 * R> acc;
    if (accumulate) {
      for (std::int64_t r = 0; r < R; ++r)
        for (std::int64_t half = 0; half < 2; ++half) acc[2 * r + half] = load(c + r * ldc + column + half * kLanes);
    }
    for (std::int64_t u = 0; u < num_units; ++u)
      multiply_unit<R>(a + u * kElementsPerUnit * R, panel + u * kPanelRows + column, acc);
    for (std::int64_t r = 0; r < R; ++r)
      for (std::int64_t half = 0; half < 2; ++half) store(c + r * ldc + column + half * kLanes, acc[2 * r + half]);
  }
}

// R rows of C. Between blocks of k the accumulators rest in C: storing a float does not round it.
template <std::int64_t R>
void multiply_rows(const Element* a, std::int64_t lda, const Panels& w, float* c, std::int64_t ldc, bool accumulate) {
  F32 widened[static_cast<std::size_t>(kBlockK * R)];
  for (std::int64_t k = 0; k < w.k; k += kBlockK) {
    const std::int64_t count = w.k - k < kBlockK ? w.k - k : kBlockK;
    for (std::int64_t r = 0; r < R; ++r)
      for (std::int64_t i = 0; i < count; ++i) widened[i * R + r] = splat(to_f32(a[r * lda + k + i]));
    for (std::int64_t panel = 0; panel < w.num_panels; ++panel) {
      const std::byte* units = w.data + panel * w.stride + k * kPanelRows * static_cast<std::int64_t>(sizeof(Element));
      multiply_panel<R>(widened, static_cast<const std::uint32_t*>(static_cast<const void*>(units)),
                        count / kElementsPerUnit, c + panel * kPanelRows, ldc, accumulate || k > 0);
    }
  }
}

void multiply_all(const void* a, std::int64_t lda, std::int64_t m, const Panels& w, float* c, std::int64_t ldc,
                  bool accumulate, const Fetch&) {
  const Element* in = static_cast<const Element*>(a);
  std::int64_t row = 0;
  for (; row + kRowsMax <= m; row += kRowsMax)
    multiply_rows<kRowsMax>(in + row * lda, lda, w, c + row * ldc, ldc, accumulate);
  for (; row < m; ++row) multiply_rows<1>(in + row * lda, lda, w, c + row * ldc, ldc, accumulate);
}

constexpr auto gemm = continued_gemm<multiply_all>;

// Rows 32·panel … of w, columns 32q …: a 32 × 32 block of bf16, pairs of columns to pairs of rows.
inline void transpose_block(const std::uint32_t* in, std::uint32_t* out, std::uint16_t) {
  for (std::int64_t row_pair = 0; row_pair < kPanelRows / 2; ++row_pair) {
    for (std::int64_t column_pair = 0; column_pair < kPanelRows / 2; ++column_pair) {
      const std::uint32_t first = in[column_pair * kPanelRows + 2 * row_pair];
      const std::uint32_t second = in[column_pair * kPanelRows + 2 * row_pair + 1];
      out[row_pair * kPanelRows + 2 * column_pair] = (first & 0xffffu) | second << 16;
      out[row_pair * kPanelRows + 2 * column_pair + 1] = first >> 16 | (second & 0xffff0000u);
    }
  }
}

inline void transpose_block(const std::uint32_t* in, std::uint32_t* out, float) {
  for (std::int64_t row = 0; row < kPanelRows; ++row)
    for (std::int64_t column = 0; column < kPanelRows; ++column)
      out[row * kPanelRows + column] = in[column * kPanelRows + row];
}

void transpose_panels(const Panels& w, std::int64_t q, std::int64_t count, void* out, std::int64_t out_stride,
                      const Fetch&) {
  for (std::int64_t panel = 0; panel < w.num_panels; ++panel) {
    for (std::int64_t column = 0; column < count; ++column) {
      const std::byte* in = w.data + panel * w.stride + (q + column) * kBlockBytes;
      std::byte* to = static_cast<std::byte*>(out) + column * out_stride + panel * kBlockBytes;
      transpose_block(static_cast<const std::uint32_t*>(static_cast<const void*>(in)),
                      static_cast<std::uint32_t*>(static_cast<void*>(to)), Element{});
    }
  }
}

}  // namespace
}  // namespace kt::kernels::KT_TABLE
