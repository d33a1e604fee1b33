#include "coproc/experts/schedule.h"

#include <algorithm>

namespace kt::coproc {
namespace {

constexpr std::int64_t kTokensPerTask = 32;
// A slice of the weights that stays in L2 beside a tile of results and the rows streaming through.
constexpr std::int64_t kTaskWeightBytes = 262144;
// So that the last task to finish costs a worker at most an eighth of its time.
constexpr std::int64_t kTasksPerWorker = 8;
// An expert's weights take about as long to read as so many rows take to compute. A guess for planning only: 16 on the
// smallest machines, 50 on a server with AMX.
constexpr std::int64_t kRowsOfWeights = 32;

template <class Task>
void cut(std::int32_t owner, std::int64_t end, std::int64_t step, std::vector<Task>& tasks) {
  for (std::int64_t begin = 0; begin < end; begin += step) tasks.push_back({owner, begin, std::min(begin + step, end)});
}

}  // namespace

// Longest first to the worker with the least so far. An expert that would take that worker an eighth beyond its share
// is shared.
void plan_experts(const Routes& routes, std::int64_t node, std::int64_t num_nodes, int num_workers, ExpertPlan& plan) {
  plan.whole.clear();
  plan.shared.clear();
  std::int64_t total = 0;
  for (const std::int32_t e : routes.experts) {
    if (e % num_nodes == node) total += routes.rows_of(e) + kRowsOfWeights;
  }
  const std::int64_t share = total / num_workers + total / num_workers / kTasksPerWorker;
  std::vector<std::int64_t> loads(static_cast<std::size_t>(num_workers), 0);  // A heap, least first.
  const auto more = [](std::int64_t a, std::int64_t b) { return a > b; };
  for (const std::int32_t e : routes.experts) {
    if (e % num_nodes != node) continue;
    const std::int64_t load = loads.front() + routes.rows_of(e) + kRowsOfWeights;
    if (num_workers > 1 && load > share) {
      plan.shared.push_back(e);
      continue;
    }
    plan.whole.push_back(e);
    std::pop_heap(loads.begin(), loads.end(), more);
    loads.back() = load;
    std::push_heap(loads.begin(), loads.end(), more);
  }
}

void plan_rows(const Routes& routes, std::span<const std::int32_t> shared, std::vector<SharedTask>& tasks) {
  for (std::size_t i = 0; i < shared.size(); ++i) {
    cut(static_cast<std::int32_t>(i), routes.rows_of(shared[i]), kRowsPerTask, tasks);
  }
}

void plan_tokens(std::span<const RoutesOfItem> items, std::vector<TokenTask>& tasks) {
  tasks.clear();
  for (std::size_t i = 0; i < items.size(); ++i) {
    cut(static_cast<std::int32_t>(i), items[i].num_tokens, kTokensPerTask, tasks);
  }
}

void plan_panels(std::span<const std::int32_t> shared, std::int64_t num_panels, std::int64_t panel_bytes,
                 int num_workers, std::vector<SharedTask>& tasks) {
  const std::int64_t touched_bytes = static_cast<std::int64_t>(shared.size()) * num_panels * panel_bytes;
  const std::int64_t task_bytes = std::min(kTaskWeightBytes, touched_bytes / num_workers / kTasksPerWorker);
  const std::int64_t panels = std::max<std::int64_t>(task_bytes / panel_bytes / 2, 1) * 2;
  for (std::size_t i = 0; i < shared.size(); ++i) cut(static_cast<std::int32_t>(i), num_panels, panels, tasks);
}

void plan_tensors(std::span<const std::int32_t> shared, std::int64_t num_tensors, std::vector<SharedTask>& tasks) {
  for (std::size_t i = 0; i < shared.size(); ++i) cut(static_cast<std::int32_t>(i), num_tensors, 1, tasks);
}

}  // namespace kt::coproc
