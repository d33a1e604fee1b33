// Executes one decoded AMX instruction on the tiles of the calling thread and the registers of a signal frame.
#pragma once
#include "tests/support/isa/amx_tiles.h"
#include "tests/support/isa/evex_instruction.h"
#include "tests/support/isa/vector_registers.h"

namespace kt::test {

// nullptr: done, and the instruction pointer stands behind it. Else why it cannot be executed; nothing has changed
// then.
const char* execute_amx(const Instruction& instruction, VectorRegisters& registers);

// The tiles of the calling thread.
const AmxTiles& this_threads_tiles();

// Says that the process asked for tiles, or takes it back: without, every AMX instruction is refused, as by hardware.
// A kernel without AMX refuses arch_prctl, so that nobody can ask it.
void permit_tiles(bool permitted);

}  // namespace kt::test
