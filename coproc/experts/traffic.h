// What one forward or backward moves beyond L2, stage by stage. Nothing is measured: shapes, routing and
// number of workers decide, so the account is the same on every machine with the same kernel table and says what a
// larger one would wait for. Beside it, measured: the workers' time.
//
// Rules of the account
//   T1  A stage reads the weights of an expert once for each of its blocks of rows (schedule.h).
//   T2  What comes from outside or goes there is read or written once: X, dY, G and U as kept, the rows of results, y
//       and dX. So are arrays of experts that several workers share.
//   T3  What a stage writes to an array of a block stays in L2 if everything in use fits there from that stage to the
//       last one that reads it; otherwise it is written once, and read again by each stage that takes it.
//   T4  A product reads its rows once per group of panels if they do not fit in L2 beside the panels at work; otherwise
//       every worker that shares the expert reads them once.
//   T5  LoRA's packed matrices are read once per block or task that multiplies by them; gradient sums are read and
//       written once for each block of rows.
// Lines that a store fetches first, pads, indices, routing weights, and arrays of LoRA's rank a row are left out.
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
    std::int64_t activation_bytes = 0;  // Rows of tokens and routes.
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

struct Pass;
struct Stage;

// Adds up what a list of stages (stage.h) moves.
class Account {
 public:
  Account(const Pass& pass, const std::vector<Stage>& stages, Traffic& traffic);

  // Rows that go through the stages together: a block of an expert that one worker computes whole (num_sharing = 0), or
  // an expert that so many workers share. num_kept: those whose G and U forward keeps.
  struct Share {
    std::int32_t expert;
    std::int64_t num_rows;
    std::int64_t num_kept;
    int num_sharing;
  };
  void add(const Share& share);
  void add_sum(std::int64_t num_rows, std::int64_t num_tokens, std::int64_t num_nodes);

 private:
  // One stage's reading or writing of an array. The value must stay in L2 during stages [first, last].
  struct Access {
    std::size_t stage;
    std::uint32_t array;
    bool is_write;
    std::size_t first;
    std::size_t last;
  };
  void add_value(std::size_t writer, std::uint32_t array);
  void add_outside(const Stage& stage, const Share& share);
  std::int64_t bytes_of(const Access& access, const Share& share) const;

  const Pass& pass_;
  const std::vector<Stage>& stages_;
  Traffic& traffic_;
  std::vector<Access> accesses_;
  std::vector<std::int64_t> live_bytes_;  // Of a row: all arrays in use, stage by stage.
};

}  // namespace kt::coproc
