// The last phase of a pass: from the experts' rows of results to the tokens' results.
#pragma once
#include <span>
#include <vector>

#include "coproc/experts/crew.h"
#include "coproc/experts/schedule.h"
#include "coproc/experts/stage.h"

namespace kt::coproc {

// With several nodes each node sums the routes of its own experts, and the sums are added in the order of the nodes:
// only the sums cross from one node to another.
class RouteSum {
 public:
  // targets[item]: [T, H] elements, the weighted or plain sums of the rows results[node], in slot order.
  struct Sum {
    std::span<const RoutesOfItem> batch;
    std::span<std::byte* const> targets;
    std::span<const std::byte* const> results;  // Of the nodes: [rows of the node, Hp].
    bool weighted;
  };
  void run(const Pass& pass, const Sum& what, Crew& crew);

 private:
  struct Part {
    std::vector<std::int32_t>
        slots;     // Of every slot, its row of the node's results; -1: a sentinel, or another node's.
    Scratch sums;  // [tokens of the batch, H] f32; with several nodes.
  };
  void find_slots(const Routes& routes);
  std::vector<Part> parts_;  // Of the nodes.
  std::vector<TokenTask> tasks_;
};

}  // namespace kt::coproc
