// What the EVEX instructions that compute make of their lanes.
#pragma once
#include <cstdint>

#include "tests/support/isa/evex_instruction.h"
#include "tests/support/isa/vector_registers.h"

namespace kt::test {

// a = second operand, b = rm, old = the destination before. in.op: kAdd to kFma213.
std::uint32_t compute_lane(const Instruction& in, std::uint32_t a, std::uint32_t b, std::uint32_t old);

// The sixteen first predicates of VCMPPS; the others differ from them in exceptions only.
bool compare(unsigned predicate, float a, float b);

// acc + a·b of all 16 pairs in the processor's own fused instructions, rounding and flushing as VDPBF16PS does whatever
// MXCSR says. Independent of bit_model.cpp on purpose.
void dot(const Zmm& a, const Zmm& b, Zmm* acc);

// The bf16 of a float as VCVTNE2PS2BF16 has it whatever MXCSR says: ties to even, subnormals zero, NaN quiet.
std::uint16_t nearest_bf16(std::uint32_t bits);

}  // namespace kt::test
