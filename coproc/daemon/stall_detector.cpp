#include "coproc/daemon/stall_detector.h"

namespace kt::coproc {

bool work_in_flight(const shm::StatusPage& page) {
  for (const shm::RankRow& row : page.ranks) {
    if (row.used.load(std::memory_order_relaxed) == 0 || row.in_flight.load(std::memory_order_relaxed) == 0) continue;
    const auto state = static_cast<shm::RankState>(row.state.load(std::memory_order_relaxed));
    if (state != shm::RankState::kCollective) return true;
  }
  return false;
}

std::uint64_t engine_progress(const shm::StatusPage& page) {
  const shm::Totals& totals = page.totals;
  std::uint64_t sum = 0;
  for (const shm::Counter* counter :
       {&totals.forward_requests, &totals.backward_requests, &totals.fetch_requests, &totals.steps, &totals.batches,
        &totals.errors}) {
    sum += counter->load(std::memory_order_relaxed);
  }
  return sum;
}

}  // namespace kt::coproc
