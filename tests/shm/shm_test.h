// What the tests of shm/ share.
#pragma once
#include <gtest/gtest.h>
#include <unistd.h>

#include <cstdint>
#include <filesystem>
#include <iterator>
#include <utility>

#include "shm/ring.h"
#include "shm/segment.h"

namespace kt::shm::testing {

// Ends the process (SIGALRM) when a test hangs: a lost wake-up must fail, not wait.
class Watchdog {
 public:
  explicit Watchdog(unsigned seconds = 30) { ::alarm(seconds); }
  ~Watchdog() { ::alarm(0); }
  Watchdog(const Watchdog&) = delete;
  Watchdog& operator=(const Watchdog&) = delete;
};

inline Segment make_segment(std::uint64_t arena_bytes = kArenaBytesMin) {
  auto segment = Segment::create(7, arena_bytes);
  EXPECT_TRUE(segment.ok()) << segment.error().text();
  return std::move(segment).value();
}

// A segment whose last answered request was `newest`, as both ends would have left it.
inline Segment make_segment_after(std::uint64_t newest) {
  Segment segment = make_segment();
  for (std::uint64_t sequence = newest < kNumSlots ? 1 : newest - kNumSlots + 1; sequence <= newest; ++sequence) {
    Slot& slot = segment.slot(static_cast<std::uint32_t>((sequence - 1) % kNumSlots));
    slot.request.sequence = sequence;
    slot.reply.done_seq = static_cast<std::uint32_t>(sequence);
  }
  return segment;
}

inline Request make_request(std::uint64_t act_id) {
  Request request;
  request.verb = Verb::kForward;
  request.layer = 3;
  request.act_id = act_id;
  return request;
}

inline Reply make_reply(double value) {
  Reply reply;
  reply.value = value;
  return reply;
}

inline std::ptrdiff_t num_open_descriptors() {
  const std::filesystem::directory_iterator descriptors("/proc/self/fd");
  return std::distance(begin(descriptors), end(descriptors));
}

}  // namespace kt::shm::testing
