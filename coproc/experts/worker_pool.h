// The pinned compute workers. Worker 0 is the thread that calls run(): the poller.
#pragma once
#include <cstdint>
#include <functional>
#include <memory>
#include <vector>

namespace kt::coproc {

class WorkerPool {
 public:
  // One worker per entry of `cpus` (CPU to pin to, or -1: not pinned). Starts cpus.size() - 1 threads; pins the caller
  // of run() on its first call. Idle workers spin briefly, then sleep.
  explicit WorkerPool(std::vector<int> cpus);
  ~WorkerPool();

  // Calls task(i, worker) for i in [0, num_tasks), dynamically over all workers; returns when all are done. Tasks must
  // not throw. Not reentrant.
  void run(std::int64_t num_tasks, const std::function<void(std::int64_t task, int worker)>& task);

  int num_workers() const;
  // Sum over workers of time spent in tasks. Any thread.
  std::uint64_t busy_ns() const;

 private:
  struct State;
  std::unique_ptr<State> state_;
};

}  // namespace kt::coproc
