// What one forward or backward moves beyond L2, stage by stage (DESIGN §7). Nothing is measured: shapes, routing and
// number of workers decide, so the account is the same on every machine and says what a larger one would wait for.
//
// Rules of the account
//   T1  The weights of an expert with routes are read once per stage that multiplies by them.
//   T2  An array that lives from one stage to the next is written once, beyond L2, and read from there.
//   T3  A stage whose tasks take the same rows again, for other panels, reads them once per worker if all the expert's
//       rows fit in L2 beside a task's weights, else once per pass. gemm itself reads its rows once.
//   T4  What a task writes and reads again stays in L2 if it fits there beside what it is multiplied by.
//   T5  LoRA's packed matrices are read once per task that multiplies by them; gradient sums are read and written.
// Lines that a store fetches first, indices, and routing weights are left out.
#pragma once
#include <cstdint>
#include <string_view>
#include <vector>

namespace kt::coproc {

// The smallest L2 these tables run on: 512 KiB per core on Zen 3; 1 MiB on Zen 4 and 5, 2 MiB where AMX is.
inline constexpr std::int64_t kL2Bytes = 524288;

struct Traffic {
  struct Stage {
    std::int64_t bytes() const { return weight_bytes + activation_bytes + lora_bytes; }
    std::string_view name;
    std::int64_t weight_bytes = 0;
    std::int64_t activation_bytes = 0;  // Rows of tokens and routes, LoRA's narrow ones included.
    std::int64_t lora_bytes = 0;        // LoRA parameters and gradient sums.
  };

  Stage total() const {
    Stage sum{.name = "total"};
    for (const Stage& stage : stages) {
      sum.weight_bytes += stage.weight_bytes;
      sum.activation_bytes += stage.activation_bytes;
      sum.lora_bytes += stage.lora_bytes;
    }
    return sum;
  }

  std::int64_t num_routes = 0;
  std::vector<Stage> stages;  // In the order they ran.
};

}  // namespace kt::coproc
