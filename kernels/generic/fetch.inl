// Bringing the memory that comes next to L2 while a kernel computes: a few lines at each of its steps.
#pragma once
#include "kernels/generic/panel.inl"

namespace kt::kernels::KT_TABLE {
namespace {

// Spreads the lines of a Fetch evenly over num_ticks calls of tick().
class Fetcher {
 public:
  Fetcher(const Fetch& fetch, std::int64_t num_ticks)
      : line_(fetch.data),
        block_end_(fetch.data + fetch.block_bytes),
        gap_(fetch.stride - fetch.block_bytes),
        block_bytes_(fetch.block_bytes),
        num_lines_(fetch.count * (fetch.block_bytes / kLineBytes)),
        num_ticks_(num_ticks) {}

  void tick() {
    for (due_ += num_lines_; due_ >= num_ticks_; due_ -= num_ticks_) {
      __builtin_prefetch(line_, 0, 2);
      line_ += kLineBytes;
      if (line_ != block_end_) continue;
      line_ += gap_;
      block_end_ = line_ + block_bytes_;
    }
  }

 private:
  const std::byte* line_;
  const std::byte* block_end_;
  std::int64_t gap_;
  std::int64_t block_bytes_;
  std::int64_t num_lines_;
  std::int64_t num_ticks_;
  std::int64_t due_ = 0;  // Lines, times num_ticks_.
};

}  // namespace
}  // namespace kt::kernels::KT_TABLE
