#include "coproc/model/fingerprint.h"

#include <gtest/gtest.h>

#include <filesystem>
#include <set>

#include "tests/coproc/model/test_support.h"
#include "tests/support/checkpoint_writer.h"
#include "tests/support/temp_dir.h"

namespace kt::coproc {
namespace {

using testing::CheckpointSpec;
using testing::Layout;
using testing::WeightDType;

std::string fingerprint_of(const std::filesystem::path& path) {
  const Result<Checkpoint> checkpoint = Checkpoint::open(path.string());
  if (!checkpoint.ok()) return checkpoint.error().text();
  const Result<std::string> result = fingerprint(checkpoint.value());
  return result.ok() ? result.value() : result.error().text();
}

std::string fingerprint_of(const CheckpointSpec& spec) {
  const testing::TempDir dir;
  testing::write_checkpoint(dir.path(), spec);
  return fingerprint_of(dir.path());
}

// Layers 1, 3, 5 of 6, 5 experts: 7·L mod 5 = 2, 1, 0. A matrix has 6144 bytes in F32 and 3072 in BF16.
CheckpointSpec golden_spec(Layout layout, WeightDType dtype) {
  CheckpointSpec spec;
  spec.num_layers = 6;
  spec.decoder_sparse_step = 2;
  spec.num_experts = 5;
  spec.hidden_size = 48;
  spec.intermediate_size = 32;
  spec.layout = layout;
  spec.dtype = dtype;
  return spec;
}

TEST(Fingerprint, IsWhatAnIndependentImplementationComputed) {
  EXPECT_EQ(fingerprint_of(golden_spec(Layout::kPerExpert, WeightDType::kBf16)),
            "e69cfcd6c3626c846ddb3cbc50bd3c0d0b65cdff7de17d358e8c65f868372989");
  EXPECT_EQ(fingerprint_of(golden_spec(Layout::kFused, WeightDType::kBf16)),
            "a5ed4c3c2d9923e3793c4ddebb2bc025c5ab979f74863f6092c7b463e44f7f47");
  EXPECT_EQ(fingerprint_of(golden_spec(Layout::kPerExpert, WeightDType::kF32)),
            "4e610fd15ad0b5aa49864e82da4685b0f1c6e888acd554c06ea2528249b1d4da");
  EXPECT_EQ(fingerprint_of(golden_spec(Layout::kFused, WeightDType::kF32)),
            "73ed2e9843db684b19939ef0533fbb324441ae5b25f20e9ce746b573f72b78a0");
}

TEST(Fingerprint, DoesNotDependOnFiles) {
  CheckpointSpec spec = golden_spec(Layout::kPerExpert, WeightDType::kBf16);
  const std::string one = fingerprint_of(spec);
  spec.num_shards = 4;
  EXPECT_EQ(fingerprint_of(spec), one);
}

TEST(Fingerprint, DependsOnArchitectureNamesTypesShapesAndValues) {
  std::set<std::string> all;
  CheckpointSpec spec;
  all.insert(fingerprint_of(spec));
  spec.seed = 2;
  all.insert(fingerprint_of(spec));
  spec.architecture = "Qwen3MoeForSequenceClassification";
  all.insert(fingerprint_of(spec));
  spec.prefix = "";
  all.insert(fingerprint_of(spec));
  spec.dtype = WeightDType::kF16;
  all.insert(fingerprint_of(spec));
  spec.layout = Layout::kFused;
  all.insert(fingerprint_of(spec));
  spec.intermediate_size = 16;
  all.insert(fingerprint_of(spec));
  EXPECT_EQ(all.size(), 7U);
}

TEST(Fingerprint, SeesEachOfTheSampledBytesOnly) {
  const testing::TempDir dir;
  testing::write_checkpoint(dir.path(), golden_spec(Layout::kFused, WeightDType::kF32));
  const std::string before = fingerprint_of(dir.path());
  ASSERT_EQ(before.size(), 64U) << before;
  const Result<Checkpoint> checkpoint = Checkpoint::open(dir.path().string());
  ASSERT_TRUE(checkpoint.ok());
  const std::string file = dir.file("model.safetensors");
  const std::string bytes = testing::read_file(file);
  const auto changed_at = [&](std::uint64_t offset) {
    std::string changed = bytes;
    changed[offset] = static_cast<char>(changed[offset] ^ 1);
    testing::write_file(file, changed);
    return fingerprint_of(dir.path()) != before;
  };
  const ExpertSource sampled = checkpoint.value().expert(1, 1);  // Layer 3: 21 mod 5.
  for (const MatrixSource& matrix : {sampled.gate, sampled.up, sampled.down}) {
    EXPECT_TRUE(changed_at(matrix.offset));
    EXPECT_TRUE(changed_at(matrix.offset + 4095));
    EXPECT_FALSE(changed_at(matrix.offset + 4096));
  }
  EXPECT_FALSE(changed_at(checkpoint.value().expert(1, 2).gate.offset));
}

TEST(Fingerprint, AFileThatShrankIsAnError) {
  const testing::TempDir dir;
  testing::write_checkpoint(dir.path(), {});
  const Result<Checkpoint> checkpoint = Checkpoint::open(dir.path().string());
  ASSERT_TRUE(checkpoint.ok());
  std::filesystem::resize_file(dir.file("model.safetensors"), 10);
  expect_bad_model(fingerprint(checkpoint.value()), {dir.file("model.safetensors"), "ends at byte"});
}

}  // namespace
}  // namespace kt::coproc
