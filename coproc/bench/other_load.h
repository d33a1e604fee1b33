// Whether other processes, or other guests of this machine's host, took CPU time while something was measured.
#pragma once
#include <chrono>

namespace kt::coproc {

// Watches from its construction on.
class OtherLoad {
 public:
  OtherLoad() : begin_(now()) {}

  // More than 5 % of all CPUs went elsewhere. What /proc/stat does not tell is no disturbance.
  bool is_disturbed() const;

 private:
  struct Reading {
    std::chrono::steady_clock::time_point time;
    double busy_seconds = 0;  // Of all CPUs, this process included; stolen time too.
    double own_seconds = 0;
    bool is_known = false;
  };
  static Reading now();
  Reading begin_;
};

}  // namespace kt::coproc
