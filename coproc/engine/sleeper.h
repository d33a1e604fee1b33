// Worker 0's bed: one epoll over the inbox and every session's doorbell.
#pragma once
#include <cstdint>

#include "shm/base/unique_fd.h"

namespace kt::coproc {

class Sleeper {
 public:
  Sleeper();  // Aborts when the process has no descriptor left.

  bool add(int fd);
  // Must be called before the descriptor is closed: the client holds the same open file, so closing ours would leave
  // it in the epoll set.
  void remove(int fd);
  // Waits until a descriptor is readable or timeout_ns passed (UINT64_MAX: no limit), and drains what woke it.
  void wait(std::uint64_t timeout_ns);

 private:
  UniqueFd epoll_;
};

}  // namespace kt::coproc
