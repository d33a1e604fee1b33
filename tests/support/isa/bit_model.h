// The bit model of each table's dot instruction: what one element of C is, to the last bit.
//
//   scalar   for each k ascending:           acc = round(acc + round(a·b))
//   avx512   for each pair of k ascending:   acc = fma(a odd, b odd, acc), then fma(a even, b even, acc): VDPBF16PS
//   rounds
//            to nearest even, takes subnormals as zero (DAZ), gives them as zero (FTZ), and ignores MXCSR.
//            (Intel Instruction Set Reference, VDPBF16PS, operation section.)
#pragma once
#include <cstdint>

#include "kernels/kernel_table.h"

namespace kt::test {

// One element of C: acc reduced over k of the k elements (of the table's type) at a and b.
float dot_model(const kernels::KernelTable& table, float acc, const void* a, const void* b, std::int64_t k);

// acc + left·right as lora_wgrad adds one token: two roundings on scalar, one on tables with fused instructions.
float multiply_add_model(const kernels::KernelTable& table, float left, float right, float acc);

// The value of bf16 bits, and the nearest bf16 of a float (ties to even, NaN quiet), by comparing distances.
float from_bf16(std::uint16_t bits);
std::uint16_t to_bf16(float value);

// Equal bits, or both NaN: which NaN comes out of two is not part of any model.
bool same_bits(float a, float b);

}  // namespace kt::test
