// torch.ops.kt_coproc.experts and its backward, registered when the module is imported.
#pragma once
#include <cstdint>

namespace kt::python {

// `mode` of the op. kKeep is internal: autograd's own choice for mode 0.
enum Mode : std::int64_t { kAuto = 0, kRecord = 1, kReplay = 2, kKeep = 3 };

}  // namespace kt::python
