// The stages of forward, in order; backward begins with some of them where it computes G and U again.
#pragma once
#include "coproc/experts/stage.h"

namespace kt::coproc {

StageList forward_stages(const Pass& pass);

// Backward's list has these too. `keep`: where gate_up writes G and U, kKept or kGateUp.
Stage gather_x_stage(const Pass& pass);
Stage gate_up_stage(Operand keep);
Stage project_z_stage();

}  // namespace kt::coproc
