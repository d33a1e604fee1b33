// Loads and stores of vectors, and the exponential, out of the types of types.inl and the primitives of each
// instruction set (multiply_add, square_root, widen, narrow).
//
// Written with the compiler's vector types and compiled with -ffp-contract=off: an operator is one rounded IEEE
// operation, so every function here gives the same bits on every table.
#pragma once
#include "kernels/generic/types.inl"
#if KT_LANES == 16
#include "kernels/avx512/primitives.inl"
#elif KT_LANES == 8
#include "kernels/avx2/primitives.inl"
#else
#include "kernels/scalar/primitives.inl"
#endif

namespace kt::kernels::KT_TABLE {
namespace {

inline U32 load_u32(const void* p) {
  U32 v;
  __builtin_memcpy(&v, p, sizeof v);
  return v;
}

inline F32 load(const float* p) {
  F32 v;
  __builtin_memcpy(&v, p, sizeof v);
  return v;
}

// Lane i is number from(i) of the lanes of a, then those of b. `from` is a constant: a lambda without captures.
template <typename From>
inline F32 shuffle(F32 a, F32 b, From from) {
#if KT_LANES == 16
  return __builtin_shufflevector(a, b, from(0), from(1), from(2), from(3), from(4), from(5), from(6), from(7), from(8),
                                 from(9), from(10), from(11), from(12), from(13), from(14), from(15));
#elif KT_LANES == 8
  return __builtin_shufflevector(a, b, from(0), from(1), from(2), from(3), from(4), from(5), from(6), from(7));
#else
  return __builtin_shufflevector(a, b, from(0), from(1), from(2), from(3));
#endif
}

// Lanes kFirst, kFirst, kFirst + 1, kFirst + 1, … of x.
template <int kFirst>
inline F32 each_twice(F32 x) {
  return shuffle(x, x, [](int lane) { return kFirst + lane / 2; });
}

inline void store(float* p, F32 v) { __builtin_memcpy(p, &v, sizeof v); }

// bf16 is the upper half of a float.
inline F32 load(const std::uint16_t* p) {
  U16 v;
  __builtin_memcpy(&v, p, sizeof v);
  return as_f32(widen(v) << 16);
}

// Rounds to nearest, ties to even; a NaN stays one, made quiet so that truncation cannot turn it into infinity.
inline void store(std::uint16_t* p, F32 v) {
  const U32 bits = as_u32(v);
  const U32 rounded = bits + 0x7fff + ((bits >> 16) & 1);
  const U32 chosen = (v != v) ? (bits | 0x400000) : rounded;
  const U16 out = narrow(chosen >> 16);
  __builtin_memcpy(p, &out, sizeof out);
}

inline float to_f32(float x) { return x; }
inline float to_f32(std::uint16_t x) { return __builtin_bit_cast(float, std::uint32_t{x} << 16); }

// The first `count` ≤ kLanes elements; lanes behind them are zero and are not written.
template <typename T>
inline F32 load(const T* p, std::int64_t count) {
  if (count == kLanes) return load(p);
  T padded[kLanes] = {};
  __builtin_memcpy(padded, p, static_cast<std::size_t>(count) * sizeof(T));
  return load(padded);
}

template <typename T>
inline void store(T* p, F32 v, std::int64_t count) {
  if (count == kLanes) return store(p, v);
  T padded[kLanes];
  store(padded, v);
  __builtin_memcpy(p, padded, static_cast<std::size_t>(count) * sizeof(T));
}

// Calls body(first, count) for each vector of [0, n); only the last one may have count < kLanes.
template <typename Body>
inline void for_vectors(std::int64_t n, Body body) {
  std::int64_t i = 0;
  for (; i + kLanes <= n; i += kLanes) body(i, std::int64_t{kLanes});
  if (i < n) body(i, n - i);
}

// e^x within 2 ulp over the whole range: x = n·ln 2 + r, |r| ≤ ln 2 / 2, the polynomial of Cephes' expf on r, then two
// scalings by powers of two so that the result may become infinite or subnormal without an intermediate that does.
inline F32 exp(F32 x) {
  constexpr float kMagic = 12582912.0f;  // 1.5·2^23: adding it rounds to an integer, held in the low mantissa bits.
  x = x > 89.0f ? splat(89.0f) : x;      // exp(89) is above the largest float, exp(-104) rounds to zero.
  x = x < -104.0f ? splat(-104.0f) : x;
  const F32 shifted = x * 1.44269504088896341f + kMagic;
  const F32 n = shifted - kMagic;
  const F32 r = (x - n * 0.693359375f) - n * -2.12194440e-4f;
  F32 p = r * 1.9875691500e-4f + 1.3981999507e-3f;
  p = p * r + 8.3334519073e-3f;
  p = p * r + 4.1665795894e-2f;
  p = p * r + 1.6666665459e-1f;
  p = p * r + 5.0000001201e-1f;
  p = p * (r * r) + r + 1.0f;
  const U32 exponent = as_u32(shifted) - __builtin_bit_cast(std::uint32_t, kMagic) + 254;  // n + 2·127, never negative
  const U32 half = exponent >> 1;
  return p * as_f32(half << 23) * as_f32((exponent - half) << 23);
}

inline F32 sigmoid(F32 x) { return 1.0f / (1.0f + exp(-x)); }

}  // namespace
}  // namespace kt::kernels::KT_TABLE
