// What the tests of client/ share.
#pragma once
#include <gtest/gtest.h>
#include <unistd.h>

#include <chrono>
#include <thread>

namespace kt::client::testing {

// Ends the process (SIGALRM) when a test hangs: a lost wake-up must fail, not wait.
class HangWatchdog {
 public:
  explicit HangWatchdog(unsigned seconds = 50) { ::alarm(seconds); }
  ~HangWatchdog() { ::alarm(0); }
  HangWatchdog(const HangWatchdog&) = delete;
  HangWatchdog& operator=(const HangWatchdog&) = delete;
};

// Waits for a condition that another thread or process brings about; the hang watchdog ends a wait in vain.
template <class Condition>
void wait_until(const Condition& condition) {
  while (!condition()) std::this_thread::sleep_for(std::chrono::milliseconds(2));
}

}  // namespace kt::client::testing
