// Executes one decoded EVEX or opmask instruction on the registers of a signal frame and its shadow.
#pragma once
#include "tests/support/isa/evex_instruction.h"
#include "tests/support/isa/vector_registers.h"

namespace kt::test {

// nullptr: done, and the instruction pointer stands behind it. Else why it cannot be executed; nothing has changed
// then.
const char* execute_evex(const Instruction& instruction, VectorRegisters& registers);

}  // namespace kt::test
