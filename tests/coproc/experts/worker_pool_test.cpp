#include "coproc/experts/worker_pool.h"

#include <gtest/gtest.h>
#include <sched.h>

#include <atomic>
#include <chrono>
#include <thread>
#include <vector>

namespace kt::test {
namespace {

using coproc::WorkerPool;

std::vector<int> unpinned(int num_workers) { return std::vector<int>(static_cast<std::size_t>(num_workers), -1); }

// Plain memory written by tasks and read by the caller: what TSan judges the ordering by.
TEST(WorkerPool, RunsEveryTaskOnceAndReturnsWhenAllAreDone) {
  for (const int num_workers : {1, 2, 3, 5}) {
    WorkerPool pool(unpinned(num_workers));
    EXPECT_EQ(pool.num_workers(), num_workers);
    std::vector<int> counts;
    for (const std::int64_t num_tasks : {0, 1, 2, 3, 17, 1000}) {
      counts.assign(static_cast<std::size_t>(num_tasks), 0);
      pool.run(num_tasks, [&](std::int64_t task, int worker) {
        EXPECT_GE(worker, 0);
        EXPECT_LT(worker, num_workers);
        ++counts[static_cast<std::size_t>(task)];
      });
      EXPECT_EQ(counts, std::vector<int>(counts.size(), 1));
    }
  }
}

// Each run reads what the run before wrote, from other threads, thousands of times without pause.
TEST(WorkerPool, OrdersPhasesThatFollowEachOther) {
  constexpr std::size_t kTasks = 8;
  WorkerPool pool(unpinned(3));
  std::vector<std::int64_t> values(kTasks, 0);
  std::vector<std::int64_t> next(kTasks);
  for (std::int64_t phase = 0; phase < 3000; ++phase) {
    pool.run(kTasks, [&](std::int64_t task, int) {
      const auto n = static_cast<std::size_t>(task);
      next[n] = values[(n + 1) % kTasks] + 1;
    });
    values.swap(next);
  }
  EXPECT_EQ(values, std::vector<std::int64_t>(kTasks, 3000));
}

TEST(WorkerPool, WakesWorkersThatFellAsleep) {
  WorkerPool pool(unpinned(3));
  for (int round = 0; round < 20; ++round) {
    std::this_thread::sleep_for(std::chrono::milliseconds(2));  // Far beyond the spin.
    std::atomic<int> inside = 0;
    // Every task waits for the others: only three threads at once can finish, and the test's time limit judges.
    pool.run(3, [&](std::int64_t, int) {
      ++inside;
      while (inside.load() < 3) std::this_thread::yield();
    });
    EXPECT_EQ(inside.load(), 3);
  }
}

TEST(WorkerPool, NeverGivesOneWorkerNumberToTwoThreadsAtOnce) {
  WorkerPool pool(unpinned(4));
  std::vector<std::atomic<int>> users(4);
  for (int round = 0; round < 50; ++round) {
    pool.run(64, [&](std::int64_t, int worker) {
      EXPECT_EQ(users[static_cast<std::size_t>(worker)].fetch_add(1), 0);
      std::this_thread::yield();
      users[static_cast<std::size_t>(worker)].fetch_sub(1);
    });
  }
}

TEST(WorkerPool, RunsTheTasksOfEveryNodeOnceAndCountsStolenOnes) {
  WorkerPool pool(std::vector<std::vector<int>>{{-1, -1}, {-1}});
  EXPECT_EQ(pool.num_nodes(), 2);
  EXPECT_EQ(pool.num_workers(), 3);
  EXPECT_EQ(pool.num_workers_of(0), 2);
  EXPECT_EQ(pool.num_workers_of(1), 1);
  std::atomic<std::uint64_t> num_stolen = 0;
  for (const auto& num_tasks : {std::vector<std::int64_t>{100, 7}, {0, 30}, {1, 0}, {0, 0}}) {
    std::vector<std::vector<int>> counts;
    for (const std::int64_t n : num_tasks) counts.emplace_back(static_cast<std::size_t>(n), 0);
    pool.run_on_nodes(num_tasks, [&](int node, std::int64_t task, int worker) {
      ++counts[static_cast<std::size_t>(node)][static_cast<std::size_t>(task)];
      const int home = worker < 2 ? 0 : 1;
      if (node != home) ++num_stolen;
    });
    for (const auto& of_node : counts) EXPECT_EQ(of_node, std::vector<int>(of_node.size(), 1));
  }
  EXPECT_EQ(pool.stolen_tasks(), num_stolen.load());
}

// Two tasks of one node that has one worker, each waiting for the other: the second worker must come from the other
// node.
TEST(WorkerPool, HelpsAnotherNodeWhenItsOwnHasNothingLeft) {
  WorkerPool pool(std::vector<std::vector<int>>{{-1}, {-1}});
  for (const auto& num_tasks : {std::vector<std::int64_t>{0, 2}, {2, 0}}) {
    std::atomic<int> inside = 0;
    pool.run_on_nodes(num_tasks, [&](int, std::int64_t, int) {
      ++inside;
      while (inside.load() < 2) std::this_thread::yield();
    });
    EXPECT_EQ(inside.load(), 2);
  }
  EXPECT_EQ(pool.stolen_tasks(), 2u);
}

TEST(WorkerPool, CountsTheTimeSpentInTasks) {
  WorkerPool pool(unpinned(2));
  EXPECT_EQ(pool.busy_ns(), 0u);
  pool.run(2, [](std::int64_t, int) { std::this_thread::sleep_for(std::chrono::milliseconds(3)); });
  EXPECT_GE(pool.busy_ns(), 6'000'000u);
}

TEST(WorkerPool, PinsItsThreadsAndTheCaller) {
  cpu_set_t allowed;
  ASSERT_EQ(::sched_getaffinity(0, sizeof allowed, &allowed), 0);
  int cpu = 0;
  while (CPU_ISSET(static_cast<std::size_t>(cpu), &allowed) == 0) ++cpu;
  std::thread caller([cpu] {  // A thread of its own: the pinning stays.
    WorkerPool pool(std::vector<int>{cpu, cpu});
    std::atomic<int> inside = 0;
    pool.run(2, [&](std::int64_t, int) {
      ++inside;
      while (inside.load() < 2) std::this_thread::yield();  // One task for each.
      cpu_set_t mine;
      EXPECT_EQ(::sched_getaffinity(0, sizeof mine, &mine), 0);
      EXPECT_EQ(CPU_COUNT(&mine), 1);
      EXPECT_NE(CPU_ISSET(static_cast<std::size_t>(cpu), &mine), 0);
    });
  });
  caller.join();
}

}  // namespace
}  // namespace kt::test
