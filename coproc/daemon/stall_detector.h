// Tells a daemon that is busy or waits for others from one that hangs.
#pragma once
#include <cstdint>

#include "shm/status_page.h"

namespace kt::coproc {

inline constexpr std::uint64_t kStallNs = 10'000'000'000;

class StallDetector {
 public:
  // Stalled: for kStallNs there was work in flight, and `progress`, a number that changes with every finished piece of
  // work, stayed the same.
  bool update(std::uint64_t now_ns, bool work_in_flight, std::uint64_t progress) {
    if (!work_in_flight || progress != progress_ || since_ns_ == 0) {
      progress_ = progress;
      since_ns_ = now_ns;
    }
    return now_ns - since_ns_ >= kStallNs;
  }

 private:
  std::uint64_t progress_ = 0;
  std::uint64_t since_ns_ = 0;
};

// A request that the daemon could work on is in flight. What waits for other ranks does not count: collectives, and
// with
// --deterministic BACKWARDs too.
bool work_in_flight(const shm::StatusPage& page, bool deterministic);

// A number that changes with every request that is answered and every batch.
std::uint64_t engine_progress(const shm::StatusPage& page);

}  // namespace kt::coproc
