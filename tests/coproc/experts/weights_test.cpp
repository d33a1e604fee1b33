#include "coproc/experts/weights.h"

#include <cstring>

#include "coproc/experts/memory.h"
#include "tests/coproc/experts/layer_fixture.h"

namespace kt::test {
namespace {

coproc::ExpertDims small_dims(const kernels::KernelTable& table) {
  return {.num_layers = 5,
          .moe_layers = {1, 3},
          .num_experts = 3,
          .top_k = 1,
          .hidden_size = 45,
          .intermediate_size = 70,
          .element_bytes = static_cast<std::uint32_t>(table.element_bytes)};
}

// Element (row, k) of packed panels, by the layout drawn in kernel_table.h.
double packed_element(const coproc::WeightMatrix& panels, std::int64_t row, std::int64_t k, std::int64_t eb) {
  const std::int64_t per_unit = 4 / eb;
  const std::int64_t unit = (k / per_unit) * kernels::kPanelRows + row % kernels::kPanelRows;
  const std::byte* at = panels.data + row / kernels::kPanelRows * panels.stride + unit * 4 + k % per_unit * eb;
  return from_elements(at, 1, eb)[0];
}

using Weights = EveryTable;
INSTANTIATE_TEST_SUITE_P(Tables, Weights, testing::ValuesIn(kernels::all_tables()), table_name);

TEST_P(Weights, KeepEveryExpertInInterleavedPanelsWithZeroPadding) {
  const coproc::ExpertDims dims = small_dims(table());
  const std::int64_t eb = table().element_bytes;
  const auto weights = coproc::ExpertWeights::create(dims, table()).value();
  // A value that names matrix, layer, expert, row and column; exact in bf16.
  const auto value = [](int matrix, std::uint32_t layer, std::uint32_t expert, std::int64_t row, std::int64_t col) {
    return static_cast<double>(1 + (row * 7 + col * 3 + expert * 31 + layer * 57 + matrix * 83) % 251);
  };
  const auto matrix = [&](int which, std::uint32_t layer, std::uint32_t expert, std::int64_t rows, std::int64_t cols) {
    Doubles values;
    for (std::int64_t n = 0; n < rows * cols; ++n) values.push_back(value(which, layer, expert, n / cols, n % cols));
    return to_elements(values, eb);
  };
  for (std::uint32_t layer = 0; layer < 2; ++layer) {
    for (std::uint32_t e = 0; e < 3; ++e) {
      weights->set_expert(layer, e, matrix(0, layer, e, 70, 45).data(), matrix(1, layer, e, 70, 45).data(),
                          matrix(2, layer, e, 45, 70).data());
    }
  }
  for (std::uint32_t layer = 0; layer < 2; ++layer) {
    for (std::uint32_t e = 0; e < 3; ++e) {
      const coproc::WeightMatrix gate_up = weights->gate_up(layer, e);
      ASSERT_EQ(gate_up.num_panels, 6);
      ASSERT_EQ(gate_up.k, 64);
      for (std::int64_t n = 0; n < 6 * 32 * 64; ++n) {
        const std::int64_t panel_row = n / 64;
        const std::int64_t k = n % 64;
        const std::int64_t row = panel_row / 64 * 32 + panel_row % 32;
        const int which = panel_row / 32 % 2 == 0 ? 0 : 1;
        const double want = row < 70 && k < 45 ? value(which, layer, e, row, k) : 0;
        ASSERT_EQ(packed_element(gate_up, panel_row, k, eb), want) << layer << " " << e << " " << panel_row << " " << k;
      }
      const coproc::WeightMatrix down = weights->down(layer, e);
      ASSERT_EQ(down.num_panels, 2);
      ASSERT_EQ(down.k, 96);
      for (std::int64_t n = 0; n < 2 * 32 * 96; ++n) {
        const double want = n / 96 < 45 && n % 96 < 70 ? value(2, layer, e, n / 96, n % 96) : 0;
        ASSERT_EQ(packed_element(down, n / 96, n % 96, eb), want) << layer << " " << e << " " << n;
      }
    }
  }
}

TEST_P(Weights, ThatDoNotFitAreRefusedWithNumbers) {
  coproc::ExpertDims dims = small_dims(table());
  dims.num_experts = 4096;
  dims.hidden_size = 1u << 17;
  dims.intermediate_size = 1u << 15;
  const auto weights = coproc::ExpertWeights::create(dims, table());
  ASSERT_FALSE(weights.ok());
  EXPECT_EQ(weights.error().code, ErrorCode::kNoResources);
  EXPECT_NE(weights.error().what.find("2 layers × 4096 experts"), std::string::npos) << weights.error().text();
  EXPECT_NE(weights.error().why.find(" TB, and "), std::string::npos) << weights.error().text();
  EXPECT_FALSE(weights.error().fix.empty());
}

TEST(Memory, IsZeroFilledAndAlignedForHugePages) {
  constexpr std::uint64_t kBytes = 5 * 1024 * 1024 + 3;
  const auto memory = coproc::Memory::map(kBytes, "a test", "nothing").value();
  EXPECT_EQ(reinterpret_cast<std::uintptr_t>(memory.data()) % (2 * 1024 * 1024), 0u);
  for (std::uint64_t n = 0; n < kBytes; n += 4095) ASSERT_EQ(memory.data()[n], std::byte{0});
  memory.data()[kBytes - 1] = std::byte{1};
}

}  // namespace
}  // namespace kt::test
