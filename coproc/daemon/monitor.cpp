#include "coproc/daemon/monitor.h"

#include <poll.h>
#include <sys/socket.h>

#include <algorithm>
#include <cerrno>
#include <cstdio>
#include <thread>

#include "coproc/daemon/peer.h"
#include "coproc/model/progress.h"
#include "shm/control.h"

namespace kt::coproc {
namespace {

constexpr std::chrono::milliseconds kPoll{200};
constexpr std::chrono::milliseconds kLineInterval{2000};

// Readable or closed. A signal counts as the timeout: the callers look at why they wait anyway.
bool wait_readable(int fd, std::chrono::milliseconds timeout) {
  pollfd entry{fd, POLLIN, 0};
  return ::poll(&entry, 1, static_cast<int>(timeout.count())) > 0;
}

// One line every kLineInterval while it loads.
class LoadReport {
 public:
  void show(const shm::StatusPage& page) {
    const auto now = std::chrono::steady_clock::now();
    if (now - last_ < kLineInterval) return;
    last_ = now;
    const std::string line = progress_line(page.load_bytes_done.load(std::memory_order_relaxed),
                                           page.load_bytes_total.load(std::memory_order_relaxed),
                                           page.load_seconds.load(std::memory_order_relaxed));
    std::fprintf(stderr, "%s\n", line.c_str());
  }

 private:
  std::chrono::steady_clock::time_point last_;
};

}  // namespace

Result<Monitor> Monitor::connect(const std::string& socket_path) {
  KT_TRY(UniqueFd socket, shm::connect_daemon(socket_path));
  ucred peer{};
  socklen_t bytes = sizeof peer;
  ::getsockopt(socket.get(), SOL_SOCKET, SO_PEERCRED, &peer, &bytes);
  UniqueFd pidfd = peer_pidfd(socket.get(), peer.pid);
  KT_TRY(shm::Packet reply, shm::call(socket.get(), {{"op", "status"}}, kAnswerTimeout));
  if (reply.descriptors.size() != 1) {
    return Error{ErrorCode::kVersionMismatch, "the daemon at " + socket_path + " gave no status page",
                 "its reply has " + std::to_string(reply.descriptors.size()) + " descriptors",
                 "run daemon and tools of the same kt-coproc release"};
  }
  KT_TRY(auto page, shm::StatusPageView::attach(std::move(reply.descriptors.front())));
  return Monitor(std::move(socket), std::move(pidfd), std::move(page));
}

bool Monitor::wait_gone(std::chrono::milliseconds timeout) const { return wait_readable(socket_.get(), timeout); }

bool Monitor::wait_process_ended(std::chrono::milliseconds timeout) const {
  using Clock = std::chrono::steady_clock;
  const auto deadline = Clock::now() + timeout;
  // Without a pidfd the connection's end has to do: it comes a moment before the process'.
  const int fd = pidfd_.valid() ? pidfd_.get() : socket_.get();
  for (;;) {
    const auto left = std::chrono::ceil<std::chrono::milliseconds>(deadline - Clock::now());
    if (timeout.count() >= 0 && left.count() <= 0) return wait_readable(fd, std::chrono::milliseconds(0));
    if (wait_readable(fd, timeout.count() < 0 ? std::chrono::milliseconds(-1) : left)) return true;
  }
}

Result<Readiness> wait_ready(const std::function<Result<std::string>()>& find_path, bool verbose,
                             const std::function<std::optional<Readiness>()>& give_up) {
  LoadReport report;
  for (;;) {
    KT_TRY(const std::string path, find_path());
    auto monitor = Monitor::connect(path);
    if (monitor.ok()) {
      do {
        const shm::DaemonState state = monitor.value().state();
        if (state == shm::DaemonState::kServing) return Readiness::kReady;
        if (verbose && state == shm::DaemonState::kLoading) report.show(monitor.value().page());
        if (const auto decided = give_up()) return *decided;
      } while (!monitor.value().wait_gone(kPoll));
      return Readiness::kGone;
    }
    const ErrorCode code = monitor.error().code;
    if (code != ErrorCode::kNotFound && code != ErrorCode::kTimeout) return std::move(monitor).error();
    if (const auto decided = give_up()) return *decided;
    std::this_thread::sleep_for(kPoll);
  }
}

}  // namespace kt::coproc
