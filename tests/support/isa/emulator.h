// Runs the compiled avx512 and amx tables on a CPU without AVX-512 or AMX: a SIGILL handler decodes and executes the
// instructions that trap, and those that follow directly, on the registers of vector_registers.h and the tiles of
// amx_tiles.h. Nothing is patched; all code in between runs on the CPU itself, which must have AVX2 and FMA.
//
//   table code   tileloadd (%rdx,%rax,1), %tmm4    SIGILL -> decode, execute, advance
//                tdpbf16ps %tmm6, %tmm4, %tmm0               (same trap)
//                add $64, %rdx                     runs natively, until the next AMX, EVEX or opmask instruction
//
// On a CPU with AVX-512 but without AMX only the tiles are emulated.
//
// Strict: an instruction outside the lists, an operand that hardware would refuse, tiles without permission, a changed
// rounding mode end the process with the address, the bytes and the reason.
#pragma once
#include <cstdint>
#include <optional>

#include "tests/support/isa/evex_instruction.h"

namespace kt::test {

struct EmulatorCounts {
  std::uint64_t traps;
  std::uint64_t instructions;
  std::uint64_t vector_dots;  // VDPBF16PS among them
  std::uint64_t tile_dots;    // TDPBF16PS among them
};

// Installs the handler for the process, once. False: this CPU lacks AVX2 or FMA, or its signal frames have no AVX
// state.
bool install_emulator();

// AVX-512 registers are the emulator's: not where the CPU has some AVX-512 of its own, whose registers it does not
// read.
bool emulates_avx512();

// Any instruction that the emulator knows; nullopt: none. Reads at most 15 bytes.
std::optional<Instruction> decode_instruction(const std::uint8_t* code);

// Since the start of the process, all threads.
EmulatorCounts emulator_counts();

}  // namespace kt::test
