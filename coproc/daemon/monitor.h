// The client verbs' view of a daemon: a control connection without a session, and the status page.
#pragma once
#include <chrono>
#include <cstdint>
#include <functional>
#include <optional>
#include <string>

#include "shm/base/result.h"
#include "shm/base/unique_fd.h"
#include "shm/status_page.h"

namespace kt::coproc {

// How long a daemon may take to answer a control packet.
inline constexpr std::chrono::milliseconds kAnswerTimeout{5000};
// How long it may take to end. It promises 10 s; freeing a large one's memory takes longer.
inline constexpr std::chrono::milliseconds kStopTimeout{60000};

class Monitor {
 public:
  // kNotFound: no daemon there. kTimeout: one is, and does not answer.
  static Result<Monitor> connect(const std::string& socket_path);

  const shm::StatusPage& page() const { return page_.page(); }
  shm::DaemonState state() const { return page().state.load(std::memory_order_relaxed); }
  int socket() const { return socket_.get(); }
  // Waits up to `timeout`. True: the daemon has closed the connection.
  bool wait_gone(std::chrono::milliseconds timeout) const;
  // Waits until the daemon's process has ended, not only its connections. False: `timeout` (negative: none) passed.
  bool wait_process_ended(std::chrono::milliseconds timeout) const;

 private:
  Monitor(UniqueFd socket, UniqueFd pidfd, shm::StatusPageView page)
      : socket_(std::move(socket)), pidfd_(std::move(pidfd)), page_(std::move(page)) {}
  UniqueFd socket_;
  UniqueFd pidfd_;  // Invalid where the kernel has none to give.
  shm::StatusPageView page_;
};

enum class Readiness { kReady, kGone, kTimeout, kInterrupted };

// Waits until the daemon at `find_path()` serves; it need not have started yet. `give_up` is asked about five times a
// second. kGone: a daemon was there and ended. Prints how the loading goes to standard error when `verbose`. Errors: a
// socket that is not safe to use, …
Result<Readiness> wait_ready(const std::function<Result<std::string>()>& find_path, bool verbose,
                             const std::function<std::optional<Readiness>()>& give_up);

}  // namespace kt::coproc
