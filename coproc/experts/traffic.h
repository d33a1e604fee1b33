// What one forward or backward moves beyond L2, stage by stage. Nothing is measured: shapes, routing and
// number of workers decide, so the account is the same on every machine with the same kernel table and says what a
// larger one would wait for. Beside it, measured: the workers' time.
//
// Rules of the account
//   T1  A stage reads the weights of an expert once for each of its blocks of rows (plan.h).
//   T2  What comes from outside or goes there is read or written once: X, dY, G and U as kept, the rows of results, y
//       and dX. So are arrays of experts that several workers share.
//   T3  An array of a block stays in L2 while everything in use up to its last reader fits there; otherwise it is
//       written once, and read again by each stage that takes it.
//   T4  Rows of a shared expert are read once per worker if they fit in L2 beside a task's weights, else once per pair
//       of panels.
//   T5  LoRA's packed matrices are read once per block or task that multiplies by them; gradient sums are read and
//       written.
// Lines that a store fetches first, indices, and routing weights are left out.
#pragma once
#include <array>
#include <cstdint>
#include <string_view>
#include <vector>

namespace kt::coproc {

enum class StageId : std::uint8_t {
  kGatherX,
  kGateUp,
  kProjectZ,
  kDown,
  kGatherDy,
  kDifferentiate,
  kFinishRows,
  kGradX,
  kLoraGradients,
  kSum,
};
inline constexpr std::size_t kNumStages = 10;
std::string_view stage_name(StageId stage);

struct Traffic {
  struct Stage {
    std::int64_t bytes() const { return weight_bytes + activation_bytes + lora_bytes; }
    Stage& operator+=(const Stage& other) {
      weight_bytes += other.weight_bytes;
      activation_bytes += other.activation_bytes;
      lora_bytes += other.lora_bytes;
      seconds += other.seconds;
      return *this;
    }
    std::int64_t weight_bytes = 0;
    std::int64_t activation_bytes = 0;  // Rows of tokens and routes, LoRA's narrow ones included.
    std::int64_t lora_bytes = 0;        // LoRA parameters and gradient sums.
    double seconds = 0;                 // Measured, all workers together.
  };

  Stage& operator[](StageId stage) { return stages[static_cast<std::size_t>(stage)]; }
  const Stage& operator[](StageId stage) const { return stages[static_cast<std::size_t>(stage)]; }
  Stage total() const {
    Stage sum;
    for (const Stage& stage : stages) sum += stage;
    return sum;
  }

  std::int64_t num_routes = 0;
  std::int64_t num_barriers = 0;  // Phases that ran: all workers wait for the last one at the end of each.
  std::int64_t link_bytes = 0;    // Of the nodes' sums, read by a worker of another node at most.
  std::array<Stage, kNumStages> stages;
};

}  // namespace kt::coproc
