// The thread that notices the daemon's end while everybody else waits for a reply.
//
// It polls the control socket (hang-up: the daemon closed it, or died), the daemon's pidfd (a forked child of the
// daemon may keep the socket open; the pidfd knows better) and, every kTickMs, the segment's state. It takes no GIL,
// calls no CUDA, and blocks every signal, so that the program's own threads get them.
#pragma once
#include <functional>
#include <thread>

#include "client/liveness.h"
#include "shm/base/unique_fd.h"
#include "shm/segment.h"

namespace kt::client {

class Watchdog {
 public:
  static constexpr int kTickMs = 100;

  struct Hooks {
    std::function<void()> tick;  // Every kTickMs while the daemon serves.
    std::function<void()> end;   // Once, after liveness.set_end(); then the thread ends.
  };

  // `pidfd` may be -1: the daemon's pid is not visible from here. The descriptors, segment and liveness outlive it.
  Watchdog(int socket, int pidfd, const shm::Segment& segment, Liveness& liveness, Hooks hooks);
  Watchdog(const Watchdog&) = delete;
  Watchdog& operator=(const Watchdog&) = delete;
  ~Watchdog();  // Stops and joins; no hook runs afterwards.

 private:
  void run();
  End reason_of_hangup() const;
  bool is_shutting_down() const;

  const int socket_;
  const int pidfd_;
  const shm::Segment& segment_;
  Liveness& liveness_;
  const Hooks hooks_;
  UniqueFd stop_;  // eventfd.
  std::thread thread_;
};

// Whether `pidfd` (-1: unknown) tells that its process has ended, waiting for it at most `timeout_ms`.
bool process_ended(int pidfd, int timeout_ms);
// Whether the peer of `socket` has closed it.
bool hung_up(int socket);

}  // namespace kt::client
