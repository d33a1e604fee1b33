// What the generic kernels need from an instruction set, in AVX-512.
#pragma once
#include <immintrin.h>

#include "kernels/generic/types.inl"

namespace kt::kernels::KT_TABLE {
namespace {

// c + a·b, rounded once.
inline F32 multiply_add(F32 a, F32 b, F32 c) { return _mm512_fmadd_ps(a, b, c); }

inline F32 square_root(F32 x) { return _mm512_sqrt_ps(x); }

inline U32 widen(U16 x) { return __builtin_bit_cast(U32, _mm512_cvtepu16_epi32(__builtin_bit_cast(__m256i, x))); }

// The low halves of the lanes, which must be below 2^16.
inline U16 narrow(U32 x) { return __builtin_bit_cast(U16, _mm512_cvtepi32_epi16(__builtin_bit_cast(__m512i, x))); }

inline F32 from_bytes(I8 x) { return _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(__builtin_bit_cast(__m128i, x))); }

// Bits 4·number … 4·number + 3 of each lane, in two's complement: looked up, the bits above do not count.
inline F32 from_nibbles(U32 units, int number) {
  const F32 integers = {0, 1, 2, 3, 4, 5, 6, 7, -8, -7, -6, -5, -4, -3, -2, -1};
  return _mm512_permutexvar_ps(__builtin_bit_cast(__m512i, units >> (4 * number)), integers);
}

// a, then b, each to the nearest bf16; none may be half-way between two.
inline __m512bh nearest(F32 a, F32 b) { return _mm512_cvtne2ps_pbh(b, a); }
inline void store_nearest(std::uint16_t* out, F32 a, F32 b) {
  const __m512bh both = nearest(a, b);
  __builtin_memcpy(out, &both, sizeof both);
}

}  // namespace
}  // namespace kt::kernels::KT_TABLE
