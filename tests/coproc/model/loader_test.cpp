#include "coproc/model/loader.h"

#include <gtest/gtest.h>

#include <array>
#include <atomic>
#include <bit>
#include <filesystem>
#include <functional>
#include <type_traits>

#include "tests/coproc/model/test_support.h"
#include "tests/support/checkpoint_writer.h"
#include "tests/support/temp_dir.h"

namespace kt::coproc {
namespace {

using testing::CheckpointSpec;
using testing::Layout;
using testing::WeightDType;

Checkpoint open_checkpoint(const std::string& path) {
  Result<Checkpoint> checkpoint = Checkpoint::open(path);
  EXPECT_TRUE(checkpoint.ok()) << checkpoint.error().text();
  return std::move(checkpoint).value();
}

template <class Element>
Element element_of(float value) {
  if constexpr (std::is_same_v<Element, float>) {
    return value;
  } else {
    return static_cast<Element>(std::bit_cast<std::uint32_t>(testing::round_to(value, WeightDType::kBf16)) >> 16);
  }
}

// Writes the checkpoint, loads it, and compares every element of every expert.
template <class Element>
void expect_loads(const CheckpointSpec& spec, std::uint32_t num_threads) {
  const testing::TempDir dir;
  const testing::WrittenCheckpoint written = testing::write_checkpoint(dir.path(), spec);
  const Checkpoint checkpoint = open_checkpoint(written.path);
  ASSERT_EQ(checkpoint.config().moe_layers, written.moe_layers);
  CollectingSink<Element> sink(checkpoint.config());
  LoadProgress progress;
  const ElementType type = sizeof(Element) == 2 ? ElementType::kBf16 : ElementType::kFp32;
  const Status status = load_experts(checkpoint, type, sink, progress, num_threads);
  ASSERT_TRUE(status.ok()) << status.error().text();
  EXPECT_EQ(progress.bytes_done.load(), progress.bytes_total.load());
  const std::uint64_t file_element_bytes = spec.dtype == WeightDType::kF32 ? 4 : 2;
  EXPECT_EQ(progress.bytes_total.load(),
            std::uint64_t{3} * spec.intermediate_size * spec.hidden_size * written.experts.size() * file_element_bytes);
  ASSERT_EQ(sink.experts.size(), written.experts.size());
  for (const auto& [place, matrices] : sink.experts) {
    const testing::ExpertValues& values = written.expert(place.first, place.second);
    const std::vector<float>* expected[] = {&values.gate, &values.up, &values.down};
    for (std::size_t matrix = 0; matrix < 3; ++matrix) {
      ASSERT_EQ(matrices[matrix].size(), expected[matrix]->size());
      for (std::size_t i = 0; i < matrices[matrix].size(); ++i) {
        ASSERT_EQ(matrices[matrix][i], element_of<Element>((*expected[matrix])[i]))
            << "MoE layer " << place.first << ", expert " << place.second << ", matrix " << matrix << ", element " << i;
      }
    }
  }
}

struct Case {
  WeightDType dtype;
  Layout layout;
  std::uint32_t num_shards;
};

class LoaderTest : public ::testing::TestWithParam<Case> {
 protected:
  static CheckpointSpec spec() {
    CheckpointSpec spec;
    spec.num_layers = 5;
    spec.num_experts = 11;  // Two digits: order by name is not order by number.
    spec.mlp_only_layers = {1};
    spec.hidden_size = 40;
    spec.intermediate_size = 24;
    spec.dtype = GetParam().dtype;
    spec.layout = GetParam().layout;
    spec.num_shards = GetParam().num_shards;
    return spec;
  }
};

TEST_P(LoaderTest, EveryExpertArrivesOnceAsBf16) { expect_loads<std::uint16_t>(spec(), 3); }
TEST_P(LoaderTest, EveryExpertArrivesOnceAsFp32) { expect_loads<float>(spec(), 1); }

INSTANTIATE_TEST_SUITE_P(
    AllDtypesLayoutsAndShardings, LoaderTest,
    ::testing::Values(Case{WeightDType::kBf16, Layout::kPerExpert, 1}, Case{WeightDType::kBf16, Layout::kFused, 1},
                      Case{WeightDType::kF16, Layout::kPerExpert, 5}, Case{WeightDType::kF16, Layout::kFused, 3},
                      Case{WeightDType::kF32, Layout::kPerExpert, 1}, Case{WeightDType::kF32, Layout::kFused, 5}));

TEST(Loader, ABaseModelsNamesAndQwen2AreRead) {
  CheckpointSpec spec;
  spec.model_type = "qwen2_moe";
  spec.architecture = "Qwen2MoeModel";
  spec.prefix = "";
  spec.num_layers = 4;
  spec.decoder_sparse_step = 2;
  expect_loads<std::uint16_t>(spec, 2);
}

TEST(Loader, MoreThreadsThanExpertsAndNoneAreFine) {
  expect_loads<std::uint16_t>({}, 100);
  expect_loads<std::uint16_t>({}, 0);
}

// Counts experts, and does something to the outside world at the third.
class MeddlingSink final : public ExpertSink {
 public:
  explicit MeddlingSink(std::function<void()> meddle) : meddle_(std::move(meddle)) {}
  void expert(std::uint32_t, std::uint32_t, const void*, const void*, const void*) override {
    if (++experts == 3) meddle_();
  }
  std::atomic<int> experts{0};

 private:
  std::function<void()> meddle_;
};

TEST(Loader, AFileThatShrinksWhileLoadingIsAnErrorNotACrash) {
  const testing::TempDir dir;
  const testing::WrittenCheckpoint written = testing::write_checkpoint(dir.path(), {.num_layers = 8});
  const Checkpoint checkpoint = open_checkpoint(written.path);
  const std::string file = dir.file("model.safetensors");
  MeddlingSink sink([&] { std::filesystem::resize_file(file, 16000); });
  LoadProgress progress;
  expect_bad_model(load_experts(checkpoint, ElementType::kBf16, sink, progress, 2),
                   {file, "ends at byte", "417120 bytes when opened"});
  EXPECT_LT(sink.experts.load(), 32);
}

TEST(Loader, CancellingEndsTheLoad) {
  const testing::TempDir dir;
  const testing::WrittenCheckpoint written = testing::write_checkpoint(dir.path(), {.num_layers = 8});
  const Checkpoint checkpoint = open_checkpoint(written.path);
  LoadProgress progress;
  MeddlingSink sink([&] { progress.cancel = true; });
  const Status status = load_experts(checkpoint, ElementType::kBf16, sink, progress, 2);
  ASSERT_FALSE(status.ok());
  EXPECT_EQ(status.error().code, ErrorCode::kCoprocDied);
  EXPECT_NE(status.error().text().find(written.path), std::string::npos) << status.error().text();
  EXPECT_LE(sink.experts.load(), 5);
}

TEST(Loader, DenormalsInfinitiesAndNansOfF16Arrive) {
  const testing::TempDir dir;
  testing::write_checkpoint(dir.path(),
                            {.num_layers = 1, .num_experts = 2, .dtype = WeightDType::kF16, .layout = Layout::kFused});
  const Checkpoint checkpoint = open_checkpoint(dir.path().string());
  const std::uint16_t halves[] = {0x0001, 0x83ff, 0x7c00, 0xfc00, 0x7e01, 0x8000};
  std::string bytes = testing::read_file(dir.file("model.safetensors"));
  bytes.replace(checkpoint.expert(0, 1).up.offset, sizeof(halves),
                std::string(std::bit_cast<std::array<char, sizeof(halves)>>(halves).data(), sizeof(halves)));
  testing::write_file(dir.file("model.safetensors"), bytes);
  CollectingSink<std::uint16_t> sink(checkpoint.config());
  LoadProgress progress;
  ASSERT_TRUE(load_experts(checkpoint, ElementType::kBf16, sink, progress, 1).ok());
  const std::vector<std::uint16_t>& up = sink.experts.at({0U, 1U})[1];
  // 2^-24; -1023·2^-24 rounded to 8 bits: -2^-14; ±infinity; a quiet NaN; -0.
  EXPECT_EQ(std::vector<std::uint16_t>(up.begin(), up.begin() + 6),
            (std::vector<std::uint16_t>{0x3380, 0xb880, 0x7f80, 0xff80, 0x7fc0, 0x8000}));
}

}  // namespace
}  // namespace kt::coproc
