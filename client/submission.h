// The rank's side of the ring for many threads: claims slots, waits for replies, frees slots.
//
// Each request's slot is claimed under the mutex; nothing waits under it. A request is either awaited by the thread
// that submitted it (submit … finish), or posted (RELEASE): nobody waits for it, and a later call reaps its reply.
#pragma once
#include <array>
#include <condition_variable>
#include <cstddef>
#include <cstdint>
#include <deque>
#include <mutex>
#include <span>

#include "client/liveness.h"
#include "shm/base/result.h"
#include "shm/protocol.h"
#include "shm/ring.h"
#include "shm/segment.h"

namespace kt::client {

// A part of a payload that the daemon writes.
struct OutputPart {
  std::byte* data = nullptr;
  std::uint64_t bytes = 0;
};
inline constexpr std::size_t kNumOutputsMax = 2;  // BACKWARD: dx and dw.

// Fills outputs that will never be computed with NaN, in bf16 and in f32: all bits set.
void poison(std::span<const OutputPart> outputs);

class Submission {
 public:
  // All three must outlive it.
  Submission(const shm::Segment& segment, int doorbell, Liveness& liveness);

  // Publishes a request, whose payload is complete, and rings the doorbell. Waits while 256 are in flight.
  // `outputs` (≤ kNumOutputsMax) are what close() poisons.
  Result<std::uint64_t> submit(const shm::Request& request, std::span<const OutputPart> outputs);
  // Waits for the reply and frees the slot; called once per submit. The reply's error is returned as such. When the
  // session ends first: its error, and the outputs are NaN.
  Result<shm::Reply> finish(std::uint64_t sequence);

  // Publishes a request that nobody waits for; its reply's error is ignored.
  Status post(const shm::Request& request);
  bool try_post(const shm::Request& request);  // False: no slot is free, or the session is over.

  // Liveness says that the session is over: poisons what is unanswered and releases every waiter. For ever.
  void close();

 private:
  struct Outstanding {
    std::uint64_t sequence = 0;  // 0: none.
    std::array<OutputPart, kNumOutputsMax> outputs;
    std::size_t num_outputs = 0;
    bool poisoned = false;
    std::span<const OutputPart> parts() const { return std::span(outputs).first(num_outputs); }
  };

  Status check_open() const;
  Result<std::uint64_t> claim(std::unique_lock<std::mutex>& lock, const shm::Request& request);
  void reap_posted();                                      // Under mutex_.
  void wait_for_slot(std::unique_lock<std::mutex>& lock);  // Unlocks while it waits.

  const shm::Segment& segment_;
  const int doorbell_;
  Liveness& liveness_;
  std::mutex mutex_;
  std::condition_variable slot_freed_;
  shm::RankRing ring_;
  std::array<Outstanding, shm::kNumSlots> outstanding_;  // By slot.
  std::deque<std::uint64_t> posted_;                     // Sequences, oldest first.
};

}  // namespace kt::client
