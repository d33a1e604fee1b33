#include "client/arena.h"

#include <new>

#include "shm/base/result.h"
#include "shm/protocol.h"

namespace kt::client {

ArenaBlock::~ArenaBlock() {
  if (arena_ != nullptr) arena_->free(data_);
}

Arena::Arena(std::byte* memory, std::uint64_t bytes)
    : memory_(memory), buffer_(boost::interprocess::create_only, memory, bytes) {
  KT_CHECK(reinterpret_cast<std::uintptr_t>(memory) % shm::kPayloadAlignment == 0);
  // Headers and alignment cost less than a page or two; trying is surer than knowing Boost's arithmetic.
  constexpr std::uint64_t kGranule = 4096;
  for (std::uint64_t size = buffer_.get_free_memory() / kGranule * kGranule; size > 0; size -= kGranule) {
    void* const block = buffer_.allocate_aligned(size, shm::kPayloadAlignment, std::nothrow);
    if (block == nullptr) continue;
    buffer_.deallocate(block);
    block_bytes_max_ = size;
    return;
  }
}

std::optional<ArenaBlock> Arena::wait_allocate(std::uint64_t bytes) {
  if (bytes == 0) return ArenaBlock();
  KT_CHECK(bytes <= block_bytes_max_);
  std::unique_lock lock(mutex_);
  const std::uint64_t ticket = next_ticket_++;
  void* block = nullptr;
  changed_.wait(lock, [&] {
    if (closed_) return true;
    if (ticket != serving_ticket_) return false;
    block = buffer_.allocate_aligned(bytes, shm::kPayloadAlignment, std::nothrow);
    return block != nullptr;
  });
  if (block == nullptr) return std::nullopt;
  ++serving_ticket_;
  lock.unlock();
  changed_.notify_all();  // The next in line may find room as well.
  auto* const data = static_cast<std::byte*>(block);
  return ArenaBlock(*this, data, static_cast<std::uint64_t>(data - memory_));
}

void Arena::close() {
  {
    const std::lock_guard lock(mutex_);
    closed_ = true;
  }
  changed_.notify_all();
}

void Arena::free(std::byte* data) {
  {
    const std::lock_guard lock(mutex_);
    buffer_.deallocate(data);
  }
  changed_.notify_all();
}

}  // namespace kt::client
