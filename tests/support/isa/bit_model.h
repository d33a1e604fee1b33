// The bit model of each table's dot instruction: what one element of C is, to the last bit.
//
//   scalar   for each k ascending:           acc = round(acc + round(a·b))
//   avx2     for each k ascending:           acc = fma(a, b, acc)
//   avx512   for each pair of k ascending:   acc = fma(a odd, b odd, acc), then fma(a even, b even, acc): VDPBF16PS
//   amx      for each 32 of k ascending:     acc = acc + (even + odd), each a chain of fma over 16 k from +0: TDPBF16PS
//
// VDPBF16PS and TDPBF16PS round to nearest even, take subnormals as zero (DAZ), give them as zero (FTZ), and ignore
// MXCSR. (Intel Instruction Set Reference, operation sections.)
#pragma once
#include <cstdint>

#include "kernels/kernel_table.h"

namespace kt::test {

// One element of C: acc reduced over k of the k elements (of the table's type) at a and b.
float dot_model(const kernels::KernelTable& table, float acc, const void* a, const void* b, std::int64_t k);

// One element of one TDPBF16PS: c and `pairs` pairs of k of its row of A and its column of B.
float tdpbf16ps_model(float c, const std::uint16_t* a, const std::uint16_t* b, std::int64_t pairs);

// The value of bf16 bits, and the nearest bf16 of a float (ties to even, NaN quiet), by comparing distances.
float from_bf16(std::uint16_t bits);
std::uint16_t to_bf16(float value);

// Equal bits, or both NaN: which NaN comes out of two is not part of any model.
bool same_bits(float a, float b);

}  // namespace kt::test
