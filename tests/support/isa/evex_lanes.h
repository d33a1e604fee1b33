// What the EVEX instructions that work lane by lane make of one 32-bit lane.
#pragma once
#include <cstdint>

#include "tests/support/isa/evex_instruction.h"

namespace kt::test {

// a = second operand, b = rm, old = the destination before. in.op: kAdd to kFma213.
std::uint32_t compute_lane(const Instruction& in, std::uint32_t a, std::uint32_t b, std::uint32_t old);

// The sixteen first predicates of VCMPPS; the others differ from them in exceptions only.
bool compare(unsigned predicate, float a, float b);

}  // namespace kt::test
