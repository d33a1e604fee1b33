// The two kinds of memory of the experts: large mappings for a lifetime, and scratch that only grows.
#pragma once
#include <cstddef>
#include <cstdint>
#include <cstdlib>
#include <memory>
#include <string>
#include <utility>

#include "shm/base/align.h"
#include "shm/base/result.h"

namespace kt::coproc {

// Zero-filled anonymous memory of this process. Pages are taken when first touched, huge ones where there are any.
class Memory {
 public:
  // Of NUMA node `node` if it can be; -1: any. kNoResources where so much is not free (coproc/machine/memory_room.h),
  // and when the system refuses.
  static Result<Memory> map(std::uint64_t bytes, const std::string& purpose, const std::string& fix, int node = -1);
  Memory() = default;
  Memory(Memory&& other) noexcept
      : mapping_(std::exchange(other.mapping_, nullptr)),
        mapped_bytes_(std::exchange(other.mapped_bytes_, 0)),
        data_(std::exchange(other.data_, nullptr)) {}
  Memory& operator=(Memory&& other) noexcept {
    std::swap(mapping_, other.mapping_);
    std::swap(mapped_bytes_, other.mapped_bytes_);
    std::swap(data_, other.data_);
    return *this;
  }
  Memory(const Memory&) = delete;
  Memory& operator=(const Memory&) = delete;
  ~Memory();

  std::byte* data() const { return data_; }

 private:
  void* mapping_ = nullptr;
  std::uint64_t mapped_bytes_ = 0;
  std::byte* data_ = nullptr;
};

// Scratch that keeps its largest size. Growing loses the contents.
class Scratch {
 public:
  // At least `bytes` bytes at a multiple of 64.
  std::byte* ensure(std::int64_t bytes) {
    if (bytes > bytes_) {
      constexpr std::uint64_t kAlignment = 64;
      const auto wanted = round_up(static_cast<std::uint64_t>(bytes), kAlignment);
      memory_.reset();
      bytes_ = 0;
      memory_.reset(static_cast<std::byte*>(std::aligned_alloc(kAlignment, wanted)));
      KT_CHECK(memory_ != nullptr);
      bytes_ = static_cast<std::int64_t>(wanted);
    }
    return memory_.get();
  }
  float* ensure_floats(std::int64_t count) {
    return static_cast<float*>(static_cast<void*>(ensure(count * static_cast<std::int64_t>(sizeof(float)))));
  }
  std::byte* data() const { return memory_.get(); }
  float* floats() const { return static_cast<float*>(static_cast<void*>(memory_.get())); }

 private:
  struct Free {
    void operator()(std::byte* p) const { std::free(p); }
  };
  std::unique_ptr<std::byte, Free> memory_;
  std::int64_t bytes_ = 0;
};

}  // namespace kt::coproc
