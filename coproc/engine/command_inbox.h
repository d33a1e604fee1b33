// Commands from other threads to worker 0: a locked queue, and an eventfd that wakes it out of epoll.
#pragma once
#include <atomic>
#include <mutex>
#include <vector>

#include "shm/base/unique_fd.h"
#include "shm/base/unique_function.h"

namespace kt::coproc {

class CommandInbox {
 public:
  CommandInbox();  // Aborts when the process has no descriptor left: the daemon cannot run without.

  // Any thread.
  void post(UniqueFunction<void()> command);
  // Worker 0: runs what has been posted, in order. True if there was something.
  bool run_all();
  bool empty() const { return num_posted_.load(std::memory_order_acquire) == 0; }
  int fd() const { return wake_.get(); }  // Readable after a post; whoever waits for it drains it.

 private:
  UniqueFd wake_;
  std::mutex mutex_;
  std::vector<UniqueFunction<void()>> posted_;  // Guarded by mutex_.
  std::atomic<std::size_t> num_posted_{0};      // Looked at without the mutex on every round.
};

}  // namespace kt::coproc
