// Futexes between processes: shared, so not FUTEX_PRIVATE_FLAG, which std::atomic::wait uses.
#pragma once
#include <atomic>
#include <cstdint>

namespace kt::shm {

inline constexpr std::uint64_t kNoDeadline = ~std::uint64_t{0};

// Sleeps while `word` is `expected`, at most until `deadline_ns` (CLOCK_MONOTONIC). May wake for no reason.
void futex_wait(const std::atomic<std::uint32_t>& word, std::uint32_t expected, std::uint64_t deadline_ns);
void futex_wake_all(const std::atomic<std::uint32_t>& word);

}  // namespace kt::shm
