#include "coproc/daemon/mailbox.h"

#include <sys/eventfd.h>

#include <cstdint>
#include <memory>

namespace kt::coproc {

Result<std::unique_ptr<Mailbox>> Mailbox::create() {
  UniqueFd event(::eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK));
  if (!event.valid()) return os_error("eventfd", "control thread", "raise the limit on open files: ulimit -n");
  return std::make_unique<Mailbox>(std::move(event));
}

void Mailbox::post(UniqueFunction<void()> work) {
  {
    const std::scoped_lock lock(mutex_);
    waiting_.push_back(std::move(work));
  }
  const std::uint64_t one = 1;
  // It fails only when the counter is full, and then the descriptor is readable anyway.
  [[maybe_unused]] const ssize_t written = ::write(event_.get(), &one, sizeof one);
}

void Mailbox::run_all() {
  std::uint64_t count = 0;
  [[maybe_unused]] const ssize_t got = ::read(event_.get(), &count, sizeof count);
  std::vector<UniqueFunction<void()>> work;
  {
    const std::scoped_lock lock(mutex_);
    work.swap(waiting_);
  }
  for (UniqueFunction<void()>& one : work) one();
}

}  // namespace kt::coproc
