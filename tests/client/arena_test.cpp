#include "client/arena.h"

#include <algorithm>
#include <atomic>
#include <cstdlib>
#include <cstring>
#include <list>
#include <memory>
#include <random>
#include <vector>

#include "shm/protocol.h"
#include "tests/client/client_test.h"

namespace kt::client {
namespace {

using testing::HangWatchdog;
using testing::wait_until;

struct AlignedMemory {
  explicit AlignedMemory(std::size_t size)
      : bytes(size), data(static_cast<std::byte*>(std::aligned_alloc(4096, size))) {}
  ~AlignedMemory() { std::free(data); }
  AlignedMemory(const AlignedMemory&) = delete;
  AlignedMemory& operator=(const AlignedMemory&) = delete;
  const std::size_t bytes;
  std::byte* const data;
};

TEST(Arena, BlocksAreAlignedAndNeverOverlap) {
  const HangWatchdog watchdog;
  AlignedMemory memory(shm::kArenaBytesMin);
  Arena arena(memory.data, memory.bytes);
  const unsigned seed = 20;
  SCOPED_TRACE(::testing::Message() << "seed " << seed);
  std::mt19937 random(seed);
  struct Held {
    ArenaBlock block;
    std::uint64_t bytes;
    unsigned char mark;
  };
  std::list<Held> held;
  std::uint64_t held_bytes = 0;
  for (int i = 0; i < 1000; ++i) {
    const std::uint64_t bytes = 1 + random() % 40'000;
    // Half of the arena is always free in one of so few gaps that a small block fits.
    while (held_bytes + bytes > memory.bytes / 2) {
      auto victim = held.begin();
      std::advance(victim, static_cast<long>(random() % held.size()));
      const std::byte mark{victim->mark};
      const std::byte* const first = victim->block.data();
      ASSERT_TRUE(std::all_of(first, first + victim->bytes, [mark](std::byte byte) { return byte == mark; }));
      held_bytes -= victim->bytes;
      held.erase(victim);
    }
    auto block = arena.wait_allocate(bytes);
    ASSERT_TRUE(block.has_value());
    ASSERT_EQ(block->offset() % shm::kPayloadAlignment, 0u);
    ASSERT_LE(block->offset() + bytes, memory.bytes);
    ASSERT_EQ(block->data(), memory.data + block->offset());
    const auto mark = static_cast<unsigned char>(random());
    std::memset(block->data(), mark, bytes);
    held.push_back({*std::move(block), bytes, mark});
    held_bytes += bytes;
  }
}

TEST(Arena, TheLargestBlockIsNearlyTheArenaAndCanBeHadAgainAndAgain) {
  const HangWatchdog watchdog;
  AlignedMemory memory(shm::kArenaBytesMin);
  Arena arena(memory.data, memory.bytes);
  EXPECT_GT(arena.block_bytes_max(), memory.bytes - 16 * 1024);
  for (int i = 0; i < 10; ++i) {
    ASSERT_TRUE(arena.wait_allocate(arena.block_bytes_max()).has_value());
    ASSERT_TRUE(arena.wait_allocate(1).has_value());
  }
}

TEST(Arena, NoBytesNeedNoMemory) {
  AlignedMemory memory(shm::kArenaBytesMin);
  Arena arena(memory.data, memory.bytes);
  const auto everything = arena.wait_allocate(arena.block_bytes_max());
  const auto nothing = arena.wait_allocate(0);
  ASSERT_TRUE(nothing.has_value());
  EXPECT_EQ(nothing->offset(), 0u);
}

TEST(Arena, ACallerWaitsUntilAnotherThreadsBlockIsFreed) {
  const HangWatchdog watchdog;
  AlignedMemory memory(shm::kArenaBytesMin);
  Arena arena(memory.data, memory.bytes);
  auto first = std::make_unique<ArenaBlock>(*arena.wait_allocate(arena.block_bytes_max()));
  std::atomic<bool> done = false;
  std::thread other([&] {
    EXPECT_TRUE(arena.wait_allocate(4096).has_value());
    done = true;
  });
  std::this_thread::sleep_for(std::chrono::milliseconds(20));
  EXPECT_FALSE(done);
  first.reset();
  other.join();
  EXPECT_TRUE(done);
}

TEST(Arena, ALargeBlockIsNotStarvedBySmallOnes) {
  const HangWatchdog watchdog;
  AlignedMemory memory(shm::kArenaBytesMin);
  Arena arena(memory.data, memory.bytes);
  std::atomic<bool> stop = false;
  std::vector<std::thread> small;
  for (int i = 0; i < 3; ++i) {
    small.emplace_back([&] {
      std::optional<ArenaBlock> previous;
      while (!stop) {  // At every moment some small block is held.
        auto next = arena.wait_allocate(256);
        previous.reset();
        previous.emplace(*std::move(next));
        std::this_thread::yield();
        previous.reset();
      }
    });
  }
  for (int i = 0; i < 5; ++i) EXPECT_TRUE(arena.wait_allocate(arena.block_bytes_max()).has_value());
  stop = true;
  for (std::thread& thread : small) thread.join();
}

TEST(Arena, CloseReleasesEveryWaiterAndRefusesLaterOnes) {
  const HangWatchdog watchdog;
  AlignedMemory memory(shm::kArenaBytesMin);
  Arena arena(memory.data, memory.bytes);
  const auto everything = arena.wait_allocate(arena.block_bytes_max());
  std::vector<std::thread> waiters;
  for (int i = 0; i < 4; ++i) {
    waiters.emplace_back([&] { EXPECT_FALSE(arena.wait_allocate(4096).has_value()); });
  }
  std::this_thread::sleep_for(std::chrono::milliseconds(10));
  arena.close();
  for (std::thread& waiter : waiters) waiter.join();
  EXPECT_FALSE(arena.wait_allocate(1).has_value());
}

}  // namespace
}  // namespace kt::client
