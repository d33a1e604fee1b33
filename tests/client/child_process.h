// A child process of a test: started with fork and exec, never outlives the test.
#pragma once
#include <sys/types.h>

#include <chrono>
#include <optional>
#include <string>
#include <vector>

namespace kt::client::testing {

class ChildProcess {
 public:
  // Its standard output and error go to `log_path`; KT_COPROC… variables are not passed on. It gets SIGKILL when the
  // calling thread ends.
  ChildProcess(const std::vector<std::string>& command, std::string log_path);
  ChildProcess(ChildProcess&& other) noexcept;
  ChildProcess& operator=(ChildProcess&&) = delete;
  ~ChildProcess();  // Kills it.

  pid_t pid() const { return pid_; }
  void signal(int number) const;
  bool is_running();
  // Exit status, or 128 + n after signal n. nullopt: it still runs after `timeout`.
  std::optional<int> wait(std::chrono::seconds timeout = std::chrono::seconds(45));
  std::string log() const;  // What it has printed so far.

 private:
  pid_t pid_ = -1;
  std::optional<int> status_;
  std::string log_path_;
};

}  // namespace kt::client::testing
