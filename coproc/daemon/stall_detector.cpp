#include "coproc/daemon/stall_detector.h"

namespace kt::coproc {

bool work_in_flight(const shm::StatusPage& page, bool deterministic) {
  for (const shm::RankRow& row : page.ranks) {
    if (row.used.load(std::memory_order_relaxed) == 0 || row.in_flight.load(std::memory_order_relaxed) == 0) continue;
    const auto state = static_cast<shm::RankState>(row.state.load(std::memory_order_relaxed));
    if (state == shm::RankState::kCollective) continue;
    if (state == shm::RankState::kBackward && deterministic) continue;
    return true;
  }
  return false;
}

std::uint64_t engine_progress(const shm::StatusPage& page) {
  std::uint64_t sum = page.totals.batches.load(std::memory_order_relaxed);
  for (const shm::RankRow& row : page.ranks) {
    if (row.used.load(std::memory_order_relaxed) == 0) continue;
    // Every answer, of whatever verb, is in the histogram.
    for (const shm::Counter& count : row.latency.counts) sum += count.load(std::memory_order_relaxed);
  }
  return sum;
}

}  // namespace kt::coproc
