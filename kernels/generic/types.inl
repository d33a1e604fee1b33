// The vector types of an instruction set: kLanes floats, or as many unsigned integers.
#pragma once
#include <cstddef>
#include <cstdint>

#include "kernels/generic/target.inl"

namespace kt::kernels::KT_TABLE {
namespace {

constexpr int kLanes = KT_LANES;

using F32 = float __attribute__((vector_size(4 * kLanes)));
using U32 = std::uint32_t __attribute__((vector_size(4 * kLanes)));
using I32 = std::int32_t __attribute__((vector_size(4 * kLanes)));
using I8 = std::int8_t __attribute__((vector_size(kLanes)));
using U16 = std::uint16_t __attribute__((vector_size(2 * kLanes)));

// N vectors that the compiler keeps in registers.
template <std::int64_t N>
struct Vectors {
  F32 value[static_cast<std::size_t>(N)] = {};
  F32& operator[](std::int64_t i) { return value[i]; }
};

inline F32 splat(float x) { return F32{} + x; }
inline F32 as_f32(U32 x) { return __builtin_bit_cast(F32, x); }
inline U32 as_u32(F32 x) { return __builtin_bit_cast(U32, x); }

}  // namespace
}  // namespace kt::kernels::KT_TABLE
