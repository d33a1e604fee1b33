#include "coproc/model/progress.h"

#include <unistd.h>

#include <cinttypes>
#include <cmath>
#include <cstdio>

namespace kt::coproc {
namespace {

constexpr double kGigabyte = 1e9;
constexpr std::chrono::milliseconds kTerminalInterval{200};
constexpr std::chrono::milliseconds kLogInterval{2000};

template <class... Args>
std::string format(const char* pattern, Args... args) {
  char text[160];
  std::snprintf(text, sizeof(text), pattern, args...);
  return text;
}

// Three significant digits, or all those before the point: "1342", "57.1", "0.0213".
std::string number(double value) { return format(value >= 100 ? "%.0f" : "%.3g", value); }

// "12.3 of 57.1 GB", "57.1 GB"; MB when the whole is below 1 GB.
std::string size(std::uint64_t bytes, const std::uint64_t* part = nullptr) {
  const bool small = bytes < 1'000'000'000;
  const double unit = small ? 1e6 : kGigabyte;
  const std::string start = part == nullptr ? "" : number(static_cast<double>(*part) / unit) + " of ";
  return start + number(static_cast<double>(bytes) / unit) + (small ? " MB" : " GB");
}

std::string rate(double bytes, double seconds) { return number(bytes / seconds / kGigabyte) + " GB/s"; }

// "14 s", "3 min 20 s", "2 h 5 min"
std::string duration(double seconds) {
  const auto whole = static_cast<std::uint64_t>(std::llround(seconds));
  if (whole < 60) return format("%" PRIu64 " s", whole);
  if (whole < 3600) return format("%" PRIu64 " min %" PRIu64 " s", whole / 60, whole % 60);
  return format("%" PRIu64 " h %" PRIu64 " min", whole / 3600, whole % 3600 / 60);
}

}  // namespace

std::string progress_line(std::uint64_t bytes_done, std::uint64_t bytes_total, double seconds) {
  const auto done = static_cast<double>(bytes_done);
  const auto total = static_cast<double>(bytes_total);
  std::string line = "loading experts: " + size(bytes_total, &bytes_done);
  if (bytes_total > 0) line += format(" (%d %%)", static_cast<int>(100.0 * done / total));
  if (bytes_done == 0 || seconds <= 0) return line;
  line += ", " + rate(done, seconds);
  if (bytes_done < bytes_total) line += ", " + duration((total - done) * seconds / done) + " left";
  return line;
}

std::string summary_line(std::uint64_t bytes, double seconds) {
  std::string line = "loaded experts: " + size(bytes) + " in " + format("%.1f s", seconds);
  if (seconds > 0) line += " (" + rate(static_cast<double>(bytes), seconds) + ")";
  return line;
}

ProgressPrinter::ProgressPrinter(const LoadProgress& progress)
    : ProgressPrinter(progress, STDERR_FILENO, ::isatty(STDERR_FILENO) == 1,
                      ::isatty(STDERR_FILENO) == 1 ? kTerminalInterval : kLogInterval) {}

ProgressPrinter::ProgressPrinter(const LoadProgress& progress, int fd, bool in_place,
                                 std::chrono::milliseconds interval)
    : progress_(progress), fd_(fd), in_place_(in_place), interval_(interval), thread_([this] { run(); }) {}

ProgressPrinter::~ProgressPrinter() {
  stop();
  if (line_open_) print("", true);
}

void ProgressPrinter::finish() {
  stop();
  print(summary_line(progress_.bytes_done.load(), seconds()), true);
}

void ProgressPrinter::run() {
  std::unique_lock lock(mutex_);
  while (!wake_.wait_for(lock, interval_, [this] { return stopped_; })) {
    print(progress_line(progress_.bytes_done.load(), progress_.bytes_total.load(), seconds()), false);
  }
}

void ProgressPrinter::stop() {
  {
    const std::scoped_lock lock(mutex_);
    stopped_ = true;
  }
  wake_.notify_one();
  if (thread_.joinable()) thread_.join();
}

// Called by the thread, and by others only after it has ended.
void ProgressPrinter::print(const std::string& line, bool last) {
  std::string text = line;
  if (in_place_ && !line.empty()) text.insert(0, "\r\x1b[K");  // Erase the line that stands there.
  if (!in_place_ || last) text += '\n';
  line_open_ = in_place_ && !last;
  // Nothing can be done about a terminal that is gone.
  static_cast<void>(::write(fd_, text.data(), text.size()) < 0);
}

double ProgressPrinter::seconds() const {
  return std::chrono::duration<double>(std::chrono::steady_clock::now() - start_).count();
}

}  // namespace kt::coproc
