// What the generic kernels need from an instruction set, in portable C++.
#pragma once
#include "kernels/generic/types.inl"

namespace kt::kernels::KT_TABLE {
namespace {

// c + a·b, each rounded.
inline F32 multiply_add(F32 a, F32 b, F32 c) { return c + a * b; }

inline F32 square_root(F32 x) {
  for (int lane = 0; lane < kLanes; ++lane) x[lane] = __builtin_sqrtf(x[lane]);
  return x;
}

inline U32 widen(U16 x) { return __builtin_convertvector(x, U32); }

// The low halves of the lanes, which must be below 2^16.
inline U16 narrow(U32 x) { return __builtin_convertvector(x, U16); }

inline F32 from_bytes(I8 x) { return __builtin_convertvector(x, F32); }

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
