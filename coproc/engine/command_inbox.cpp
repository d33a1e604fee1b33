#include "coproc/engine/command_inbox.h"

#include <sys/eventfd.h>

#include "shm/base/result.h"

namespace kt::coproc {

CommandInbox::CommandInbox() : wake_(::eventfd(0, EFD_NONBLOCK | EFD_CLOEXEC)) { KT_CHECK(wake_.valid()); }

void CommandInbox::post(UniqueFunction<void()> command) {
  {
    const std::lock_guard lock(mutex_);
    posted_.push_back(std::move(command));
    num_posted_.store(posted_.size(), std::memory_order_release);
  }
  const std::uint64_t one = 1;
  // EAGAIN means that the counter is full, so the eventfd is readable anyway.
  while (::write(wake_.get(), &one, sizeof one) < 0 && errno == EINTR) {
  }
}

bool CommandInbox::run_all() {
  if (empty()) return false;
  std::vector<UniqueFunction<void()>> commands;
  {
    const std::lock_guard lock(mutex_);
    commands.swap(posted_);
    num_posted_.store(0, std::memory_order_release);
  }
  for (auto& command : commands) command();
  return true;
}

}  // namespace kt::coproc
