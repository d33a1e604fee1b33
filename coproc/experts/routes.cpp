#include "coproc/experts/routes.h"

#include <algorithm>

#include "shm/base/result.h"

namespace kt::coproc {

void Routes::count(std::span<const RoutesOfItem> items, std::int64_t num_experts, std::int64_t top_k) {
  num_rows_of.assign(static_cast<std::size_t>(num_experts), 0);
  first_slot.clear();
  std::int64_t num_slots = 0;
  for (const RoutesOfItem& from : items) {
    first_slot.push_back(num_slots);
    const std::int64_t slots = from.num_tokens * top_k;
    num_slots += slots;
    for (std::int64_t i = 0; i < slots; ++i) {
      KT_DCHECK(from.ids[i] >= 0 && from.ids[i] <= num_experts);
      if (from.ids[i] < num_experts) ++num_rows_of[static_cast<std::size_t>(from.ids[i])];
    }
  }
  row.resize(static_cast<std::size_t>(num_slots));
}

// Where every expert's rows begin, and which experts have some.
void Routes::order(std::int64_t num_experts, std::int64_t num_nodes) {
  first_row.resize(static_cast<std::size_t>(num_experts));
  experts.clear();
  node_begin.clear();
  num_rows = 0;
  for (std::int64_t node = 0; node < num_nodes; ++node) {
    node_begin.push_back(num_rows);
    for (std::int64_t e = node; e < num_experts; e += num_nodes) {
      const auto expert = static_cast<std::int32_t>(e);
      first_row[static_cast<std::size_t>(e)] = num_rows;
      num_rows += rows_of(expert);
      if (rows_of(expert) > 0) experts.push_back(expert);
    }
  }
  node_begin.push_back(num_rows);
  std::sort(experts.begin(), experts.end(), [this](std::int32_t a, std::int32_t b) {
    return rows_of(a) != rows_of(b) ? rows_of(a) > rows_of(b) : a < b;
  });
}

void Routes::group(std::span<const RoutesOfItem> items, std::int64_t num_experts, std::int64_t top_k,
                   std::int64_t num_nodes) {
  count(items, num_experts, top_k);
  order(num_experts, num_nodes);
  item.resize(static_cast<std::size_t>(num_rows));
  token.resize(static_cast<std::size_t>(num_rows));
  route.resize(static_cast<std::size_t>(num_rows));
  weight.resize(static_cast<std::size_t>(num_rows));
  next_row_ = first_row;
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

}  // namespace kt::coproc
