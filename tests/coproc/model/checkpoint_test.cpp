#include "coproc/model/checkpoint.h"

#include <gtest/gtest.h>

#include <filesystem>
#include <functional>
#include <nlohmann/json.hpp>

#include "tests/coproc/model/test_support.h"
#include "tests/support/checkpoint_writer.h"
#include "tests/support/temp_dir.h"

namespace kt::coproc {
namespace {

namespace fs = std::filesystem;
using nlohmann::json;
using testing::CheckpointSpec;
using testing::Layout;
using testing::RawTensor;
using testing::WeightDType;

constexpr const char* kIndex = "model.safetensors.index.json";
constexpr const char* kFirst = "model-00001-of-00002.safetensors";
constexpr const char* kSecond = "model-00002-of-00002.safetensors";
constexpr const char* kSingle = "model.safetensors";

class CheckpointTest : public ::testing::Test {
 protected:
  void write(const CheckpointSpec& spec) { testing::write_checkpoint(dir_.path(), spec); }
  Result<Checkpoint> open() const { return Checkpoint::open(dir_.path().string()); }

  void edit_json(const std::string& name, const std::function<void(json&)>& edit) const {
    json value = json::parse(testing::read_file(dir_.path() / name));
    edit(value);
    testing::write_file(dir_.path() / name, value.dump());
  }

  // Takes a file apart, lets the test change its tensors, and writes it again.
  void edit_tensors(const std::string& name, const std::function<void(std::vector<RawTensor>&)>& edit) const {
    const std::string bytes = testing::read_file(dir_.path() / name);
    std::uint64_t header_bytes = 0;
    std::memcpy(&header_bytes, bytes.data(), sizeof(header_bytes));
    const auto header = nlohmann::ordered_json::parse(bytes.substr(8, header_bytes));
    std::vector<RawTensor> tensors;
    for (const auto& [tensor, info] : header.items()) {
      if (tensor == "__metadata__") continue;
      const auto offsets = info["data_offsets"].get<std::vector<std::uint64_t>>();
      tensors.push_back({tensor, info["dtype"], info["shape"].get<std::vector<std::uint64_t>>(),
                         bytes.substr(8 + header_bytes + offsets[0], offsets[1] - offsets[0])});
    }
    edit(tensors);
    testing::write_file(dir_.path() / name, testing::safetensors_bytes(tensors));
  }
  // The same for one tensor of model.safetensors.
  void edit_tensor(const std::string& tensor, const std::function<void(RawTensor&)>& edit) const {
    edit_tensors(kSingle, [&](std::vector<RawTensor>& tensors) {
      for (RawTensor& one : tensors) {
        if (one.name == tensor) return edit(one);
      }
      FAIL() << "no " << tensor;
    });
  }

  testing::TempDir dir_;
};

TEST_F(CheckpointTest, OnlyRoutedExpertsAreListedSortedByName) {
  write({.num_layers = 1, .num_experts = 11});
  const Result<Checkpoint> checkpoint = open();
  ASSERT_TRUE(checkpoint.ok()) << checkpoint.error().text();
  const std::vector<RoutedTensor>& routed = checkpoint.value().routed_tensors();
  ASSERT_EQ(routed.size(), 33U);
  EXPECT_EQ(routed[0].name, "model.layers.0.mlp.experts.0.down_proj.weight");
  EXPECT_EQ(routed[6].name, "model.layers.0.mlp.experts.10.down_proj.weight");
  EXPECT_EQ(routed[32].name, "model.layers.0.mlp.experts.9.up_proj.weight");
  EXPECT_EQ(checkpoint.value().expert_bytes(), 33U * 64 * 32 * 2);
  EXPECT_EQ(checkpoint.value().layout(), ExpertLayout::kPerExpert);
  EXPECT_EQ(checkpoint.value().files().size(), 1U);
}

TEST_F(CheckpointTest, FusedExpertsLieBehindEachOther) {
  write({.layout = Layout::kFused});
  const Result<Checkpoint> checkpoint = open();
  ASSERT_TRUE(checkpoint.ok()) << checkpoint.error().text();
  EXPECT_EQ(checkpoint.value().layout(), ExpertLayout::kFused);
  EXPECT_EQ(checkpoint.value().routed_tensors().size(), 4U);
  const ExpertSource first = checkpoint.value().expert(1, 0);
  const ExpertSource third = checkpoint.value().expert(1, 2);
  constexpr std::uint64_t kMatrixBytes = 64 * 32 * 2;
  EXPECT_EQ(first.gate.bytes(), kMatrixBytes);
  EXPECT_EQ(first.up.offset, first.gate.offset + kMatrixBytes);
  EXPECT_EQ(third.gate.offset, first.gate.offset + 4 * kMatrixBytes);
  EXPECT_EQ(third.down.offset, first.down.offset + 2 * kMatrixBytes);
  EXPECT_EQ(third.gate.rows, 32U);
  EXPECT_EQ(third.down.rows, 64U);
}

TEST_F(CheckpointTest, ASingleFileIsPreferredToAnIndexAsInTransformers) {
  write({.num_shards = 2});
  write({.num_layers = 2});
  testing::write_file(dir_.path() / kIndex, "not even JSON");
  EXPECT_TRUE(open().ok());
}

TEST_F(CheckpointTest, WithoutIndexEverySafetensorsFileIsRead) {
  write({.num_shards = 3});
  fs::remove(dir_.path() / kIndex);
  const Result<Checkpoint> checkpoint = open();
  ASSERT_TRUE(checkpoint.ok()) << checkpoint.error().text();
  EXPECT_EQ(checkpoint.value().files().size(), 3U);
}

TEST_F(CheckpointTest, TheFileNamedByTheConfigIsRead) {
  write({});
  fs::rename(dir_.path() / kSingle, dir_.path() / "other.safetensors");
  testing::write_file(dir_.path() / kSingle, "junk");
  edit_json("config.json", [](json& config) { config["transformers_weights"] = "other.safetensors"; });
  EXPECT_TRUE(open().ok());
  edit_json("config.json", [](json& config) { config["transformers_weights"] = "../other.safetensors"; });
  expect_bad_model(open(), {"config.json", "'../other.safetensors'", "outside"});
}

TEST_F(CheckpointTest, ShardsMayBeSymbolicLinksAsInTheHuggingFaceCache) {
  write({.num_shards = 2});
  const testing::TempDir blobs;
  for (const char* name : {kFirst, kSecond, "config.json", kIndex}) {
    fs::rename(dir_.path() / name, blobs.path() / name);
    fs::create_symlink(blobs.path() / name, dir_.path() / name);
  }
  const Result<Checkpoint> checkpoint = open();
  EXPECT_TRUE(checkpoint.ok()) << checkpoint.error().text();
}

TEST_F(CheckpointTest, AMissingShardIsNamed) {
  write({.num_shards = 2});
  fs::remove(dir_.path() / kSecond);
  expect_bad_model(open(), {dir_.file(kSecond), "No such file"});
  fs::create_symlink(dir_.file("gone"), dir_.path() / kSecond);  // A link whose blob was deleted.
  expect_bad_model(open(), {dir_.file(kSecond), "No such file"});
}

TEST_F(CheckpointTest, ADirectoryWithoutWeightsIsRefused) {
  write({});
  fs::remove(dir_.path() / kSingle);
  testing::write_file(dir_.path() / "pytorch_model.bin", "x");
  expect_bad_model(open(), {dir_.path().string(), "model.safetensors", "save_pretrained"});
}

TEST_F(CheckpointTest, AnIndexThatLeadsOutOfTheDirectoryIsRefused) {
  write({.num_shards = 2});
  const std::string tensor = "model.layers.0.mlp.experts.0.gate_proj.weight";
  for (const std::string& file : {std::string("/etc/passwd"), std::string("../x.safetensors"), std::string("a/../../x"),
                                  std::string(""), std::string(".."), std::string("a/"), std::string("x\0y", 3)}) {
    edit_json(kIndex, [&](json& index) { index["weight_map"][tensor] = file; });
    expect_bad_model(open(), {dir_.file(kIndex), tensor, printable(file), "outside"});
  }
}

TEST_F(CheckpointTest, AShardInASubdirectoryIsInside) {
  write({.num_shards = 2});
  fs::create_directory(dir_.path() / "part");
  fs::rename(dir_.path() / kSecond, dir_.path() / "part" / kSecond);
  edit_json(kIndex, [&](json& index) {
    for (auto& [tensor, file] : index["weight_map"].items()) {
      if (file == kSecond) file = std::string("part/") + kSecond;
    }
  });
  const Result<Checkpoint> checkpoint = open();
  EXPECT_TRUE(checkpoint.ok()) << checkpoint.error().text();
}

TEST_F(CheckpointTest, AnIndexWithoutAUsableMapIsRefused) {
  write({.num_shards = 2});
  const json index = json::parse(testing::read_file(dir_.path() / kIndex));
  const auto open_with = [&](const json& value) {
    testing::write_file(dir_.path() / kIndex, value.dump());
    return open();
  };
  expect_bad_model(open_with(json::object()), {dir_.file(kIndex), "weight_map"});
  expect_bad_model(open_with({{"weight_map", json::array()}}), {dir_.file(kIndex), "weight_map"});
  expect_bad_model(open_with({{"weight_map", json::object()}}), {dir_.file(kIndex), "weight_map"});
  expect_bad_model(open_with({{"weight_map", {{"t", 1}}}}), {dir_.file(kIndex), "'t'"});
  expect_bad_model(open_with(json::array()), {dir_.file(kIndex), "array"});
}

TEST_F(CheckpointTest, ATensorThatIsNotInTheShardTheIndexNamesIsRefused) {
  write({.num_shards = 2});
  const std::string tensor = "model.embed_tokens.weight";
  edit_json(kIndex, [&](json& index) { index["weight_map"][tensor] = kSecond; });
  expect_bad_model(open(), {tensor, dir_.file(kSecond), kIndex});
  edit_json(kIndex, [&](json& index) {
    index["weight_map"][tensor] = kFirst;
    index["weight_map"]["model.layers.7.nothing"] = kFirst;
  });
  expect_bad_model(open(), {"'model.layers.7.nothing'", dir_.file(kFirst)});
}

TEST_F(CheckpointTest, AMissingExpertTensorIsNamedWithTheCounts) {
  write({});
  const std::string tensor = "model.layers.1.mlp.experts.2.up_proj.weight";
  edit_tensors(kSingle, [&](auto& tensors) { std::erase_if(tensors, [&](auto& one) { return one.name == tensor; }); });
  expect_bad_model(open(),
                   {tensor, dir_.path().string(), "1 files", "23 routed-expert tensors", "4 experts", "2 layers"});
}

TEST_F(CheckpointTest, AMissingFusedTensorIsNamed) {
  write({.layout = Layout::kFused});
  const std::string tensor = "model.layers.0.mlp.experts.down_proj";
  edit_tensors(kSingle, [&](auto& tensors) { std::erase_if(tensors, [&](auto& one) { return one.name == tensor; }); });
  expect_bad_model(open(), {tensor, "3 routed-expert tensors"});
}

TEST_F(CheckpointTest, AConfigWithMoreLayersThanTheWeightsIsRefused) {
  write({});
  edit_json("config.json", [](json& config) { config["num_hidden_layers"] = 3; });
  expect_bad_model(open(), {"model.layers.2.mlp.experts.0.gate_proj.weight", "3 layers"});
}

TEST_F(CheckpointTest, ExpertsOfLayersBeyondTheConfigAreIgnoredAsInTransformers) {
  write({.num_layers = 3});
  edit_json("config.json", [](json& config) { config["num_hidden_layers"] = 2; });
  const Result<Checkpoint> checkpoint = open();
  ASSERT_TRUE(checkpoint.ok()) << checkpoint.error().text();
  EXPECT_EQ(checkpoint.value().routed_tensors().size(), 24U);
}

TEST_F(CheckpointTest, AShapeThatDoesNotFitTheConfigIsRefusedWithBoth) {
  write({});
  edit_tensor("model.layers.0.mlp.experts.3.down_proj.weight", [](RawTensor& tensor) { tensor.shape = {32, 64}; });
  expect_bad_model(open(), {"model.layers.0.mlp.experts.3.down_proj.weight", dir_.file(kSingle), "[32,64]", "[64,32]",
                            "hidden_size 64", "intermediate size 32"});
}

TEST_F(CheckpointTest, SizesOfTheConfigThatDoNotFitTheWeightsAreRefused) {
  write({});
  edit_json("config.json", [](json& config) { config["hidden_size"] = 128; });
  expect_bad_model(open(), {"model.layers.0.mlp.experts.0.gate_proj.weight", "[32,64]", "[32,128]"});
  edit_json("config.json", [](json& config) {
    config["hidden_size"] = 64;
    config["moe_intermediate_size"] = 31;
  });
  expect_bad_model(open(), {"[32,64]", "[31,64]"});
}

TEST_F(CheckpointTest, FusedTensorsForAnotherNumberOfExpertsAreRefused) {
  write({.layout = Layout::kFused});
  edit_json("config.json", [](json& config) { config["num_experts"] = 5; });
  expect_bad_model(open(), {"model.layers.0.mlp.experts.gate_up_proj", "[4,64,64]", "[5,64,64]"});
}

TEST_F(CheckpointTest, AnExpertTooManyIsRefused) {
  write({});
  edit_json("config.json", [](json& config) { config["num_experts"] = 3; });
  expect_bad_model(open(), {"unknown", "model.layers.0.mlp.experts.3.down_proj.weight", dir_.file(kSingle), "0 to 2"});
}

TEST_F(CheckpointTest, BiasesAndScalesOfExpertsAreRefused) {
  for (const Layout layout : {Layout::kPerExpert, Layout::kFused}) {
    write({.layout = layout});
    const std::string extra = layout == Layout::kFused ? "model.layers.1.mlp.experts.down_proj_bias"
                                                       : "model.layers.1.mlp.experts.0.up_proj.weight_scale_inv";
    edit_tensors(kSingle, [&](auto& tensors) { tensors.push_back({extra, "F32", {1}, "abcd"}); });
    expect_bad_model(open(), {"unknown", extra, "[1]", "F32"});
  }
}

TEST_F(CheckpointTest, AnotherDtypeIsRefused) {
  write({});
  const std::string tensor = "model.layers.0.mlp.experts.0.gate_proj.weight";
  edit_tensor(tensor, [](RawTensor& raw) {
    raw.dtype = "F8_E4M3";
    raw.data.resize(raw.data.size() / 2);
  });
  expect_bad_model(open(), {tensor, "F8_E4M3", "BF16, F16 or F32"});
}

TEST_F(CheckpointTest, DtypesMayDifferFromTensorToTensor) {
  write({});
  edit_tensor("model.layers.0.mlp.experts.0.gate_proj.weight", [](RawTensor& raw) {
    raw.dtype = "F32";
    raw.data.resize(raw.data.size() * 2);
  });
  const Result<Checkpoint> checkpoint = open();
  ASSERT_TRUE(checkpoint.ok()) << checkpoint.error().text();
  EXPECT_EQ(checkpoint.value().expert(0, 0).gate.dtype, DType::kF32);
  EXPECT_EQ(checkpoint.value().expert(0, 0).up.dtype, DType::kBf16);
}

TEST_F(CheckpointTest, MixedLayoutsAreRefusedNamingOneOfEach) {
  write({});
  edit_tensors(kSingle, [](auto& tensors) {
    tensors.push_back({"model.layers.1.mlp.experts.down_proj", "BF16", {4, 64, 32}, std::string(4 * 64 * 32 * 2, 'x')});
  });
  expect_bad_model(open(), {"mixed", "'model.layers.0.mlp.experts.0.down_proj.weight'",
                            "'model.layers.1.mlp.experts.down_proj'", dir_.file(kSingle)});
}

TEST_F(CheckpointTest, MixedPrefixesAreRefused) {
  write({});
  edit_tensor("model.layers.1.mlp.experts.0.up_proj.weight", [](RawTensor& raw) { raw.name.erase(0, 6); });
  expect_bad_model(open(), {"mixed", "'layers.1.mlp.experts.0.up_proj.weight'"});
}

TEST_F(CheckpointTest, ATensorInTwoFilesIsRefusedNamingBoth) {
  write({.num_shards = 2});
  fs::remove(dir_.path() / kIndex);
  fs::copy_file(dir_.path() / kFirst, dir_.path() / "copy.safetensors");
  expect_bad_model(open(), {"twice", "model.layers.0.mlp.experts.0.down_proj.weight", dir_.file(kFirst),
                            dir_.file("copy.safetensors")});
}

TEST_F(CheckpointTest, AModelWithoutExpertTensorsIsRefused) {
  write({});
  edit_tensors(kSingle, [](auto& tensors) {
    std::erase_if(tensors, [](auto& one) { return one.name.find("experts") != std::string::npos; });
  });
  expect_bad_model(open(), {"no routed experts", "'model.layers.0.mlp.experts.0.gate_proj.weight'",
                            "'model.layers.0.mlp.experts.gate_up_proj'"});
}

TEST_F(CheckpointTest, ATruncatedShardIsRefusedBeforeAnythingIsRead) {
  write({.num_shards = 2});
  fs::resize_file(dir_.path() / kSecond, fs::file_size(dir_.path() / kSecond) - 1);
  expect_bad_model(open(), {dir_.file(kSecond), "outside the file"});
  fs::resize_file(dir_.path() / kSecond, 100);
  expect_bad_model(open(), {dir_.file(kSecond), "the file has 100"});
}

}  // namespace
}  // namespace kt::coproc
