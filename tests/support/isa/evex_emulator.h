// Runs the compiled avx512 table on a CPU without AVX-512: a SIGILL handler decodes and executes the instructions that
// trap, and those that follow directly, on the registers of vector_registers.h. Nothing is patched; all code in between
// runs on the CPU itself, which must have AVX2 and FMA.
//
//   table code   vpbroadcastd (%rdx), %zmm4      SIGILL -> decode, execute, advance
//                vdpbf16ps %zmm4, %zmm3, %zmm8             (same trap)
//                add $4, %rdx                    runs natively, until the next EVEX or opmask instruction
//
// Strict: an instruction outside the list, an operand that hardware would refuse, a changed rounding mode end the
// process with the address, the bytes and the reason.
#pragma once
#include <cstdint>

namespace kt::test {

struct EmulatorCounts {
  std::uint64_t traps;
  std::uint64_t instructions;
  std::uint64_t dots;  // VDPBF16PS among them
};

// Installs the handler for the process, once. False: this CPU lacks AVX2 or FMA, or its signal frames have no AVX
// state.
bool install_evex_emulator();

// Since the start of the process, all threads.
EmulatorCounts evex_emulator_counts();

}  // namespace kt::test
