// Arithmetic as VDPBF16PS and TDPBF16PS do it whatever MXCSR says: to nearest, subnormals taken and given as zero.
#pragma once
#include <immintrin.h>

namespace kt::test {

class FlushToZero {
 public:
  FlushToZero() : before_(_mm_getcsr()) {
    constexpr unsigned kFlushing = 0x9fc0;  // FTZ, DAZ, all exceptions masked, round to nearest
    _mm_setcsr(kFlushing);
    keep_order();
  }
  ~FlushToZero() {
    keep_order();
    _mm_setcsr(before_);
  }
  FlushToZero(const FlushToZero&) = delete;
  FlushToZero& operator=(const FlushToZero&) = delete;

 private:
  // Operands must be loaded behind the first change of MXCSR and results stored before the second: the compiler does
  // not know that arithmetic depends on it.
  static void keep_order() { __asm__ volatile("" ::: "memory"); }

  unsigned before_;
};

}  // namespace kt::test
