// Quantised weights as kernel_table.h defines them, one number at a time, in arithmetic of its own: what the kernels'
// integers, scales and dequantised weights are compared with.
#pragma once
#include <cstdint>
#include <vector>

namespace kt::test {

struct QuantReference {
  std::vector<std::int32_t> integers;  // [n, k]
  std::vector<float> scales;           // [n, ⌈k / group⌉]
  std::vector<float> weights;          // [n, k]: what is computed with, each exact in bf16
};

// rows: [n, k]. bits: 8 or 4.
QuantReference quant_reference(const std::vector<float>& rows, std::int64_t n, std::int64_t k, std::int32_t bits,
                               std::int32_t group);

}  // namespace kt::test
