// Quantised weights as kernels/formats defines them, one number at a time, in arithmetic of its own: what the kernels'
// codes, scales and dequantised weights are compared with.
#pragma once
#include <cstddef>
#include <cstdint>
#include <span>
#include <string_view>
#include <vector>

namespace kt::test {

struct QuantReference {
  std::vector<std::int32_t> codes;  // [n, k]
  std::vector<float> scales;        // [n, ⌈k / group⌉]
  std::vector<float> weights;       // [n, k]: what is computed with, each exact in bf16
};

// What the tests know of a format.
struct FormatReference {
  std::string_view name;
  // rows: [n, k].
  QuantReference (*quantise)(const std::vector<float>& rows, std::int64_t n, std::int64_t k, std::int64_t group);
  // From the bytes of a group in a panel: the code of one row at column k of the group, and the row's scale.
  std::int32_t (*code)(const std::byte* group, std::int64_t row, std::int64_t k);
  float (*scale)(const std::byte* group, std::int64_t row);
  // The relative L2 error that a layer of normal weights may have against the weights before quantisation.
  double forward_error;
  double backward_error;
  double memory_ratio;  // How many times the memory bf16 takes, at least.
};

// One for each quantised format.
std::span<const FormatReference> format_references();
// Ends the process when there is none of that name.
const FormatReference& format_reference(std::string_view name);

// The bf16 nearest to x, of two equally near the even one.
float nearest_bf16(double x);

QuantReference quantise_int8(const std::vector<float>& rows, std::int64_t n, std::int64_t k, std::int64_t group);
QuantReference quantise_int4(const std::vector<float>& rows, std::int64_t n, std::int64_t k, std::int64_t group);
std::int32_t int8_code(const std::byte* group, std::int64_t row, std::int64_t k);
std::int32_t int4_code(const std::byte* group, std::int64_t row, std::int64_t k);
float integer_scale(const std::byte* group, std::int64_t row);

// What an E4M3 code stands for: code 127 and 255 are NaN.
double fp8_value(std::int32_t code);
QuantReference quantise_fp8(const std::vector<float>& rows, std::int64_t n, std::int64_t k, std::int64_t group);
std::int32_t fp8_code(const std::byte* group, std::int64_t row, std::int64_t k);
float fp8_scale(const std::byte* group, std::int64_t row);

}  // namespace kt::test
