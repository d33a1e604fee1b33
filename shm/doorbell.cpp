#include "shm/doorbell.h"

#include <poll.h>
#include <sys/eventfd.h>
#include <sys/uio.h>
#include <unistd.h>

#include <cerrno>
#include <ctime>

namespace kt::shm {

Result<UniqueFd> create_doorbell() {
  UniqueFd doorbell(::eventfd(0, EFD_NONBLOCK | EFD_CLOEXEC));
  if (!doorbell.valid()) return os_error("eventfd", "doorbell", "raise the limit on open files: ulimit -n");
  return doorbell;
}

void ring_if_sleeping(const Segment& segment, int doorbell) {
  if (segment.header().daemon_sleeping.load(std::memory_order_seq_cst) == 0) return;  // S0
  const std::uint64_t one = 1;
  // EAGAIN means that the counter is full, so the doorbell already rings.
  while (::write(doorbell, &one, sizeof one) < 0 && errno == EINTR) {
  }
}

void set_sleeping(const Segment& segment, bool sleeping) {
  segment.header().daemon_sleeping.store(sleeping ? 1 : 0, std::memory_order_seq_cst);  // S1
}

void clear_doorbell(int doorbell) {
  // O_NONBLOCK belongs to the open file, which the client shares: it may clear the flag, empty the counter between
  // our epoll and this read, and so block the daemon. RWF_NOWAIT belongs to this call.
  std::uint64_t count = 0;
  iovec target{&count, sizeof count};
  ssize_t got = 0;
  do {
    got = ::preadv2(doorbell, &target, 1, -1, RWF_NOWAIT);
  } while (got < 0 && errno == EINTR);
  if (got >= 0 || errno != EOPNOTSUPP) return;
  // Before Linux 5.8 eventfd does not know RWF_NOWAIT; looking first leaves only a window of nanoseconds.
  pollfd ready{doorbell, POLLIN, 0};
  if (::poll(&ready, 1, 0) == 1) static_cast<void>(!::read(doorbell, &count, sizeof count));
}

void cpu_relax() {
#if defined(__x86_64__)
  __builtin_ia32_pause();
#elif defined(__aarch64__)
  asm volatile("yield");
#endif
}

std::uint64_t now_ns() {
  timespec now{};
  ::clock_gettime(CLOCK_MONOTONIC, &now);
  return static_cast<std::uint64_t>(now.tv_sec) * 1'000'000'000 + static_cast<std::uint64_t>(now.tv_nsec);
}

}  // namespace kt::shm
