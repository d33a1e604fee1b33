#include "coproc/experts/routes.h"

#include <algorithm>

#include "shm/base/result.h"

namespace kt::coproc {
namespace {

constexpr std::int64_t kRowsPerTask = 128;
constexpr std::int64_t kTokensPerTask = 64;
// A slice of the weights that stays in L2 beside a tile of results and the rows streaming through.
constexpr std::int64_t kTaskWeightBytes = 262144;
// So that the last task to finish costs a worker at most an eighth of its time.
constexpr std::int64_t kTasksPerWorker = 8;

template <class Task>
void cut(std::int32_t owner, std::int64_t begin, std::int64_t end, std::int64_t step, std::vector<Task>& tasks) {
  for (; begin < end; begin += step) tasks.push_back({owner, begin, std::min(begin + step, end)});
}

}  // namespace

void Routes::count(std::span<const RoutesOfItem> items, std::int64_t num_experts, std::int64_t top_k) {
  first_row.assign(static_cast<std::size_t>(num_experts) + 1, 0);
  first_slot.clear();
  std::int64_t num_slots = 0;
  for (const RoutesOfItem& from : items) {
    first_slot.push_back(num_slots);
    const std::int64_t slots = from.num_tokens * top_k;
    num_slots += slots;
    for (std::int64_t i = 0; i < slots; ++i) {
      KT_DCHECK(from.ids[i] >= 0 && from.ids[i] <= num_experts);
      if (from.ids[i] < num_experts) ++first_row[static_cast<std::size_t>(from.ids[i]) + 1];
    }
  }
  experts.clear();
  for (std::int32_t e = 0; e < num_experts; ++e) {
    std::int64_t& rows = first_row[static_cast<std::size_t>(e) + 1];
    if (rows > 0) experts.push_back(e);
    rows += first_row[static_cast<std::size_t>(e)];
  }
  num_rows = first_row.back();
  row.resize(static_cast<std::size_t>(num_slots));
  std::stable_sort(experts.begin(), experts.end(),
                   [this](std::int32_t a, std::int32_t b) { return rows_of(a) > rows_of(b); });
}

void Routes::group(std::span<const RoutesOfItem> items, std::int64_t num_experts, std::int64_t top_k) {
  count(items, num_experts, top_k);
  item.resize(static_cast<std::size_t>(num_rows));
  token.resize(static_cast<std::size_t>(num_rows));
  route.resize(static_cast<std::size_t>(num_rows));
  weight.resize(static_cast<std::size_t>(num_rows));
  next_row_.assign(first_row.begin(), first_row.end() - 1);
  for (std::size_t i = 0; i < items.size(); ++i) {
    std::int32_t* rows_of_item = row.data() + first_slot[i];
    for (std::int64_t slot = 0; slot < items[i].num_tokens * top_k; ++slot) {
      const std::int32_t expert = items[i].ids[slot];
      if (expert == num_experts) {
        rows_of_item[slot] = -1;
        continue;
      }
      const std::int64_t to = next_row_[static_cast<std::size_t>(expert)]++;
      const auto index = static_cast<std::size_t>(to);
      item[index] = static_cast<std::int32_t>(i);
      token[index] = static_cast<std::int32_t>(slot / top_k);
      route[index] = static_cast<std::int32_t>(slot);
      weight[index] = items[i].weights[slot];
      rows_of_item[slot] = static_cast<std::int32_t>(to);
    }
  }
}

void plan_rows(const Routes& routes, std::vector<RowTask>& tasks) {
  tasks.clear();
  for (const std::int32_t e : routes.experts) {
    const std::int64_t first = routes.first_row[static_cast<std::size_t>(e)];
    cut(e, first, first + routes.rows_of(e), kRowsPerTask, tasks);
  }
}

void plan_tokens(std::span<const RoutesOfItem> items, std::vector<TokenTask>& tasks) {
  tasks.clear();
  for (std::size_t i = 0; i < items.size(); ++i) {
    cut(static_cast<std::int32_t>(i), 0, items[i].num_tokens, kTokensPerTask, tasks);
  }
}

void plan_panels(const Routes& routes, std::int64_t num_panels, std::int64_t panel_bytes, std::int64_t group,
                 int num_workers, std::vector<PanelTask>& tasks) {
  tasks.clear();
  const std::int64_t touched_bytes = static_cast<std::int64_t>(routes.experts.size()) * num_panels * panel_bytes;
  const std::int64_t task_bytes = std::min(kTaskWeightBytes, touched_bytes / num_workers / kTasksPerWorker);
  const std::int64_t panels = std::clamp(task_bytes / panel_bytes, group, kTaskPanelsMax) / group * group;
  for (const std::int32_t e : routes.experts) cut(e, 0, num_panels, panels, tasks);
}

}  // namespace kt::coproc
