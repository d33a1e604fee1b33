// The weights a daemon would serve, byte by byte: quantised from the checkpoint, and read from the cache.
#include "coproc/daemon/weight_loading.h"

#include <gtest/gtest.h>

#include <filesystem>
#include <string>
#include <vector>

#include "kernels/formats.h"
#include "tests/support/checkpoint_writer.h"
#include "tests/support/temp_dir.h"

namespace kt::coproc {
namespace {

namespace fs = std::filesystem;

// Of the formats that are quantised, or of the others.
std::vector<std::string> format_names(bool quantised) {
  std::vector<std::string> names;
  for (const kernels::StorageFormat& format : kernels::formats()) {
    if (format.quantised.has_value() == quantised) names.emplace_back(format.name);
  }
  return names;
}

struct Loaded {
  std::string bytes;  // Of all experts, with the pads of their panels.
  bool from_cache = false;
};

class WeightLoadingTest : public ::testing::TestWithParam<std::string> {
 protected:
  static testing::CheckpointSpec spec() {
    testing::CheckpointSpec spec;
    spec.num_layers = 3;
    spec.mlp_only_layers = {1};
    spec.num_experts = 5;
    spec.hidden_size = 200;  // Neither a multiple of 32 nor of a group.
    spec.intermediate_size = 72;
    spec.num_shards = 2;
    return spec;
  }
  RunOptions options(const std::string& kernels = "scalar") const {
    RunOptions options;
    options.model = written_.path;
    options.weight_format = GetParam();
    options.weight_cache = cache_;
    options.kernels = kernels;
    options.threads = 1;
    return options;
  }
  static Loaded load(const RunOptions& options) {
    Result<Prepared> prepared = prepare(options);
    EXPECT_TRUE(prepared.ok()) << prepared.error().text();
    LoadProgress progress;
    WeightLoading loading(prepared.value(), options, progress);
    const Status status = loading.load(2);
    EXPECT_TRUE(status.ok()) << status.error().text();
    loading.write_cache();
    const ExpertDims& dims = prepared.value().dims;
    ExpertWeights& weights = *prepared.value().weights;
    Loaded loaded;
    for (std::uint32_t moe_index = 0; moe_index < dims.moe_layers.size(); ++moe_index) {
      for (std::uint32_t expert = 0; expert < dims.num_experts; ++expert) {
        const auto data = weights.expert_data(moe_index, expert);
        loaded.bytes.append(reinterpret_cast<const char*>(data.data()), data.size());
      }
    }
    EXPECT_EQ(progress.bytes_done.load(), progress.bytes_total.load());
    EXPECT_EQ(loaded.bytes.size(), weights.bytes());
    loaded.from_cache = progress.bytes_total.load() != prepared.value().checkpoint.expert_bytes();
    return loaded;
  }
  std::vector<fs::path> files() const {
    std::vector<fs::path> paths;
    for (const auto& entry : fs::directory_iterator(cache_)) paths.push_back(entry.path());
    return paths;
  }
  void expect(const RunOptions& options, bool from_cache, const std::string& bytes) const {
    const Loaded loaded = load(options);
    EXPECT_EQ(loaded.from_cache, from_cache);
    EXPECT_TRUE(loaded.bytes == bytes) << "the weights have other bits";
  }

  testing::TempDir directory_;
  const testing::WrittenCheckpoint written_ = testing::write_checkpoint(directory_.path() / "model", spec());
  const std::string cache_ = directory_.file("cache");
};

TEST_P(WeightLoadingTest, WeightsFromTheCacheHaveTheBitsOfQuantisedOnesOnEveryTable) {
  RunOptions uncached = options();
  uncached.weight_cache = "";
  const std::string want = load(uncached).bytes;
  EXPECT_FALSE(fs::exists(cache_));
  expect(options(), false, want);
  EXPECT_EQ(files().size(), 1u);
  expect(options(), true, want);
  expect(options("auto"), true, want);  // Quantised by another table, the best this CPU has.
  fs::remove_all(cache_);
  expect(options("auto"), false, want);
  expect(options(), true, want);
}

TEST_P(WeightLoadingTest, ADamagedCacheIsReplaced) {
  const std::string want = load(options()).bytes;
  const fs::path file = files().at(0);
  const std::string whole = testing::read_file(file);
  for (const std::size_t offset : {std::size_t{40}, whole.size() / 2, whole.size() - 1}) {
    std::string damaged = whole;
    damaged[offset] = static_cast<char>(damaged[offset] ^ 4);
    testing::write_file(file, damaged);
    expect(options(), false, want);
    EXPECT_EQ(testing::read_file(file), whole);
    expect(options(), true, want);
  }
  testing::write_file(file, whole.substr(0, whole.size() - 1));
  expect(options(), false, want);
  expect(options(), true, want);
}

TEST_P(WeightLoadingTest, AnotherFormatOrShapeOrCheckpointHasAnotherFile) {
  const std::string want = load(options()).bytes;
  RunOptions other = options();
  const std::vector<std::string> names = format_names(true);
  other.weight_format = names[0] == GetParam() ? names[1] : names[0];
  const Loaded other_format = load(other);
  EXPECT_FALSE(other_format.from_cache);
  EXPECT_NE(other_format.bytes.size(), want.size());
  testing::CheckpointSpec narrow = spec();
  narrow.intermediate_size = 70;  // The same padded size.
  other = options();
  other.model = testing::write_checkpoint(directory_.path() / "narrow", narrow).path;
  const Loaded other_shape = load(other);
  EXPECT_FALSE(other_shape.from_cache);
  EXPECT_EQ(other_shape.bytes.size(), want.size());
  EXPECT_EQ(files().size(), 3u);

  // The same weights written anew: whether they are the same is not known without reading all of them.
  testing::write_checkpoint(written_.path, spec());
  expect(options(), false, want);
  EXPECT_EQ(files().size(), 4u);
  expect(options(), true, want);
}

TEST_P(WeightLoadingTest, AnUnusableDirectoryCostsTheCacheOnly) {
  RunOptions uncached = options();
  uncached.weight_cache = "";
  const std::string want = load(uncached).bytes;
  fs::create_directory(cache_);
  fs::permissions(cache_, fs::perms::all);
  expect(options(), false, want);
  EXPECT_TRUE(files().empty());
  RunOptions nowhere = options();
  nowhere.weight_cache = written_.path + "/config.json/cache";
  expect(nowhere, false, want);
}

INSTANTIATE_TEST_SUITE_P(Formats, WeightLoadingTest, ::testing::ValuesIn(format_names(true)),
                         [](const auto& test) { return test.param; });

class UnquantisedLoadingTest : public WeightLoadingTest {};

TEST_P(UnquantisedLoadingTest, LeavesNoCache) {
  load(options());
  EXPECT_FALSE(fs::exists(cache_));
}

INSTANTIATE_TEST_SUITE_P(Formats, UnquantisedLoadingTest, ::testing::ValuesIn(format_names(false)),
                         [](const auto& test) { return test.param; });

}  // namespace
}  // namespace kt::coproc
