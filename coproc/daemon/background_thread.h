// One thread for work that would hold up the control thread: zeroing a session's memory may take seconds.
#pragma once
#include <pthread.h>

#include <condition_variable>
#include <deque>
#include <mutex>
#include <stop_token>
#include <thread>
#include <utility>

#include "shm/base/unique_function.h"

namespace kt::coproc {

class BackgroundThread {
 public:
  BackgroundThread() : thread_([this](const std::stop_token& stop) { run(stop); }) {}

  // Any thread. Runs in order; what has not begun when this object ends is dropped.
  void post(UniqueFunction<void()> work) {
    {
      const std::scoped_lock lock(mutex_);
      waiting_.push_back(std::move(work));
    }
    wake_.notify_one();
  }

 private:
  void run(const std::stop_token& stop) {
    ::pthread_setname_np(::pthread_self(), "kt-opener");
    for (;;) {
      UniqueFunction<void()> work;
      {
        std::unique_lock lock(mutex_);
        if (!wake_.wait(lock, stop, [this] { return !waiting_.empty(); }) || stop.stop_requested()) return;
        work = std::move(waiting_.front());
        waiting_.pop_front();
      }
      work();
    }
  }

  std::mutex mutex_;
  std::condition_variable_any wake_;
  std::deque<UniqueFunction<void()>> waiting_;  // Guarded by mutex_.
  std::jthread thread_;                         // Last: stopped and joined before the rest goes.
};

}  // namespace kt::coproc
