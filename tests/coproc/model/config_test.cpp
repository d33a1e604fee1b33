#include "coproc/model/config.h"

#include <gtest/gtest.h>

#include <filesystem>
#include <nlohmann/json.hpp>

#include "coproc/model/input_file.h"
#include "tests/coproc/model/test_support.h"
#include "tests/support/checkpoint_writer.h"
#include "tests/support/temp_dir.h"

namespace kt::coproc {
namespace {

using nlohmann::json;

class ConfigTest : public ::testing::Test {
 protected:
  ConfigTest() {
    testing::write_checkpoint(dir_.path(), {});
    config_ = json::parse(testing::read_file(dir_.path() / "config.json"));
  }
  Result<ModelConfig> read() {
    testing::write_file(dir_.path() / "config.json", config_.dump());
    return read_config(dir_.path().string());
  }

  testing::TempDir dir_;
  json config_;
};

TEST_F(ConfigTest, AllFieldsAreRead) {
  const Result<ModelConfig> result = read();
  ASSERT_TRUE(result.ok()) << result.error().text();
  const ModelConfig& model = result.value();
  EXPECT_EQ(model.path, dir_.path().string());
  EXPECT_EQ(model.architecture, "Qwen3MoeForCausalLM");
  EXPECT_EQ(model.model_type, "qwen3_moe");
  EXPECT_EQ(model.num_layers, 2U);
  EXPECT_EQ(model.moe_layers, (std::vector<std::uint32_t>{0, 1}));
  EXPECT_EQ(model.num_experts, 4U);
  EXPECT_EQ(model.top_k, 2U);
  EXPECT_EQ(model.hidden_size, 64U);
  EXPECT_EQ(model.intermediate_size, 32U);
  EXPECT_EQ(model.weights_file, "");
  ASSERT_NE(model.family, nullptr);
}

TEST_F(ConfigTest, TheNamesOfTheExpertTensorsAreTheFamilys) {
  const Result<ModelConfig> result = read();
  ASSERT_TRUE(result.ok()) << result.error().text();
  const shm::ExpertNames& names = result.value().expert_names;
  EXPECT_EQ(names.prefixes, (std::vector<std::string>{"model.", "", "transformer."}));
  EXPECT_EQ(names.path, "mlp.experts");
  EXPECT_EQ(names.projections, (std::vector<std::string>{"gate_proj", "up_proj", "down_proj"}));
  EXPECT_EQ(names.fused, (std::vector<std::string>{"gate_up_proj", "down_proj"}));
}

class HyV4ConfigTest : public ConfigTest {
 protected:
  HyV4ConfigTest() {
    config_["architectures"] = {"HYV4ForCausalLM"};
    config_["model_type"] = "hy_v4";
    config_["n_routed_experts"] = config_["num_experts"];
    config_.erase("num_experts");
    config_["num_hidden_layers"] = 4;
  }
};

TEST_F(HyV4ConfigTest, TheLimitOfItsClampIsRead) {
  config_["swiglu_limit"] = 7.5;
  const Result<ModelConfig> result = read();
  ASSERT_TRUE(result.ok()) << result.error().text();
  EXPECT_EQ(result.value().activation, (Activation{ActivationKind::kClampedSwiGlu, 7.5f}));
  config_.erase("swiglu_limit");
  EXPECT_EQ(read().value().activation.limit, 10.0f);
}

TEST_F(HyV4ConfigTest, ALimitThatIsNoneIsRefusedWithItsValue) {
  for (const json& limit : {json(0), json(-1.5), json("7"), json(1e60)}) {
    config_["swiglu_limit"] = limit;
    expect_bad_model(read(), {"swiglu_limit is", "a number above zero"});
  }
}

TEST_F(HyV4ConfigTest, ItsListOfLayerTypesSaysWhichHaveExperts) {
  EXPECT_EQ(read().value().moe_layers, (std::vector<std::uint32_t>{1, 2, 3}));
  config_["mlp_layer_types"] = {"sparse", "dense", "dense", "sparse"};
  EXPECT_EQ(read().value().moe_layers, (std::vector<std::uint32_t>{0, 3}));
  config_["mlp_layer_types"] = {"sparse", "dense", "dense", "moe"};
  expect_bad_model(read(), {"mlp_layer_types", "moe"});
  config_["mlp_layer_types"] = {"sparse"};
  expect_bad_model(read(), {"mlp_layer_types", "4 layers"});
  config_["mlp_layer_types"] = {"dense", "dense", "dense", "dense"};
  expect_bad_model(read(), {"none of its 4 layers"});
}

TEST_F(ConfigTest, ThePathBecomesAbsoluteAndPlain) {
  ASSERT_TRUE(read().ok());
  const std::filesystem::path before = std::filesystem::current_path();
  std::filesystem::current_path(dir_.path().parent_path());
  const Result<ModelConfig> result =
      read_config("./" + dir_.path().filename().string() + "/../" + dir_.path().filename().string() + "//");
  std::filesystem::current_path(before);
  ASSERT_TRUE(result.ok()) << result.error().text();
  EXPECT_EQ(result.value().path, dir_.path().string());
}

TEST_F(ConfigTest, TheNameOfTransformers5ForTheNumberOfExpertsIsRead) {
  config_.erase("num_experts");
  config_["num_local_experts"] = 8;
  const Result<ModelConfig> result = read();
  ASSERT_TRUE(result.ok()) << result.error().text();
  EXPECT_EQ(result.value().num_experts, 8U);
}

TEST_F(ConfigTest, LayersWithoutExpertsAreLeftOut) {
  config_["num_hidden_layers"] = 7;
  config_["decoder_sparse_step"] = 2;
  config_["mlp_only_layers"] = {3, 3, -1, 100};
  const Result<ModelConfig> result = read();
  ASSERT_TRUE(result.ok()) << result.error().text();
  EXPECT_EQ(result.value().moe_layers, (std::vector<std::uint32_t>{1, 5}));
}

TEST_F(ConfigTest, AbsentAndNullKeysHaveTheDefaultsOfTransformers) {
  config_.erase("decoder_sparse_step");
  config_.erase("hidden_act");
  config_["mlp_only_layers"] = nullptr;
  config_["quantization_config"] = nullptr;
  const Result<ModelConfig> result = read();
  ASSERT_TRUE(result.ok()) << result.error().text();
  EXPECT_EQ(result.value().moe_layers.size(), 2U);
}

TEST_F(ConfigTest, MissingKeysAreNamed) {
  for (const char* key : {"num_hidden_layers", "num_experts", "num_experts_per_tok", "hidden_size",
                          "moe_intermediate_size", "architectures", "model_type"}) {
    const json kept = std::exchange(config_[key], nullptr);
    expect_bad_model(read(), {key, "config.json"});
    config_.erase(key);
    expect_bad_model(read(), {key, "config.json"});
    config_[key] = kept;
  }
  ASSERT_TRUE(read().ok());
}

TEST_F(ConfigTest, ValuesOutsideTheLimitsAreNamed) {
  const std::vector<std::pair<const char*, json>> cases = {
      {"hidden_size", 0},
      {"hidden_size", (1 << 20) + 1},
      {"hidden_size", -64},
      {"hidden_size", 64.5},
      {"hidden_size", "64"},
      {"moe_intermediate_size", (1 << 20) + 1},
      {"num_experts", 0},
      {"num_experts", (1 << 16) + 1},
      {"num_experts", 18446744073709551615U},
      {"num_experts_per_tok", 1025},
      {"num_hidden_layers", 65536},
      {"decoder_sparse_step", 0},
      {"mlp_only_layers", "none"},
      {"mlp_only_layers", {0, "x"}},
      {"hidden_act", 7},
  };
  for (const auto& [key, value] : cases) {
    const json kept = std::exchange(config_[key], value);
    expect_bad_model(read(), {key, value.is_string() ? value.get<std::string>() : value.dump(), "config.json"});
    config_[key] = kept;
  }
}

TEST_F(ConfigTest, MoreRoutesPerTokenThanExpertsAreRefused) {
  config_["num_experts_per_tok"] = 5;
  expect_bad_model(read(), {"num_experts_per_tok", "5", "4"});
}

TEST_F(ConfigTest, AModelWithoutRoutedExpertsIsRefused) {
  config_["mlp_only_layers"] = {0, 1};
  expect_bad_model(read(), {"none of its 2 layers has routed experts", "2 mlp_only_layers"});
}

TEST_F(ConfigTest, AnUnknownArchitectureNamesTheSupportedOnes) {
  config_["architectures"] = {"LlamaForCausalLM"};
  config_["model_type"] = "llama";
  expect_bad_model(read(), {"'LlamaForCausalLM'", "'llama'", "Qwen2MoeForCausalLM", "Qwen3MoeForCausalLM"});
  config_["architectures"] = {"Qwen3MoeForCausalLM"};
  expect_bad_model(read(), {"Qwen3MoeForCausalLM", "'qwen3_moe'", "'llama'"});
  config_["architectures"] = json::array();
  expect_bad_model(read(), {"names no architecture"});
  config_["architectures"] = {1};
  expect_bad_model(read(), {"names no architecture"});
}

TEST_F(ConfigTest, AnotherActivationIsRefused) {
  config_["hidden_act"] = "gelu";
  expect_bad_model(read(), {"hidden_act", "'gelu'", "silu"});
}

TEST_F(ConfigTest, AQuantisedCheckpointIsRefused) {
  config_["quantization_config"] = {{"quant_method", "fp8"}};
  expect_bad_model(read(), {"quantised", "fp8", "unquantised"});
}

TEST_F(ConfigTest, WhatIsNotACheckpointDirectoryIsRefused) {
  expect_bad_model(read_config(""), {"path is empty"});
  expect_bad_model(read_config(dir_.file("nowhere")), {dir_.file("nowhere"), "No such file"});
  expect_bad_model(read_config(dir_.file("config.json")), {dir_.file("config.json"), "no directory"});
  const testing::TempDir empty;
  expect_bad_model(read_config(empty.path().string()), {empty.path().string(), "no config.json"});
}

TEST_F(ConfigTest, ConfigFilesThatAreNoJsonObjectAreRefused) {
  const auto read_text = [&](const std::string& text) {
    testing::write_file(dir_.path() / "config.json", text);
    return read_config(dir_.path().string());
  };
  expect_bad_model(read_text(""), {"config.json", "not valid JSON"});
  expect_bad_model(read_text("{\"a\": "), {"config.json", "not valid JSON", "line 1, column 7"});
  expect_bad_model(read_text("[1]"), {"config.json", "array"});
  expect_bad_model(read_text(std::string(100000, '[')), {"config.json", "nested deeper than 64"});
  expect_bad_model(read_text(std::string(5 << 20, ' ')), {"config.json", "5242880", "4194304"});
  std::filesystem::remove(dir_.path() / "config.json");
  std::filesystem::create_directory(dir_.path() / "config.json");
  expect_bad_model(read_config(dir_.path().string()), {"config.json", "not a regular file"});
}

TEST(Printable, TextFromFilesCannotTouchTheTerminal) {
  EXPECT_EQ(printable("a\x1b[2Jb\n\xff"), std::string("'a?[2Jb?") + "?'");
  EXPECT_EQ(printable(std::string(300, 'x')), "'" + std::string(200, 'x') + "…'");
}

}  // namespace
}  // namespace kt::coproc
