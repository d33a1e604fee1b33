#include "shm/futex.h"

#include <linux/futex.h>
#include <sys/syscall.h>
#include <unistd.h>

#include <climits>
#include <ctime>

namespace kt::shm {

void futex_wait(const std::atomic<std::uint32_t>& word, std::uint32_t expected, std::uint64_t deadline_ns) {
  constexpr std::uint64_t kSecond = 1'000'000'000;
  const timespec deadline{static_cast<time_t>(deadline_ns / kSecond), static_cast<long>(deadline_ns % kSecond)};
  // FUTEX_WAIT_BITSET, unlike FUTEX_WAIT, takes an absolute time: an interrupted wait is simply repeated.
  ::syscall(SYS_futex, &word, FUTEX_WAIT_BITSET, expected, deadline_ns == kNoDeadline ? nullptr : &deadline, nullptr,
            FUTEX_BITSET_MATCH_ANY);
}

void futex_wake_all(const std::atomic<std::uint32_t>& word) {
  ::syscall(SYS_futex, &word, FUTEX_WAKE, INT_MAX, nullptr, nullptr, 0);
}

}  // namespace kt::shm
