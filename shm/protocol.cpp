#include "shm/protocol.h"

namespace kt::shm {

// The other process, maybe of another build, uses the same words: only lock-free atomics of their plain size work.
static_assert(std::atomic<std::uint64_t>::is_always_lock_free && sizeof(std::atomic<std::uint64_t>) == 8);
static_assert(std::atomic<std::uint32_t>::is_always_lock_free && sizeof(std::atomic<std::uint32_t>) == 4);
// The areas of the drawing do not overlap.
static_assert(kRingOffset + kNumSlots * sizeof(Slot) == kFlagsOffset);
static_assert(kFlagsOffset + kNumSlots * sizeof(StreamFlag) <= kMessagesOffset);
static_assert(kMessagesOffset + std::uint64_t{kNumSlots} * kMessageBytes <= kArenaOffset);

const char* verb_name(Verb verb) {
  switch (verb) {
    case Verb::kNone:
      return "NONE";
    case Verb::kForward:
      return "FORWARD";
    case Verb::kFetch:
      return "FETCH";
    case Verb::kBackward:
      return "BACKWARD";
    case Verb::kRelease:
      return "RELEASE";
    case Verb::kRead:
      return "READ";
    case Verb::kWrite:
      return "WRITE";
    case Verb::kBarrier:
      return "BARRIER";
    case Verb::kNorm:
      return "NORM";
    case Verb::kDiscard:
      return "DISCARD";
    case Verb::kStep:
      return "STEP";
  }
  return "unknown";
}

}  // namespace kt::shm
