// What the tests of the experts share: a layer with random weights and adapter beside its reference in double, batches,
// and guarded output arrays.
#pragma once
#include <gtest/gtest.h>

#include <cstddef>
#include <cstdint>
#include <limits>
#include <memory>
#include <random>
#include <string>
#include <vector>

#include "coproc/experts/expert_compute.h"
#include "kernels/formats.h"
#include "kernels/kernel_table.h"
#include "tests/support/expert_reference.h"

namespace kt::test {

using Bytes = std::vector<std::byte>;

// Rounds to the element type and back.
double to_element(double value, std::int64_t element_bytes);
Bytes to_elements(const Doubles& values, std::int64_t element_bytes);
Doubles from_elements(const std::byte* elements, std::size_t count, std::int64_t element_bytes);

// Why this CPU cannot run the table; empty: it can.
std::string why_not_runnable(const kernels::KernelTable& table);

// Memory between canaries, filled with bits that are NaN in bf16 and f32: what is not written shows.
class Guarded {
 public:
  explicit Guarded(std::size_t bytes) : bytes_(bytes + 2 * kGuard, kPoison) {}
  std::byte* data() { return bytes_.data() + kGuard; }
  const std::byte* data() const { return bytes_.data() + kGuard; }
  float* floats() { return static_cast<float*>(static_cast<void*>(data())); }
  Bytes contents() const { return Bytes(bytes_.begin() + kGuard, bytes_.end() - kGuard); }
  bool intact() const;

 private:
  static constexpr std::ptrdiff_t kGuard = 64;
  static constexpr std::byte kPoison{0xff};
  Bytes bytes_;
};

struct LayerOptions {
  std::int64_t num_experts = 8;
  std::int64_t top_k = 4;
  std::int64_t hidden = 96;
  std::int64_t intermediate = 64;
  Activation activation = {};
  coproc::AdapterLayerSpec spec = {};              // r = 0 twice: no adapter.
  const kernels::StorageFormat* format = nullptr;  // A quantised one; null: elements.
  bool original_reference = false;  // The reference has the weights before quantisation, not those after it.
};

enum class Routing { kSoftmaxTopK, kOneExpert, kSameExpertTwice, kWithSentinels, kOnlySentinels };

struct Batch {
  ReferenceBatch reference;
  Doubles dy;
  Bytes x_elements;
  Bytes dy_elements;
};

// What one item got.
struct ItemResult {
  Bytes y;
  Bytes gate_up;
  Bytes dx;
  Bytes dw;
};

// One MoE layer, wire number kWireLayer of three.
class TestLayer {
 public:
  static constexpr std::uint32_t kWireLayer = 1;
  TestLayer(const LayerOptions& options, const kernels::KernelTable& table, std::uint32_t seed);

  Batch make_batch(std::int64_t num_tokens, Routing routing, std::mt19937& random) const;

  // Forward and backward of these batches as the items of one call each, on `num_workers`. Checks every guard.
  struct RunOptions {
    int num_workers = 2;
    bool keep_gate_up = true;  // false: backward recomputes.
    bool accumulate = true;
    std::int64_t l2_bytes = 0;               // 0: the table's. Little of it: blocks of few rows.
    std::vector<int> workers_of_nodes = {};  // Empty: one node of num_workers.
  };
  std::vector<ItemResult> run(const std::vector<const Batch*>& batches, const RunOptions& options);

  // S of a tensor, all experts; empty when it does not exist.
  std::vector<float> gradient(std::size_t tensor) const;
  std::vector<std::vector<float>> gradients() const;
  void discard();
  // Of the last run.
  const coproc::Traffic& forward_traffic() const { return forward_traffic_; }
  const coproc::Traffic& backward_traffic() const { return backward_traffic_; }

  const ReferenceLayer& reference() const { return reference_; }
  const coproc::ExpertDims& dims() const { return dims_; }
  coproc::Adapter* adapter() { return adapter_.get(); }
  const coproc::ExpertWeights& weights() const { return *weights_; }

 private:
  void fill_weights(const LayerOptions& options, std::mt19937& random);
  void make_adapter(const coproc::AdapterLayerSpec& spec, std::mt19937& random);

  const kernels::KernelTable& table_;
  coproc::ExpertDims dims_;
  ReferenceLayer reference_;
  std::unique_ptr<coproc::ExpertWeights> weights_;
  std::unique_ptr<coproc::Adapter> adapter_;
  coproc::Traffic forward_traffic_;
  coproc::Traffic backward_traffic_;
};

// Tests over every table of the binary; those this CPU cannot run are skipped, and seen to be.
class EveryTable : public testing::TestWithParam<const kernels::KernelTable*> {
 protected:
  void SetUp() override {
    const std::string why = why_not_runnable(*GetParam());
    if (!why.empty()) GTEST_SKIP() << why;
  }
  const kernels::KernelTable& table() const { return *GetParam(); }
};
std::string table_name(const testing::TestParamInfo<const kernels::KernelTable*>& info);

coproc::AdapterLayerSpec spec_of(std::uint32_t gate_up_r, bool shared_a, std::uint32_t down_r);

}  // namespace kt::test
