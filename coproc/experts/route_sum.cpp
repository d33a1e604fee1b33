#include "coproc/experts/route_sum.h"

#include <algorithm>

#include "coproc/experts/products.h"

namespace kt::coproc {
namespace {

constexpr std::int64_t kSumTokens = 4;  // Whose f32 sums stay in L1.

}  // namespace

void RouteSum::find_slots(const Routes& routes) {
  for (std::size_t n = 0; n < parts_.size(); ++n) {
    const std::int64_t begin = routes.node_begin[n];
    const std::int64_t end = routes.node_begin[n + 1];
    parts_[n].slots.resize(routes.row.size());
    for (std::size_t slot = 0; slot < routes.row.size(); ++slot) {
      const std::int64_t row = routes.row[slot];
      parts_[n].slots[slot] = row >= begin && row < end ? static_cast<std::int32_t>(row - begin) : -1;
    }
  }
}

void RouteSum::run(const Pass& pass, const Sum& what, Crew& crew) {
  const std::int64_t hidden = pass.hidden;
  const std::int64_t top_k = pass.top_k;
  const Routes& routes = pass.routes;
  parts_.resize(what.results.size());
  find_slots(routes);
  plan_tokens(what.batch, tasks_);
  const auto first_slot = [&](const TokenTask& task) {
    return routes.first_slot[static_cast<std::size_t>(task.item)] + task.begin * top_k;
  };
  // sum[tokens of the task, H] over the routes of one node.
  const auto sum_node = [&](std::size_t node, const TokenTask& task, float* sum) {
    const float* weights = what.batch[static_cast<std::size_t>(task.item)].weights + task.begin * top_k;
    pass.table.sum_routes({.rows = what.results[node],
                           .ld_rows = pass.hidden_padded,
                           .route_row = parts_[node].slots.data() + first_slot(task),
                           .weight = what.weighted ? weights : nullptr,
                           .num_tokens = task.end - task.begin,
                           .top_k = top_k,
                           .n = hidden,
                           .sum = sum,
                           .ld_sum = hidden});
  };
  const auto sums_of = [&](std::size_t node, const TokenTask& task) {
    return parts_[node].sums.floats() + first_slot(task) / top_k * hidden;
  };
  if (parts_.size() > 1) {
    for (Part& part : parts_) part.sums.ensure_floats(static_cast<std::int64_t>(routes.row.size()) / top_k * hidden);
    const std::vector<std::int64_t> num_tasks(parts_.size(), static_cast<std::int64_t>(tasks_.size()));
    crew.run_on_nodes(num_tasks, [&](std::size_t node, std::size_t index, Worker& worker) {
      sum_node(node, tasks_[index], sums_of(node, tasks_[index]));
      worker.clock.lap(StageId::kSum);
    });
  }
  crew.run(static_cast<std::int64_t>(tasks_.size()), [&](std::size_t index, Worker& worker) {
    float* sum = worker.tile.ensure_floats(std::max(kTileFloats, kSumTokens * hidden));
    TokenTask part = tasks_[index];
    for (const std::int64_t end = part.end; part.begin < end; part.begin = part.end) {
      part.end = std::min(part.begin + kSumTokens, end);
      const std::int64_t count = part.end - part.begin;
      if (parts_.size() == 1) {
        sum_node(0, part, sum);
      } else {
        std::copy_n(sums_of(0, part), count * hidden, sum);
        for (std::size_t n = 1; n < parts_.size(); ++n) {
          const float* more = sums_of(n, part);
          for (std::int64_t at = 0; at < count * hidden; ++at) sum[at] += more[at];
        }
      }
      std::byte* target = what.targets[static_cast<std::size_t>(part.item)];
      pass.table.round_rows(sum, hidden, count, hidden, 1.0f, target + part.begin * hidden * pass.element_bytes,
                            hidden);
    }
    worker.clock.lap(StageId::kSum);
  });
}

}  // namespace kt::coproc
