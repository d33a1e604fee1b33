// The routes of a batch grouped by expert.
//
// A route is one (token, slot j) with a real expert. Expert e belongs to node e mod N. Rows of all per-route arrays are
// in this order: node, expert, item (rank order), token, slot. So the rows of one expert are contiguous, as are those
// of a node, and the row order does not depend on how the batch is cut into tasks.
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
  void group(std::span<const RoutesOfItem> items, std::int64_t num_experts, std::int64_t top_k, std::int64_t num_nodes);

  std::int64_t begin_of(std::int32_t expert) const { return first_row[static_cast<std::size_t>(expert)]; }
  std::int64_t rows_of(std::int32_t expert) const { return num_rows_of[static_cast<std::size_t>(expert)]; }

  std::int64_t num_rows = 0;
  std::vector<std::int64_t> first_row;    // [E].
  std::vector<std::int64_t> num_rows_of;  // [E].
  std::vector<std::int64_t> node_begin;   // [num_nodes + 1]: a node's rows.
  std::vector<std::int32_t> experts;      // Those with rows, most rows first, then by number.
  std::vector<std::int32_t> item;         // [num_rows]: whose row it is,
  std::vector<std::int32_t> token;        // the row of that item's [T, H] arrays,
  std::vector<std::int32_t> route;        // the row of that item's [T · top_k, …] arrays,
  std::vector<float> weight;              // its routing weight.
  std::vector<std::int32_t> row;          // Of every item's every slot, in item order: its row here; -1: sentinel.
  std::vector<std::int64_t> first_slot;   // [num_items]: where an item's slots begin in `row`.

 private:
  void count(std::span<const RoutesOfItem> items, std::int64_t num_experts, std::int64_t top_k);
  void order(std::int64_t num_experts, std::int64_t num_nodes);
  std::vector<std::int64_t> next_row_;
};

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
