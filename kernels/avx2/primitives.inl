// What the generic kernels need from an instruction set, in AVX2 and FMA.
#pragma once
#include <immintrin.h>

#include "kernels/generic/types.inl"

namespace kt::kernels::KT_TABLE {
namespace {

// c + a·b, rounded once.
inline F32 multiply_add(F32 a, F32 b, F32 c) { return _mm256_fmadd_ps(a, b, c); }

inline F32 square_root(F32 x) { return _mm256_sqrt_ps(x); }

inline U32 widen(U16 x) { return __builtin_bit_cast(U32, _mm256_cvtepu16_epi32(__builtin_bit_cast(__m128i, x))); }

// The low halves of the lanes, which must be below 2^16.
inline U16 narrow(U32 x) {
  const __m256i bits = __builtin_bit_cast(__m256i, x);
  return __builtin_bit_cast(U16, _mm_packus_epi32(_mm256_castsi256_si128(bits), _mm256_extracti128_si256(bits, 1)));
}

inline F32 from_bytes(I8 x) { return _mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(_mm_loadu_si64(&x))); }

// Bits 4·number … 4·number + 3 of each lane, in two's complement.
inline F32 from_nibbles(U32 units, int number) {
  return __builtin_convertvector(__builtin_bit_cast(I32, units << (28 - 4 * number)) >> 28, F32);
}

// a, then b, each to the nearest bf16; none may be half-way between two.
inline void store_nearest(std::uint16_t* out, F32 a, F32 b) {
  const U16 low = narrow((__builtin_bit_cast(U32, a) + 0x8000u) >> 16);
  const U16 high = narrow((__builtin_bit_cast(U32, b) + 0x8000u) >> 16);
  __builtin_memcpy(out, &low, sizeof low);
  __builtin_memcpy(out + kLanes, &high, sizeof high);
}

}  // namespace
}  // namespace kt::kernels::KT_TABLE
