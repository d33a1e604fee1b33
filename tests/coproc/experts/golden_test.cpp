// The bits of y, dx, dw, S and of G and U as kept are the recorded ones, for every table and weight format. A change
// that is not meant to change bits leaves this test alone; one that is meant to puts in the constants that it prints.
//
// The kernels' bits depend on no compiler: -ffp-contract=off, vectors by hand. The inputs do: libstdc++'s distributions
// and libm's logarithms make them. So the constants hold for GCC with glibc, and other compilers skip the test. Those
// of amx were recorded under the emulator of tests/support/isa, whose bits are the CPU's.
#include <algorithm>
#include <cinttypes>
#include <cstdio>

#include "kernels/formats.h"
#include "tests/coproc/experts/layer_fixture.h"

namespace kt::test {
namespace {

struct GoldenCase {
  const kernels::KernelTable* table;
  std::string_view format;  // "": elements.
  std::string name() const {
    std::string text(table->name);
    text += table->element_bytes == 4 ? "_fp32" : "_bf16";
    return format.empty() ? text : text + "_" + std::string(format);
  }
};
void PrintTo(const GoldenCase& value, std::ostream* out) { *out << value.name(); }

std::vector<GoldenCase> golden_cases() {
  std::vector<GoldenCase> cases;
  for (const kernels::KernelTable* table : kernels::all_tables()) {
    cases.push_back({table, ""});
    for (const kernels::QuantKernels& format : table->formats) cases.push_back({table, format.format});
  }
  return cases;
}

// FNV-1a of 64 bits.
class Hash {
 public:
  void add(const void* data, std::size_t size) {
    for (std::size_t n = 0; n < size; ++n) {
      value_ = (value_ ^ static_cast<const unsigned char*>(data)[n]) * 0x100000001b3u;
    }
  }
  template <class T>
  void add(const std::vector<T>& values) {
    add(values.data(), values.size() * sizeof(T));
  }
  std::uint64_t value() const { return value_; }

 private:
  std::uint64_t value_ = 0xcbf29ce484222325u;
};

void add_run(TestLayer& layer, const std::vector<const Batch*>& batches, const TestLayer::RunOptions& options,
             Hash& hash) {
  for (const ItemResult& result : layer.run(batches, options)) {
    hash.add(result.y);
    hash.add(result.gate_up);
    hash.add(result.dx);
    hash.add(result.dw);
  }
  for (const std::vector<float>& gradient : layer.gradients()) hash.add(gradient);
}

// Few and many tokens, alone and together, kept and recomputed, in blocks of few rows, on two nodes.
std::uint64_t hash_of(const GoldenCase& of, const coproc::AdapterLayerSpec& spec) {
  LayerOptions options = {.hidden = 112, .intermediate = 72, .spec = spec};
  if (!of.format.empty()) options.format = kernels::find_format(of.format);
  TestLayer layer(options, *of.table, 601);
  std::mt19937 random(602);
  const Batch none = layer.make_batch(0, Routing::kSoftmaxTopK, random);
  const Batch one = layer.make_batch(1, Routing::kSoftmaxTopK, random);
  const Batch some = layer.make_batch(17, Routing::kWithSentinels, random);
  const Batch twice = layer.make_batch(17, Routing::kSameExpertTwice, random);
  const Batch many = layer.make_batch(290, Routing::kSoftmaxTopK, random);
  const Batch same = layer.make_batch(290, Routing::kOneExpert, random);
  const Batch nowhere = layer.make_batch(3, Routing::kOnlySentinels, random);
  Hash hash;
  for (const bool keep_gate_up : {true, false}) {
    add_run(layer, {&none}, {.keep_gate_up = keep_gate_up}, hash);
    add_run(layer, {&one}, {.keep_gate_up = keep_gate_up}, hash);
    add_run(layer, {&some, &nowhere, &twice}, {.num_workers = 3, .keep_gate_up = keep_gate_up}, hash);
    add_run(layer, {&many}, {.keep_gate_up = keep_gate_up}, hash);
    add_run(layer, {&same}, {.keep_gate_up = keep_gate_up}, hash);
    add_run(layer, {&some, &many}, {.keep_gate_up = keep_gate_up, .l2_bytes = 65536}, hash);
  }
  add_run(layer, {&many, &same}, {.accumulate = false}, hash);
  add_run(layer, {&many, &some}, {.workers_of_nodes = {1, 2}}, hash);
  return hash.value();
}

struct Recorded {
  std::string_view name;
  std::uint64_t hashes[3];  // Without LoRA, with shared A, with separate A's.
};

constexpr Recorded kRecorded[] = {
    {"amx_bf16", {0xe2481a0854a1424e, 0x2033fa560844ead7, 0xb0e6cd9444060a0e}},
    {"amx_bf16_fp8", {0x4ee30c68b1d939c8, 0x1fbaec64b3a3adab, 0x289b049cf80fe86f}},
    {"amx_bf16_int8", {0x57689ac103f97500, 0x8a8992d406133b79, 0x63419e4290735f6f}},
    {"amx_bf16_int4", {0xd5ea8e64e3dff1a1, 0xe7fc2a415e77bbb1, 0x5d2449e1c7b8ff0f}},
    {"avx512_bf16", {0x29f43e3a23b5743f, 0x1a91950a86324112, 0xf6342b3c7e9871ce}},
    {"avx512_bf16_fp8", {0x04eb75e5e342626d, 0xf9aeea5a5d4e89bf, 0x41882cca5fea5889}},
    {"avx512_bf16_int8", {0x9d987fd802659e6b, 0x897aba61bb0428a7, 0x538b1171882b38d5}},
    {"avx512_bf16_int4", {0x17f25fafd40b41dc, 0x63f01e32191407ee, 0xc27c3ba333d1a881}},
    {"avx2_bf16", {0xd163fc5601bccbef, 0x4f42b739bdcdcb2a, 0x337f6d64e02f9b01}},
    {"avx2_bf16_fp8", {0x6a24276660139ea8, 0x5525c762f55e7f24, 0x022984924f773bfd}},
    {"avx2_bf16_int8", {0xf1e1168bf77c1633, 0x7d6a2fd44b7d1e9f, 0x756b6222d73bd41c}},
    {"avx2_bf16_int4", {0x365d9fba7bc25fc1, 0xd12129cbbfc484b3, 0xe9ea24853e90d62b}},
    {"scalar_bf16", {0xd163fc5601bccbef, 0x4f42b739bdcdcb2a, 0x337f6d64e02f9b01}},
    {"scalar_bf16_fp8", {0x6a24276660139ea8, 0x5525c762f55e7f24, 0x022984924f773bfd}},
    {"scalar_bf16_int8", {0xf1e1168bf77c1633, 0x7d6a2fd44b7d1e9f, 0x756b6222d73bd41c}},
    {"scalar_bf16_int4", {0x365d9fba7bc25fc1, 0xd12129cbbfc484b3, 0xe9ea24853e90d62b}},
    {"scalar_fp32", {0x307d4d7643ac7569, 0x1e71b52229dbc82f, 0x2b40d671d591c54e}},
};

class ExpertGolden : public testing::TestWithParam<GoldenCase> {
 protected:
  void SetUp() override {
#if defined(__clang__) || !defined(__GNUC__)
    GTEST_SKIP() << "the bits were recorded of what GCC compiles";
#endif
    const std::string why = why_not_runnable(*GetParam().table);
    if (!why.empty()) GTEST_SKIP() << why;
    for (const Recorded& recorded : kRecorded) {
      if (recorded.name == GetParam().name()) recorded_ = recorded;
    }
  }
  const Recorded& recorded() const { return recorded_; }
  static void expect_hash(std::uint64_t got, std::uint64_t want, const char* what) {
    char text[19];
    std::snprintf(text, sizeof text, "0x%016" PRIx64, got);
    EXPECT_EQ(got, want) << GetParam().name() << ", " << what << ": the hash is now " << text;
  }

 private:
  Recorded recorded_ = {};
};
INSTANTIATE_TEST_SUITE_P(Tables, ExpertGolden, testing::ValuesIn(golden_cases()),
                         [](const auto& param) { return param.param.name(); });

TEST_P(ExpertGolden, GivesTheRecordedBits) {
  expect_hash(hash_of(GetParam(), {}), recorded().hashes[0], "without LoRA");
  expect_hash(hash_of(GetParam(), spec_of(8, true, 8)), recorded().hashes[1], "shared A");
  expect_hash(hash_of(GetParam(), spec_of(24, false, 40)), recorded().hashes[2], "separate A's");
}

}  // namespace
}  // namespace kt::test
