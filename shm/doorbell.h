// Doorbell, rank → daemon: an eventfd per session, rung only while the daemon sleeps. A client can only ring, or
// silence itself. The other direction is the futex in each slot (ring.h).
#pragma once
#include "shm/base/result.h"
#include "shm/base/unique_fd.h"
#include "shm/segment.h"

namespace kt::shm {

Result<UniqueFd> create_doorbell();  // Non-blocking, close-on-exec.

// Rank: after try_submit. Rings when header().daemon_sleeping is set (S0), else costs one load.
void ring_if_sleeping(const Segment& segment, int doorbell);
// Daemon: S1. set_sleeping(true) on every session, then re-check every ring, then epoll; set_sleeping(false) after.
void set_sleeping(const Segment& segment, bool sleeping);
void clear_doorbell(int doorbell);  // Drains it after epoll.

// Relaxes the core in a spin loop.
void cpu_relax();
std::uint64_t now_ns();  // CLOCK_MONOTONIC.

}  // namespace kt::shm
