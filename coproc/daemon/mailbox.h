// Work for the control thread, from any thread.
#pragma once
#include <memory>
#include <mutex>
#include <vector>

#include "shm/base/result.h"
#include "shm/base/unique_fd.h"
#include "shm/base/unique_function.h"

namespace kt::coproc {

class Mailbox {
 public:
  static Result<std::unique_ptr<Mailbox>> create();
  explicit Mailbox(UniqueFd event) : event_(std::move(event)) {}

  // Any thread; never blocks for long. `work` runs in run_all().
  void post(UniqueFunction<void()> work);
  // Readable when something was posted.
  int fd() const { return event_.get(); }
  // The owner's thread: runs what was posted, in that order.
  void run_all();

 private:
  UniqueFd event_;
  std::mutex mutex_;
  std::vector<UniqueFunction<void()>> waiting_;  // Guarded by mutex_.
};

}  // namespace kt::coproc
