// The pinned compute workers, in one group per NUMA node. Worker 0 is the thread that calls run(): the poller.
#pragma once
#include <cstdint>
#include <functional>
#include <memory>
#include <span>
#include <vector>

namespace kt::coproc {

class WorkerPool {
 public:
  // One worker per entry of `cpus` (CPU to pin to, or -1: not pinned), all of one node. Starts cpus.size() - 1 threads;
  // pins the caller of run() on its first call. Idle workers spin briefly, then sleep.
  explicit WorkerPool(std::vector<int> cpus);
  // The CPUs node by node, at least one each; workers are numbered in that order.
  explicit WorkerPool(const std::vector<std::vector<int>>& cpus_of_nodes);
  ~WorkerPool();

  // Calls task(i, worker) for i in [0, num_tasks), dynamically over all workers; returns when all are done. Tasks must
  // not throw. Not reentrant.
  void run(std::int64_t num_tasks, const std::function<void(std::int64_t task, int worker)>& task);

  // The same with a list of tasks for every node: task(node, i, worker) for i in [0, num_tasks[node]). A worker takes
  // those of its own node first, then helps the others.
  using NodeTask = std::function<void(int node, std::int64_t task, int worker)>;
  void run_on_nodes(std::span<const std::int64_t> num_tasks, const NodeTask& task);

  int num_workers() const;
  int num_nodes() const;
  int num_workers_of(int node) const;
  // Sum over workers of time spent in tasks. Any thread.
  std::uint64_t busy_ns() const;
  // Tasks that a worker took from another node's list. Any thread.
  std::uint64_t stolen_tasks() const;

 private:
  struct State;
  std::unique_ptr<State> state_;
};

}  // namespace kt::coproc
