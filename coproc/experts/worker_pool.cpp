// How run() and the helpers meet. `gate` holds an open bit and the number of helpers inside.
//
//   run()    writes the job (task, the lists), opens the gate (G0), bumps `generation` and wakes sleepers,
//            works, closes the gate, waits until nobody is inside (G3)
//   helper   waits for another generation, enters if the gate is open (G1), works, leaves (G2)
//
// A helper that wakes late finds the gate closed and goes back to sleep: run() never waits for a thread the system has
// not scheduled, only for tasks that have begun.
//
// Invariants
//   P1  The job is written only while the gate is closed and nobody is inside.
//   P2  A helper reads the job only between entering and leaving.
// Ordering pairs
//   G0 open store-release  ↔ G1 enter CAS-acquire      the job
//   G2 leave RMW-release   ↔ G3 empty load-acquire     the tasks' results
#include "coproc/experts/worker_pool.h"

#include <pthread.h>
#include <sched.h>

#include <atomic>
#include <chrono>
#include <string>
#include <thread>

#include "shm/base/result.h"

namespace kt::coproc {
namespace {

using Clock = std::chrono::steady_clock;
// Phases of one layer follow each other within microseconds; longer waits must leave the core to the ranks.
constexpr std::chrono::microseconds kSpin{50};
constexpr std::uint32_t kOpen = 1u << 31;

void relax() {
#if defined(__x86_64__)
  __builtin_ia32_pause();
#else
  std::this_thread::yield();
#endif
}

// Whether `condition` came true within kSpin.
template <class Condition>
bool spin_until(const Condition& condition) {
  constexpr int kChecksPerClockRead = 64;
  const auto deadline = Clock::now() + kSpin;
  do {
    for (int i = 0; i < kChecksPerClockRead; ++i) {
      if (condition()) return true;
      relax();
    }
  } while (Clock::now() < deadline);
  return false;
}

// A CPU outside the affinity mask leaves the thread unpinned: slower, not wrong.
void pin_this_thread(int cpu) {
  if (cpu < 0 || cpu >= CPU_SETSIZE) return;
  cpu_set_t set;
  CPU_ZERO(&set);
  CPU_SET(static_cast<std::size_t>(cpu), &set);
  static_cast<void>(::pthread_setaffinity_np(::pthread_self(), sizeof set, &set));
}

}  // namespace

struct WorkerPool::State {
  struct alignas(128) Worker {
    std::atomic<std::uint64_t> busy_ns{0};
    std::atomic<std::uint64_t> stolen{0};
    int cpu = -1;
    std::size_t node = 0;
    std::thread thread;  // Not of worker 0.
  };
  // Tasks of a node, or of everybody. On a cache line of its own: `next` is taken by everybody in every task.
  struct alignas(128) List {
    std::atomic<std::int64_t> next{0};
    std::int64_t num_tasks = 0;
  };

  explicit State(const std::vector<std::vector<int>>& cpus_of_nodes);

  void help(int worker);
  bool enter();
  void leave();
  void work(int worker);
  void close_and_wait();

  alignas(128) std::atomic<std::uint32_t> gate{0};
  alignas(128) std::atomic<std::uint32_t> generation{0};
  alignas(128) const NodeTask* task = nullptr;
  std::size_t num_lists = 0;  // In this run: 1, or one per node.
  std::vector<List> lists;    // One per node.
  std::vector<int> num_workers_of;
  std::vector<Worker> workers;
  bool caller_pinned = false;
  std::atomic<bool> stop{false};
};

bool WorkerPool::State::enter() {
  std::uint32_t value = gate.load(std::memory_order_relaxed);
  while ((value & kOpen) != 0) {
    if (gate.compare_exchange_weak(value, value + 1, std::memory_order_acquire, std::memory_order_relaxed)) {  // G1
      return true;
    }
  }
  return false;
}

void WorkerPool::State::leave() {
  const std::uint32_t before = gate.fetch_sub(1, std::memory_order_release);  // G2
  if (before == 1) gate.notify_one();  // Closed, and the last one out: run() may sleep.
}

void WorkerPool::State::work(int worker) {
  Worker& me = workers[static_cast<std::size_t>(worker)];
  const auto begin = Clock::now();
  bool worked = false;
  for (std::size_t n = 0; n < num_lists; ++n) {
    const std::size_t list_idx = (me.node + n) % num_lists;
    List& list = lists[list_idx];
    while (true) {
      const std::int64_t index = list.next.fetch_add(1, std::memory_order_relaxed);
      if (index >= list.num_tasks) break;
      worked = true;
      if (n > 0) me.stolen.fetch_add(1, std::memory_order_relaxed);
      (*task)(static_cast<int>(list_idx), index, worker);
    }
  }
  if (!worked) return;
  const auto spent = std::chrono::duration_cast<std::chrono::nanoseconds>(Clock::now() - begin);
  me.busy_ns.fetch_add(static_cast<std::uint64_t>(spent.count()), std::memory_order_relaxed);
}

void WorkerPool::State::help(int worker) {
  ::pthread_setname_np(::pthread_self(), ("kt-worker-" + std::to_string(worker)).c_str());
  pin_this_thread(workers[static_cast<std::size_t>(worker)].cpu);
  std::uint32_t seen = 0;
  while (true) {
    const auto has_news = [&] { return generation.load(std::memory_order_acquire) != seen; };
    if (!spin_until(has_news)) generation.wait(seen, std::memory_order_acquire);
    seen = generation.load(std::memory_order_acquire);
    if (stop.load(std::memory_order_relaxed)) return;
    if (enter()) {
      work(worker);
      leave();
    }
  }
}

void WorkerPool::State::close_and_wait() {
  gate.fetch_and(~kOpen, std::memory_order_relaxed);
  const auto is_empty = [&] { return gate.load(std::memory_order_acquire) == 0; };  // G3
  if (spin_until(is_empty)) return;
  for (std::uint32_t inside = gate.load(std::memory_order_acquire); inside != 0;
       inside = gate.load(std::memory_order_acquire)) {
    gate.wait(inside, std::memory_order_acquire);
  }
}

WorkerPool::State::State(const std::vector<std::vector<int>>& cpus_of_nodes) : lists(cpus_of_nodes.size()) {
  std::size_t num_workers = 0;
  for (const std::vector<int>& cpus : cpus_of_nodes) {
    KT_CHECK(!cpus.empty());
    num_workers_of.push_back(static_cast<int>(cpus.size()));
    num_workers += cpus.size();
  }
  workers = std::vector<Worker>(num_workers);
  std::size_t worker = 0;
  for (std::size_t node = 0; node < cpus_of_nodes.size(); ++node) {
    for (const int cpu : cpus_of_nodes[node]) {
      workers[worker].node = node;
      workers[worker++].cpu = cpu;
    }
  }
}

WorkerPool::WorkerPool(std::vector<int> cpus) : WorkerPool(std::vector<std::vector<int>>{std::move(cpus)}) {}

WorkerPool::WorkerPool(const std::vector<std::vector<int>>& cpus_of_nodes)
    : state_(std::make_unique<State>(cpus_of_nodes)) {
  KT_CHECK(!state_->workers.empty());
  for (std::size_t i = 1; i < state_->workers.size(); ++i) {
    state_->workers[i].thread = std::thread([state = state_.get(), i] { state->help(static_cast<int>(i)); });
  }
}

WorkerPool::~WorkerPool() {
  state_->stop.store(true, std::memory_order_relaxed);
  state_->generation.fetch_add(1, std::memory_order_release);
  state_->generation.notify_all();
  for (auto& worker : state_->workers) {
    if (worker.thread.joinable()) worker.thread.join();
  }
}

void WorkerPool::run(std::int64_t num_tasks, const std::function<void(std::int64_t task, int worker)>& task) {
  run_on_nodes({&num_tasks, 1}, [&](int, std::int64_t index, int worker) { task(index, worker); });
}

void WorkerPool::run_on_nodes(std::span<const std::int64_t> num_tasks, const NodeTask& task) {
  State& s = *state_;
  KT_CHECK(num_tasks.size() == 1 || num_tasks.size() == s.lists.size());
  if (!s.caller_pinned) {
    s.caller_pinned = true;
    pin_this_thread(s.workers[0].cpu);
  }
  std::int64_t total = 0;
  for (std::size_t list = 0; list < num_tasks.size(); ++list) {
    s.lists[list].num_tasks = num_tasks[list];
    s.lists[list].next.store(0, std::memory_order_relaxed);
    total += num_tasks[list];
  }
  if (total <= 0) return;
  s.task = &task;
  s.num_lists = num_tasks.size();
  const bool alone = (total == 1 && s.num_lists == 1) || s.workers.size() == 1;
  if (alone) {
    s.work(0);
    return;
  }
  s.gate.store(kOpen, std::memory_order_release);  // G0
  s.generation.fetch_add(1, std::memory_order_release);
  s.generation.notify_all();
  s.work(0);
  s.close_and_wait();
}

int WorkerPool::num_workers() const { return static_cast<int>(state_->workers.size()); }
int WorkerPool::num_nodes() const { return static_cast<int>(state_->lists.size()); }
int WorkerPool::num_workers_of(int node) const { return state_->num_workers_of[static_cast<std::size_t>(node)]; }

std::uint64_t WorkerPool::busy_ns() const {
  std::uint64_t sum = 0;
  for (const auto& worker : state_->workers) sum += worker.busy_ns.load(std::memory_order_relaxed);
  return sum;
}

std::uint64_t WorkerPool::stolen_tasks() const {
  std::uint64_t sum = 0;
  for (const auto& worker : state_->workers) sum += worker.stolen.load(std::memory_order_relaxed);
  return sum;
}

}  // namespace kt::coproc
