// The kernel interface: one table of function pointers per instruction set and element type.
//
// Packed weights. A matrix W[N,K] (N = output rows, both multiples of 32) is kept once, as N/32 panels:
//   bf16: panel p = [K/2][32][2]: for each pair of k, the 32 rows' two elements side by side (two zmm, or two AMX B
//         tiles, per 128-byte line);
//   fp32: panel p = [K][32].
// Panel p starts at p · panel_stride bytes: its size plus 576 (power-of-two strides alias in L1 and L2).
// Gate and up of one expert are one matrix of 2I rows with their panels interleaved: panel 2i = gate rows 32i…, panel
// 2i+1 = up rows 32i…. Every [m, 2I] array (gate_up, its gradient) has its columns in that order: 32 gate, 32 up, …
//
// Quantised weights: a panel of 32 rows is its groups of `group` columns of k one after the other (the last one has
// what is left of K). A group is its scales, then codes of all rows, k by k; which, and what they mean, is each
// format's own (kernels/formats). A weight is a bf16, in both directions: dequantise writes such panels, which gemm and
// transpose_panels take like any other.
//
// One reduction order per table: an element of C is reduced over k ascending, in the same order for every m, every
// number of panels and every position in them, also when k comes in several calls of which all but the first
// accumulate. Backward makes panels of Wᵀ in scratch (transpose_panels) and calls the same gemm. "element" is bf16
// (std::uint16_t bits) or float, by element_bytes; all accumulation is fp32.
#pragma once
#include <cstddef>
#include <cstdint>
#include <span>
#include <string>
#include <string_view>

#include "shm/base/activation.h"

namespace kt::kernels {

inline constexpr std::int64_t kPanelRows = 32;
inline constexpr std::int64_t kPanelPadBytes = 576;

// Bytes from one panel to the next of a matrix with k columns.
constexpr std::int64_t panel_stride_bytes(std::int64_t k, std::int64_t element_bytes) {
  return k * kPanelRows * element_bytes + kPanelPadBytes;
}

// A view of packed panels; `stride` is in bytes and may be a multiple of the natural one (every second panel).
struct Panels {
  const std::byte* data = nullptr;
  std::int64_t stride = 0;
  std::int64_t num_panels = 0;  // N / 32
  std::int64_t k = 0;           // a multiple of 32; gemm takes multiples of KernelTable::k_multiple
  // For gemm: as many panels with which k goes on, as do the rows of A; null: none. LoRA's depth behind the weights'.
  const Panels* more = nullptr;
  // For gemm: how many rows of the last panel are not zero. A table may spare itself the products of the others.
  std::int64_t last_rows = kPanelRows;
};

// Memory that the caller reads next: `count` blocks of block_bytes (a multiple of 64), the first at `data`, `stride`
// bytes apart. A kernel brings them towards L2 while it computes, a little at a time. What comes next after a pair of
// panels is the next pair ({data, k·64, stride, 2} in bf16); after a column of blocks, the column beside or below it.
struct Fetch {
  const std::byte* data = nullptr;
  std::int64_t block_bytes = 0;
  std::int64_t stride = 0;
  std::int64_t count = 0;
};

inline constexpr std::int64_t kQuantGroupMax = 128;

// Where the bytes of quantised panels are.
struct QuantLayout {
  std::int64_t group = kQuantGroupMax;  // Columns of k: 32, 64 or 128.
  std::int64_t scale_bytes = 0;         // Of a group, before its codes: a multiple of 64.
  std::int64_t k_bytes = 0;             // Codes of one k of all 32 rows: 32, 16 or 8.

  // Bytes from the start of a panel to column k, a multiple of 32; to the scales where a group begins.
  constexpr std::int64_t offset(std::int64_t k) const {
    return k / group * (scale_bytes + group * k_bytes) + (k % group == 0 ? 0 : scale_bytes + k % group * k_bytes);
  }
  // Bytes from one panel of k columns to the next.
  constexpr std::int64_t panel_stride(std::int64_t k) const {
    return (k + group - 1) / group * scale_bytes + k * k_bytes + kPanelPadBytes;
  }
};

// A view of quantised panels, like Panels.
struct QuantPanels {
  const std::byte* data = nullptr;
  std::int64_t stride = 0;
  std::int64_t num_panels = 0;
  std::int64_t k = 0;
  QuantLayout layout;
};

// A matrix to be packed.
struct PackArgs {
  const void* rows = nullptr;  // [n, k] elements
  std::int64_t ld = 0;
  std::int64_t n = 0;
  std::int64_t k = 0;
  std::int64_t k_padded = 0;    // The panels' k; columns from k are zero.
  std::int64_t num_panels = 0;  // Rows from n to 32·num_panels are zero.
  void* panels = nullptr;
  std::int64_t stride = 0;  // Bytes from one panel to the next.
};

// What a table of bf16 elements computes with panels of one storage format.
struct QuantKernels {
  std::string_view format;  // Its name in kernels/formats.h.
  QuantLayout layout;       // Of the format; the kernels take panels of shorter groups too.

  void (*quantise)(const PackArgs& args, const QuantLayout& layout);

  // Columns [k_begin, k_begin + k_count) of all panels of w, multiples of 32, as panels of elements of k_count columns,
  // out_stride bytes apart and without pad.
  void (*dequantise)(const QuantPanels& w, std::int64_t k_begin, std::int64_t k_count, void* out,
                     std::int64_t out_stride);

  // C = A · Wᵀ straight from the codes, for few rows: the same bits as dequantise, then KernelTable::gemm. It may read
  // the first line of a panel's pad, and fetch what lies behind the panels instead of `next`.
  void (*gemm)(const void* a, std::int64_t lda, std::int64_t m, const QuantPanels& w, float* c, std::int64_t ldc,
               const Fetch& next);
  std::int64_t gemm_rows_max;  // Up to so many rows that is faster; 0: never.
};

// Scalars of one AdamW step of one parameter, computed in double as torch's single-tensor path does:
//   decoupled: p *= 1 - lr·weight_decay; else g += weight_decay·p
//   m += (g - m)(1 - beta1);  v = beta2·v + (1 - beta2)·g²;  p -= step_size · m / (sqrt(v)/bias_correction2_sqrt + eps)
struct AdamwArgs {
  float grad_scale;  // g = grad_scale · s
  float decay;       // decoupled: 1 - lr·weight_decay, else 1
  float l2;          // decoupled: 0, else weight_decay
  float one_minus_beta1;
  float beta2;
  float one_minus_beta2;
  float step_size;  // lr / (1 - beta1^t)
  float bias_correction2_sqrt;
  float eps;
};

// Arrays are row by row, a row ld_… behind the one before it, counted in what the array holds. n: a multiple of 32,
// if nothing else is said.
struct ActivateArgs {
  Activation activation = {};      // f
  std::int64_t m = 0;              // rows
  std::int64_t n = 0;              // columns of z
  const float* gate_up = nullptr;  // [m, 2·n], interleaved
  std::int64_t ld_gate_up = 0;
  void* saved = nullptr;  // [any, 2·n] elements, interleaved: round(gate_up). null: not kept.
  std::int64_t ld_saved = 0;
  const std::int32_t* saved_row = nullptr;  // [m]: the row of `saved` for each of m; null: 0, 1, …
  void* z = nullptr;                        // [m, n] elements: round(f(gate, up))
  std::int64_t ld_z = 0;
};

struct ActivateBackwardArgs {
  Activation activation = {};
  std::int64_t m = 0;
  std::int64_t n = 0;
  const void* saved = nullptr;  // [any, 2·n] elements, interleaved
  std::int64_t ld_saved = 0;
  const std::int32_t* saved_row = nullptr;  // [m]: the row of `saved` for each of m; null: 0, 1, …
  const float* p = nullptr;                 // [m, n]: ∂y/∂z before weighting
  std::int64_t ld_p = 0;
  const float* weight = nullptr;  // [m]: ∂L/∂z = weight·p
  float* grad_weight = nullptr;   // [n/32, m]: Σ p·z over each 32 columns, in a fixed order; the caller adds them up
  std::int64_t ld_grad_weight = 0;
  void* z = nullptr;  // [m, n] elements: round(f(gate, up)). null: not wanted.
  std::int64_t ld_z = 0;
  void* grad_gate_up = nullptr;  // [m, 2·n] elements, interleaved: ∂L/∂gate, ∂L/∂up, rounded; may be `saved` itself
  std::int64_t ld_grad = 0;
};

struct LoraWgradArgs {
  const float* left = nullptr;  // [m, r]; counts as round(scale · left · row_scale) in elements
  std::int64_t ld_left = 0;
  const void* right = nullptr;  // [m, n] elements; columns 32p … 32p + 31 begin at p · panel_step
  std::int64_t ld_right = 0;
  std::int64_t panel_step = 0;
  const float* row_scale = nullptr;  // [m]; null: 1
  float scale = 1;
  std::int64_t m = 0;  // tokens
  std::int64_t r = 0;
  std::int64_t n = 0;     // of any size
  float* grad = nullptr;  // [r, n], or transposed [n, r]
  std::int64_t ld_grad = 0;
  bool transposed = false;
};

struct SumRoutesArgs {
  const void* rows = nullptr;  // [any, n] elements
  std::int64_t ld_rows = 0;
  const std::int32_t* route_row = nullptr;  // [num_tokens, top_k]: a row of `rows`; -1 adds nothing
  const float* weight = nullptr;            // [num_tokens, top_k]; null: 1
  std::int64_t num_tokens = 0;
  std::int64_t top_k = 0;
  std::int64_t n = 0;    // of any size
  float* sum = nullptr;  // [num_tokens, n]
  std::int64_t ld_sum = 0;
};

struct KernelTable {
  std::string_view name;   // "amx", "avx512", "avx2", "scalar": also the value of --kernels.
  std::uint32_t required;  // CpuFeature bits this table needs.
  std::int64_t element_bytes;
  std::int64_t k_multiple;  // What the k of gemm's panels is a multiple of: 32, or less where LoRA's depth may be.
  std::int64_t l2_bytes;    // L2 of a core of the smallest CPU that runs this table.

  // Of each quantised format, in the order of their list. None in tables of fp32 elements.
  std::span<const QuantKernels> formats;

  // Packs rows into panels of elements.
  void (*pack)(const PackArgs& args);

  // Panels q … q + count - 1 of Wᵀ, out_stride bytes apart and without pad: the 32 rows of panel q are columns 32q …
  // 32q + 31 of w, its k is 32·w.num_panels. `next` is fetched on the way.
  void (*transpose_panels)(const Panels& w, std::int64_t q, std::int64_t count, void* out, std::int64_t out_stride,
                           const Fetch& next);

  // C[m, 32·panels.num_panels] f32 (ldc) = or += A[m, k] elements (lda) · Wᵀ, and of `more` behind it. m ≥ 0. While it
  // multiplies its last panels it fetches `next`, before that its own next panels; or, with few rows and a `next`, what
  // lies behind the panels in memory.
  void (*gemm)(const void* a, std::int64_t lda, std::int64_t m, const Panels& w, float* c, std::int64_t ldc,
               bool accumulate, const Fetch& next);

  // out[m, n] elements (ldo) = round(scale · in[m, n] f32 (ldi)).
  void (*round_rows)(const float* in, std::int64_t ldi, std::int64_t m, std::int64_t n, float scale, void* out,
                     std::int64_t ldo);

  // out[i, 0…n_padded) = x[row[i], 0…n) with zeros behind. Elements.
  void (*gather)(const void* x, std::int64_t ldx, const std::int32_t* row, std::int64_t m, std::int64_t n,
                 std::int64_t n_padded, void* out, std::int64_t ldo);

  // z = f(gate, up), element by element, and a rounded copy of gate and up for backward.
  void (*activate)(const ActivateArgs& args);

  // From gate and up, and p = ∂y/∂z before weighting: the gradients of gate, up and the routing weight.
  void (*activate_backward)(const ActivateBackwardArgs& args);

  // grad += leftᵀ · right, by gemm whose k is the tokens: the sum of each 128 of them, ascending, is added to grad.
  void (*lora_wgrad)(const LoraWgradArgs& args);

  // sum[t] = Σ_j weight[t, j] · rows[route_row[t, j]] over j ascending.
  void (*sum_routes)(const SumRoutesArgs& args);

  // One AdamW step over n parameters: p, m, v f32 in place, s f32 the summed gradient.
  void (*adamw)(float* p, float* m, float* v, const float* s, std::int64_t n, const AdamwArgs& args);
};

// Every table in the binary, best first, runnable here or not. For tests.
std::span<const KernelTable* const> all_tables();

// The best runnable table for that element size, or the one called `name` ("" and "auto": the best). nullptr when
// there is none; `why` (may be null) then says which CPU features are missing, or which names exist.
const KernelTable* find_table(std::string_view name, std::int64_t element_bytes, std::string* why);

}  // namespace kt::kernels
