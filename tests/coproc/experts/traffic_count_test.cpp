// The account of bytes (coproc/experts/traffic.h) against the operands of the kernels that really run: every function
// of the scalar table is wrapped by one that counts what it reads and writes. Two caches can be told apart without a
// model of one: so small that every array of a block is moved by each stage, and so large that none is.
#include <gtest/gtest.h>

#include <algorithm>
#include <array>
#include <atomic>
#include <string>

#include "coproc/experts/adapter_layer.h"
#include "tests/coproc/experts/layer_fixture.h"

namespace kt::test {
namespace {

using coproc::Traffic;
using kernels::Fetch;
using kernels::kPanelRows;
using kernels::Panels;

constexpr std::int64_t kHidden = 96;  // Three panels: an odd number of them.
constexpr std::int64_t kIntermediate = 96;
constexpr std::int64_t kElementBytes = 2;
constexpr std::int64_t kNoneFits = 1;
constexpr std::int64_t kAllFits = std::int64_t{1} << 40;

// What one direction moved. `inside`: arrays of a block, from stage to stage.
struct Counts {
  std::atomic<std::int64_t> weights, lora, outside, inside;
};

struct Memory {
  bool has(const void* at) const { return at >= begin && at < end; }
  const std::byte* begin = nullptr;
  const std::byte* end = nullptr;
};

// Kernels are plain functions, so what they count is global. Forward ends with its sum; what gathers next is backward.
struct Counter {
  void start(TestLayer& layer) {
    for (Counts& counts : directions) counts.weights = counts.lora = counts.outside = counts.inside = 0;
    has_summed = is_backward = false;
    const auto last = layer.dims().num_experts - 1;
    const coproc::WeightMatrix end = layer.weights().down(0, last);
    weights = {layer.weights().gate_up(0, 0).data, end.data + end.num_panels * end.stride};
    lora = {};
    if (layer.adapter() == nullptr) return;
    for (std::size_t part = 0; part < lora.size(); ++part) {
      const auto& packed = layer.adapter()->layer(TestLayer::kWireLayer)->parts[part];
      lora[part] = {packed.data, packed.data + (last + 1) * packed.num_panels * packed.stride};
    }
  }
  Counts& now() { return directions[is_backward ? 1 : 0]; }
  // Panels in scratch, those of a transpose, were counted when they were made.
  void read_panels(const void* data, std::int64_t elements) {
    if (weights.has(data)) now().weights += elements * kElementBytes;
    for (const Memory& part : lora) {
      if (part.has(data)) now().lora += elements * kElementBytes;
    }
  }
  void outside(std::int64_t elements) { now().outside += elements * kElementBytes; }
  void inside(std::int64_t elements) { now().inside += elements * kElementBytes; }

  const kernels::KernelTable& scalar = *kernels::find_table("scalar", kElementBytes, nullptr);
  Memory weights;
  std::array<Memory, coproc::Adapter::Layer::kNumParts> lora;
  std::array<Counts, 2> directions;
  std::atomic<bool> has_summed = false;
  std::atomic<bool> is_backward = false;
};
Counter counter;

kernels::KernelTable counting_table() {
  kernels::KernelTable table = counter.scalar;
  table.gather = [](const void* x, std::int64_t ldx, const std::int32_t* row, std::int64_t m, std::int64_t n,
                    std::int64_t n_padded, void* out, std::int64_t ldo) {
    if (counter.has_summed) counter.is_backward = true;
    counter.outside(m * n);
    counter.inside(m * n_padded);
    counter.scalar.gather(x, ldx, row, m, n, n_padded, out, ldo);
  };
  table.gemm = [](const void* a, std::int64_t lda, std::int64_t m, const Panels& w, float* c, std::int64_t ldc,
                  bool accumulate, const Fetch& next) {
    counter.read_panels(w.data, w.num_panels * kPanelRows * w.k);
    if (w.more != nullptr) counter.read_panels(w.more->data, w.more->num_panels * kPanelRows * w.more->k);
    counter.inside(m * (w.k - w.k % kPanelRows));  // Without what was projected to the rank: half a panel.
    counter.scalar.gemm(a, lda, m, w, c, ldc, accumulate, next);
  };
  table.transpose_panels = [](const Panels& w, std::int64_t q, std::int64_t count, void* out, std::int64_t out_stride,
                              const Fetch& next) {
    counter.read_panels(w.data, w.num_panels * kPanelRows * count * kPanelRows);
    counter.scalar.transpose_panels(w, q, count, out, out_stride, next);
  };
  table.round_rows = [](const float* in, std::int64_t ldi, std::int64_t m, std::int64_t n, float scale, void* out,
                        std::int64_t ldo) {
    // Rows of results, y and dx are so far apart; an adapted block's arrays, behind whose columns the others go, are
    // not.
    if (ldo == kHidden) counter.outside(m * n);
    counter.scalar.round_rows(in, ldi, m, n, scale, out, ldo);
  };
  table.activate = [](const kernels::ActivateArgs& args) {
    const std::int64_t gate_up = args.m * 2 * args.n;
    if (args.saved != nullptr) (counter.is_backward ? counter.inside(gate_up) : counter.outside(gate_up));
    counter.inside(args.m * args.n);
    counter.scalar.activate(args);
  };
  table.activate_backward = [](const kernels::ActivateBackwardArgs& args) {
    const std::int64_t gate_up = args.m * 2 * args.n;
    args.saved_row == nullptr ? counter.inside(gate_up) : counter.outside(gate_up);
    counter.inside(gate_up + (args.z == nullptr ? 0 : args.m * args.n));
    counter.scalar.activate_backward(args);
  };
  table.lora_wgrad = [](const kernels::LoraWgradArgs& args) {
    counter.inside(args.m * args.n);
    counter.now().lora += 2 * args.r * args.n * static_cast<std::int64_t>(sizeof(float));
    counter.scalar.lora_wgrad(args);
  };
  table.sum_routes = [](const kernels::SumRoutesArgs& args) {
    counter.has_summed = true;
    const std::int32_t* end = args.route_row + args.num_tokens * args.top_k;
    counter.outside(std::count_if(args.route_row, end, [](std::int32_t row) { return row >= 0; }) * args.n);
    counter.scalar.sum_routes(args);
  };
  return table;
}

void expect_counted(const char* direction, const Traffic& account, const Counts& counts, bool all_fits) {
  SCOPED_TRACE(direction);
  const Traffic::Stage total = account.total();
  EXPECT_EQ(total.weight_bytes, counts.weights);
  EXPECT_EQ(total.lora_bytes, counts.lora);
  EXPECT_EQ(total.activation_bytes, counts.outside + (all_fits ? 0 : counts.inside.load()));
}

// Forward and backward of 40 tokens, kept and recomputed, with gradients and without.
void expect_account_is_what_is_counted(const coproc::AdapterLayerSpec& spec, Routing routing, int num_workers,
                                       std::int64_t l2_bytes) {
  const kernels::KernelTable table = counting_table();
  TestLayer layer({.num_experts = 4, .top_k = 2, .hidden = kHidden, .intermediate = kIntermediate, .spec = spec}, table,
                  11);
  std::mt19937 random(12);
  const Batch batch = layer.make_batch(40, routing, random);
  for (const bool keep : {true, false}) {
    for (const bool accumulate : {true, false}) {
      SCOPED_TRACE(std::string(keep ? "kept" : "recomputed") + (accumulate ? ", gradients" : ""));
      counter.start(layer);
      layer.run({&batch},
                {.num_workers = num_workers, .keep_gate_up = keep, .accumulate = accumulate, .l2_bytes = l2_bytes});
      const bool all_fits = l2_bytes == kAllFits;
      expect_counted("forward", layer.forward_traffic(), counter.directions[0], all_fits);
      expect_counted("backward", layer.backward_traffic(), counter.directions[1], all_fits);
    }
  }
}

TEST(TrafficCount, OfFrozenExpertsWhoseArraysDoNotFitIsWhatTheKernelsMove) {
  expect_account_is_what_is_counted({}, Routing::kSoftmaxTopK, 1, kNoneFits);
}
TEST(TrafficCount, OfFrozenExpertsWhoseArraysFitIsWhatTheKernelsMoveOutside) {
  expect_account_is_what_is_counted({}, Routing::kSoftmaxTopK, 1, kAllFits);
}
TEST(TrafficCount, OfAdaptedExpertsWhoseArraysDoNotFitIsWhatTheKernelsMove) {
  expect_account_is_what_is_counted(spec_of(8, true, 8), Routing::kWithSentinels, 1, kNoneFits);
}
TEST(TrafficCount, OfAdaptedExpertsWhoseArraysFitIsWhatTheKernelsMoveOutside) {
  expect_account_is_what_is_counted(spec_of(8, true, 8), Routing::kWithSentinels, 1, kAllFits);
}
TEST(TrafficCount, OfHalfAnAdapterIsWhatTheKernelsMove) {
  for (const std::int64_t l2_bytes : {kNoneFits, kAllFits}) {
    expect_account_is_what_is_counted(spec_of(8, true, 0), Routing::kSoftmaxTopK, 1, l2_bytes);
    expect_account_is_what_is_counted(spec_of(0, true, 8), Routing::kSoftmaxTopK, 1, l2_bytes);
  }
}
TEST(TrafficCount, OfASharedExpertIsWhatTheKernelsMove) {
  expect_account_is_what_is_counted({}, Routing::kOneExpert, 2, kNoneFits);
  expect_account_is_what_is_counted(spec_of(8, true, 8), Routing::kOneExpert, 2, kNoneFits);
  expect_account_is_what_is_counted(spec_of(8, true, 8), Routing::kSoftmaxTopK, 3, kNoneFits);
}

}  // namespace
}  // namespace kt::test
