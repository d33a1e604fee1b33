// The stages of backward, in order. P is never stored: it goes through the activation group by group.
#pragma once
#include "coproc/experts/stage.h"

namespace kt::coproc {

StageList backward_stages(const Pass& pass);

}  // namespace kt::coproc
