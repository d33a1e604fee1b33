// The vector, mask and general registers of one thread on a CPU without AVX-512, as its signal frames and a shadow give
// them together.
//
//              511            256 255          128 127            0
//   zmm0-15    [ shadow          | frame YMM_Hi128 | frame XMM     ]   the CPU has these halves: VEX code may use them
//   zmm16-31   [ shadow                                            ]   between two traps
//   k0-7       [ shadow ]
//
// INVARIANTS
//   V1 A VEX instruction zeroes the upper half of the register it writes. It does not trap; that it ran is seen from a
//   low
//      half that differs from what the last trap left. (One that writes the very bits that were there goes unseen.
//      Stale upper halves then give wrong results, which a test reports: the mistake is loud.)
//   V2 The shadow belongs to the thread, like the registers.
#pragma once
#include <ucontext.h>

#include <cstdint>
#include <cstring>

namespace kt::test {

struct alignas(64) Zmm {
  std::uint8_t bytes[64];

  template <typename T>
  T get(int lane) const {
    T value;
    std::memcpy(&value, bytes + static_cast<std::size_t>(lane) * sizeof(T), sizeof(T));
    return value;
  }
  template <typename T>
  void set(int lane, T value) {
    std::memcpy(bytes + static_cast<std::size_t>(lane) * sizeof(T), &value, sizeof(T));
  }
};

class VectorRegisters {
 public:
  // Takes over what the code did since the last trap (V1). nullptr instead of registers: the frame holds no AVX state.
  static bool frame_is_usable(const ucontext_t& context);
  explicit VectorRegisters(ucontext_t* context);
  // Gives the low halves back to the frame.
  ~VectorRegisters();
  VectorRegisters(const VectorRegisters&) = delete;
  VectorRegisters& operator=(const VectorRegisters&) = delete;

  Zmm& zmm(int r);
  std::uint64_t& k(int r);
  std::uint64_t gpr(int r) const;
  void set_gpr(int r, std::uint64_t value);
  std::uint64_t ip() const;
  void set_ip(std::uint64_t ip);

 private:
  ucontext_t* context_;
};

}  // namespace kt::test
