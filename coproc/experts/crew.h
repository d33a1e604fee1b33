// The workers of the pool with their scratch memory, and the phases they run: all wait for the last one at its end.
#pragma once
#include <span>
#include <vector>

#include "coproc/experts/stage.h"
#include "coproc/experts/worker_pool.h"

namespace kt::coproc {

class Crew {
 public:
  explicit Crew(WorkerPool& pool) : pool_(pool), workers_(static_cast<std::size_t>(pool.num_workers())) {}

  int num_nodes() const { return pool_.num_nodes(); }
  int num_workers_of(std::size_t node) const { return pool_.num_workers_of(static_cast<int>(node)); }
  std::span<Worker> workers() { return workers_; }
  std::int64_t num_phases() const { return num_phases_; }  // Since begin().
  void begin() {
    num_phases_ = 0;
    for (Worker& worker : workers_) worker.clock.seconds.fill(0);
  }

  // Calls body(node, index, worker) for the tasks of every node; nothing where there are none. The clock has started.
  template <class Body>
  void run_on_nodes(std::span<const std::int64_t> num_tasks, const Body& body) {
    std::int64_t total = 0;
    for (const std::int64_t count : num_tasks) total += count;
    if (total == 0) return;
    ++num_phases_;
    pool_.run_on_nodes(num_tasks, [&](int node, std::int64_t index, int worker_idx) {
      Worker& worker = workers_[static_cast<std::size_t>(worker_idx)];
      worker.clock.start();
      body(static_cast<std::size_t>(node), static_cast<std::size_t>(index), worker);
    });
  }
  // body(index, worker), whatever the node.
  template <class Body>
  void run(std::int64_t num_tasks, const Body& body) {
    if (num_tasks == 0) return;
    ++num_phases_;
    pool_.run(num_tasks, [&](std::int64_t index, int worker_idx) {
      Worker& worker = workers_[static_cast<std::size_t>(worker_idx)];
      worker.clock.start();
      body(static_cast<std::size_t>(index), worker);
    });
  }

 private:
  WorkerPool& pool_;
  std::vector<Worker> workers_;
  std::int64_t num_phases_ = 0;
};

}  // namespace kt::coproc
