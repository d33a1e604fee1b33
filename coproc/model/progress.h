// Shows on a terminal or in a log how far the loading of the experts is.
#pragma once
#include <chrono>
#include <condition_variable>
#include <cstdint>
#include <mutex>
#include <string>
#include <thread>

#include "coproc/model/loader.h"

namespace kt::coproc {

// "loading experts: 12.3 of 57.1 GB (21 %), 3.42 GB/s, 13 s left". GB = 10^9 bytes, MB below that; the rate is the
// mean since the start. Without a rate yet, or with nothing left, those parts are missing.
std::string progress_line(std::uint64_t bytes_done, std::uint64_t bytes_total, double seconds);
// "loaded experts: 57.1 GB in 16.7 s (3.42 GB/s)"
std::string summary_line(std::uint64_t bytes, double seconds);

// Prints from its own thread between construction and finish() or destruction: on a terminal one line that is
// rewritten five times a second, elsewhere a plain line every two seconds. A load faster than that prints its summary
// only.
class ProgressPrinter {
 public:
  // To standard error, as it is.
  explicit ProgressPrinter(const LoadProgress& progress);
  // To any descriptor, which must stay open.
  ProgressPrinter(const LoadProgress& progress, int fd, bool in_place, std::chrono::milliseconds interval);
  // Without finish(): the load failed, the message that follows starts on a line of its own.
  ~ProgressPrinter();
  ProgressPrinter(const ProgressPrinter&) = delete;
  ProgressPrinter& operator=(const ProgressPrinter&) = delete;

  // The load succeeded: prints the summary.
  void finish();

 private:
  void run();
  void stop();
  void print(const std::string& line, bool last);
  double seconds() const;

  const LoadProgress& progress_;
  const int fd_;
  const bool in_place_;
  const std::chrono::milliseconds interval_;
  const std::chrono::steady_clock::time_point start_ = std::chrono::steady_clock::now();
  bool line_open_ = false;  // In place: something stands on the current line.
  std::mutex mutex_;
  std::condition_variable wake_;
  bool stopped_ = false;  // Guarded by mutex_.
  std::thread thread_;
};

}  // namespace kt::coproc
