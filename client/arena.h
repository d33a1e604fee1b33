// The client's allocator over its arena: where payloads lie between copy in and copy out.
//
//   arena  ┌ Boost's segment manager ┬ block ┬ free ┬ block ┬ … ┐   Its metadata lies in the arena, between the blocks;
//          └ (this process only)     ┴───────┴──────┴───────┴───┘   the daemon never reads it and gets offsets only.
//
// Invariants
//   1  A block starts at a multiple of kPayloadAlignment, counted from the arena's start.
//   2  A session's call holds no block while it waits for one. So every waiter gets its block: those held end.
//   3  Waiters are served in order of arrival: a large block is not starved by small ones.
#pragma once
#include <boost/interprocess/indexes/iset_index.hpp>
#include <boost/interprocess/managed_external_buffer.hpp>
#include <boost/interprocess/mem_algo/rbtree_best_fit.hpp>
#include <boost/interprocess/sync/mutex_family.hpp>
#include <condition_variable>
#include <cstddef>
#include <cstdint>
#include <mutex>
#include <optional>
#include <utility>

namespace kt::client {

class Arena;

// A block of the arena; freed when destroyed. Empty: no memory, offset 0.
class ArenaBlock {
 public:
  ArenaBlock() = default;
  ArenaBlock(Arena& arena, std::byte* data, std::uint64_t offset) : arena_(&arena), data_(data), offset_(offset) {}
  ArenaBlock(ArenaBlock&& other) noexcept
      : arena_(std::exchange(other.arena_, nullptr)), data_(other.data_), offset_(other.offset_) {}
  ArenaBlock& operator=(ArenaBlock&&) = delete;
  ~ArenaBlock();

  std::byte* data() const { return data_; }
  std::uint64_t offset() const { return offset_; }

 private:
  Arena* arena_ = nullptr;
  std::byte* data_ = nullptr;
  std::uint64_t offset_ = 0;
};

class Arena {
 public:
  // `memory` (aligned to a page) stays the caller's and must outlive the Arena and its blocks.
  Arena(std::byte* memory, std::uint64_t bytes);

  // The largest block an empty arena can give.
  std::uint64_t block_bytes_max() const { return block_bytes_max_; }

  // A block of `bytes` ≤ block_bytes_max(). Waits while other threads' blocks fill the arena. nullopt: close() was
  // called. 0 bytes: an empty block.
  std::optional<ArenaBlock> wait_allocate(std::uint64_t bytes);

  // Releases every waiter; wait_allocate refuses from now on. Blocks stay valid.
  void close();

 private:
  friend class ArenaBlock;
  using Buffer = boost::interprocess::basic_managed_external_buffer<
      char,
      boost::interprocess::rbtree_best_fit<boost::interprocess::null_mutex_family,
                                           boost::interprocess::offset_ptr<void>, 0>,
      boost::interprocess::iset_index>;

  void free(std::byte* data);

  std::byte* const memory_;
  std::mutex mutex_;
  std::condition_variable changed_;
  Buffer buffer_;
  std::uint64_t block_bytes_max_ = 0;
  std::uint64_t next_ticket_ = 0;     // Of the next caller …
  std::uint64_t serving_ticket_ = 0;  // … and of the one whose turn it is.
  bool closed_ = false;
};

}  // namespace kt::client
