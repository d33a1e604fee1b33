// Streams every routed expert of a checkpoint from disk into a sink.
#pragma once
#include <atomic>
#include <cstdint>

#include "coproc/model/checkpoint.h"
#include "coproc/model/convert.h"
#include "shm/base/result.h"

namespace kt::coproc {

// Receives the experts, each exactly once, in no promised order and from several threads at a time.
class ExpertSink {
 public:
  virtual ~ExpertSink() = default;
  // Row-major elements of the loaded type: gate, up [I, H], down [H, I]. Valid during the call only.
  virtual void expert(std::uint32_t moe_index, std::uint32_t expert, const void* gate, const void* up,
                      const void* down) = 0;
};

// Written by the loader, read by whoever shows it; cancel the other way round.
struct LoadProgress {
  std::atomic<std::uint64_t> bytes_done{0};  // Read from disk.
  std::atomic<std::uint64_t> bytes_total{0};
  std::atomic<bool> cancel{false};  // Looked at before every expert.
};

// Reads the experts in the order of the files with num_threads threads (at least 1) and their own buffers of one
// expert each. Returns when all threads have ended. kBadModel naming file and offset when a file cannot be read or has
// become shorter, kNoResources when there is no memory for the buffers, kCoprocDied after progress.cancel.
Status load_experts(const Checkpoint& checkpoint, ElementType element, ExpertSink& sink, LoadProgress& progress,
                    std::uint32_t num_threads);

}  // namespace kt::coproc
