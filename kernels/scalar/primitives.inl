// What the generic kernels need from an instruction set, in portable C++. No include guard: see kernels/README.md.
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

}  // namespace
