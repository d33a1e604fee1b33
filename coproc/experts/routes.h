// The routes of a batch grouped by expert, and the tasks made of them.
//
// A route is one (token, slot j) with a real expert. Rows of all per-route arrays are in this order: expert, item (rank
// order), token, slot. So the rows of one expert are contiguous, and the row order does not depend on how the batch is
// cut into tasks.
#pragma once
#include <cstdint>
#include <span>
#include <vector>

namespace kt::coproc {

struct RoutesOfItem {
  const std::int32_t* ids = nullptr;  // [num_tokens, top_k], 0…E.
  const float* weights = nullptr;     // [num_tokens, top_k].
  std::uint32_t num_tokens = 0;
};

struct Routes {
  // Refills everything; keeps the memory.
  void group(std::span<const RoutesOfItem> items, std::int64_t num_experts, std::int64_t top_k);

  std::int64_t rows_of(std::int32_t expert) const {
    const auto e = static_cast<std::size_t>(expert);
    return first_row[e + 1] - first_row[e];
  }

  std::int64_t num_rows = 0;
  std::vector<std::int64_t> first_row;   // [E + 1].
  std::vector<std::int32_t> experts;     // Those with rows, most rows first, then by number.
  std::vector<std::int32_t> item;        // [num_rows]: whose row it is,
  std::vector<std::int32_t> token;       // the row of that item's [T, H] arrays,
  std::vector<std::int32_t> route;       // the row of that item's [T · top_k, …] arrays,
  std::vector<float> weight;             // its routing weight.
  std::vector<std::int32_t> row;         // Of every item's every slot, in item order: its row here; -1: sentinel.
  std::vector<std::int64_t> first_slot;  // [num_items]: where an item's slots begin in `row`.

 private:
  void count(std::span<const RoutesOfItem> items, std::int64_t num_experts, std::int64_t top_k);
  std::vector<std::int64_t> next_row_;
};

// Some rows of one expert, all columns.
struct RowTask {
  std::int32_t expert;
  std::int64_t begin;
  std::int64_t end;
};
// All rows of one expert, panels [begin, end) of its weights.
struct PanelTask {
  std::int32_t expert;
  std::int64_t begin;
  std::int64_t end;
};
// Some tokens of one item.
struct TokenTask {
  std::int32_t item;
  std::int64_t begin;
  std::int64_t end;
};

void plan_rows(const Routes& routes, std::vector<RowTask>& tasks);
void plan_tokens(std::span<const RoutesOfItem> items, std::vector<TokenTask>& tasks);
// Tasks of about min(256 KB of weights, 1/8 of a worker's share), in whole groups of `group` panels.
void plan_panels(const Routes& routes, std::int64_t num_panels, std::int64_t panel_bytes, std::int64_t group,
                 int num_workers, std::vector<PanelTask>& tasks);

// At most this many panels are in one task, so that the widest tile of results is known.
inline constexpr std::int64_t kTaskPanelsMax = 64;

// Calls visit(item, begin, end) for each run of rows of one item in [begin, end).
template <class Visit>
void for_each_run(const Routes& routes, std::int64_t begin, std::int64_t end, const Visit& visit) {
  while (begin < end) {
    const std::int32_t item = routes.item[static_cast<std::size_t>(begin)];
    std::int64_t stop = begin + 1;
    while (stop < end && routes.item[static_cast<std::size_t>(stop)] == item) ++stop;
    visit(static_cast<std::size_t>(item), begin, stop);
    begin = stop;
  }
}

}  // namespace kt::coproc
