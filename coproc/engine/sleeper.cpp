#include "coproc/engine/sleeper.h"

#include <sys/epoll.h>

#include <algorithm>
#include <array>

#include "shm/base/result.h"
#include "shm/doorbell.h"

namespace kt::coproc {

Sleeper::Sleeper() : epoll_(::epoll_create1(EPOLL_CLOEXEC)) { KT_CHECK(epoll_.valid()); }

bool Sleeper::add(int fd) {
  epoll_event event{};
  event.events = EPOLLIN;
  event.data.fd = fd;
  return ::epoll_ctl(epoll_.get(), EPOLL_CTL_ADD, fd, &event) == 0;
}

void Sleeper::remove(int fd) { ::epoll_ctl(epoll_.get(), EPOLL_CTL_DEL, fd, nullptr); }

void Sleeper::wait(std::uint64_t timeout_ns) {
  constexpr std::uint64_t kMillisecond = 1'000'000;
  constexpr std::uint64_t kTimeoutMsMax = 1'000'000'000;
  int timeout_ms = -1;
  // Rounded up, so that a deadline has passed when we wake for it.
  if (timeout_ns != UINT64_MAX) {
    timeout_ms = static_cast<int>(std::min(timeout_ns / kMillisecond + 1, kTimeoutMsMax));
  }
  std::array<epoll_event, 64> events{};
  const int num_ready = ::epoll_wait(epoll_.get(), events.data(), static_cast<int>(events.size()), timeout_ms);
  for (int i = 0; i < num_ready; ++i) shm::clear_doorbell(events[static_cast<std::size_t>(i)].data.fd);
}

}  // namespace kt::coproc
