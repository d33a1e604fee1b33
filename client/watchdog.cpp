#include "client/watchdog.h"

#include <poll.h>
#include <pthread.h>
#include <sys/eventfd.h>
#include <unistd.h>

#include <cerrno>
#include <csignal>
#include <utility>

namespace kt::client {
namespace {

// The kernel closes a dying process' files before it completes its pidfd; a few milliseconds lie between. A daemon that
// is alive this long after the hang-up meant to close the session.
constexpr int kPidfdGraceMs = 500;

// poll() of one descriptor, repeated when a signal interrupts it. False: timeout.
bool poll_one(int fd, short events, int timeout_ms) {
  pollfd watched{fd, events, 0};
  int ready = 0;
  do {
    ready = ::poll(&watched, 1, timeout_ms);
  } while (ready < 0 && errno == EINTR);
  return ready > 0;
}

}  // namespace

bool process_ended(int pidfd, int timeout_ms) { return pidfd >= 0 && poll_one(pidfd, POLLIN, timeout_ms); }
bool hung_up(int socket) { return poll_one(socket, POLLRDHUP, 0); }

Watchdog::Watchdog(int socket, int pidfd, const shm::Segment& segment, Liveness& liveness, Hooks hooks)
    : socket_(socket),
      pidfd_(pidfd),
      segment_(segment),
      liveness_(liveness),
      hooks_(std::move(hooks)),
      stop_(::eventfd(0, EFD_CLOEXEC)) {
  KT_CHECK(stop_.valid());
  sigset_t all;
  sigset_t before;
  ::sigfillset(&all);
  ::pthread_sigmask(SIG_SETMASK, &all, &before);  // The new thread inherits the mask.
  thread_ = std::thread([this] { run(); });
  ::pthread_sigmask(SIG_SETMASK, &before, nullptr);
  ::pthread_setname_np(thread_.native_handle(), "kt-watchdog");
}

Watchdog::~Watchdog() {
  const std::uint64_t one = 1;
  KT_CHECK(::write(stop_.get(), &one, sizeof one) == sizeof one);
  thread_.join();
}

void Watchdog::run() {
  for (;;) {
    // A negative descriptor is skipped by poll().
    pollfd watched[] = {{socket_, POLLRDHUP, 0}, {pidfd_, POLLIN, 0}, {stop_.get(), POLLIN, 0}};
    const int ready = ::poll(watched, 3, kTickMs);
    if (watched[2].revents != 0) return;
    if (ready > 0) {
      liveness_.set_end(reason_of_hangup());
      hooks_.end();
      return;
    }
    hooks_.tick();
  }
}

End Watchdog::reason_of_hangup() const {
  if (is_shutting_down()) return End::kShutDown;
  const bool ended = process_ended(pidfd_, kPidfdGraceMs);
  if (is_shutting_down()) return End::kShutDown;
  if (ended) return End::kDied;
  // Without a pidfd a refusal is what tells a session that was closed from a daemon that died.
  return pidfd_ >= 0 || liveness_.has_refusal() ? End::kClosed : End::kDied;
}

bool Watchdog::is_shutting_down() const {
  return segment_.header().state.load(std::memory_order_acquire) == shm::SessionState::kShuttingDown;
}

}  // namespace kt::client
