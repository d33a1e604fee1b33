// Decodes the AMX instructions that the compiled amx table contains, and nothing else.
//
//   C4 [R X B 00010] [0 vvvv 0 pp] opcode ModRM [SIB] [disp8 | disp32]        (R X B vvvv inverted; map 0F38, W0, L0)
//
//   49  NP /0 m512  ldtilecfg         4B  F2 /r  tileloadd  tmm, [base + stride · index]   (a SIB byte is mandatory)
//       NP C0       tilerelease           F3 /r  tilestored
//       F2 /r       tilezero tmm      5C  F3 /r  tdpbf16ps tmm.reg, A = tmm.rm, B = tmm.vvvv
#pragma once
#include "tests/support/isa/evex_instruction.h"

namespace kt::test {

// nullopt: not an instruction of the list. Reads at most 15 bytes.
std::optional<Instruction> decode_amx(const std::uint8_t* code);

}  // namespace kt::test
