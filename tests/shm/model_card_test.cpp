#include "shm/model_card.h"

#include <gtest/gtest.h>

#include <limits>

namespace kt::shm {
namespace {

using nlohmann::json;

ModelCard card() {
  return {.path = "/models/é",
          .architecture = "Qwen3MoeForCausalLM",
          .fingerprint = std::string(64, 'f'),
          .weight_format = "int4",
          .num_layers = 48,
          .num_experts = 128,
          .top_k = 8,
          .hidden_size = 2048,
          .intermediate_size = 768,
          .moe_layers = {0, 3, 47},
          .activation = {},
          .expert_names = {.prefixes = {"model.", ""},
                           .path = "mlp.experts",
                           .projections = {"gate_proj", "up_proj", "down_proj"},
                           .fused = {"gate_up_proj", "down_proj"}}};
}

// What is wrong with a good card of which one key was changed.
std::string why(const char* key, const json& value) {
  json object = to_json(card());
  object[key] = value;
  const auto parsed = parse_model_card(object);
  if (parsed.ok()) return "";
  EXPECT_EQ(parsed.error().code, ErrorCode::kVersionMismatch);
  EXPECT_FALSE(parsed.error().what.empty() || parsed.error().fix.empty());
  return parsed.error().why;
}

TEST(ModelCard, KeepsEveryFactThroughJson) {
  EXPECT_EQ(parse_model_card(json::parse(to_json(card()).dump())).value(), card());
  ModelCard clamped = card();
  clamped.activation = {ActivationKind::kClampedSwiGlu, 7.5f};
  EXPECT_EQ(parse_model_card(json::parse(to_json(clamped).dump())).value(), clamped);
}

TEST(ModelCard, HasTheKeysOfTheWire) {
  const json object = to_json(card());
  EXPECT_EQ(object, (json{{"path", "/models/é"},
                          {"architecture", "Qwen3MoeForCausalLM"},
                          {"fingerprint", std::string(64, 'f')},
                          {"weight_format", "int4"},
                          {"num_layers", 48},
                          {"num_experts", 128},
                          {"top_k", 8},
                          {"hidden_size", 2048},
                          {"intermediate_size", 768},
                          {"moe_layers", {0, 3, 47}},
                          {"activation", "swiglu"},
                          {"expert_names",
                           {{"path", "mlp.experts"},
                            {"prefixes", {"model.", ""}},
                            {"projections", {"gate_proj", "up_proj", "down_proj"}},
                            {"fused", {"gate_up_proj", "down_proj"}}}}}));
}

TEST(ModelCard, IsValidUtf8WhateverThePathIs) {
  ModelCard strange = card();
  strange.path = "/models/\xff";
  EXPECT_EQ(json::parse(to_json(strange).dump())["path"], "/models/\xEF\xBF\xBD");
}

TEST(ModelCard, EveryMissingFactIsNamed) {
  const json whole = to_json(card());
  for (const auto& [key, value] : whole.items()) {
    json object = whole;
    object.erase(key);
    const auto parsed = parse_model_card(object);
    if (key == "activation") {
      EXPECT_EQ(parsed.value(), card());
    } else if (key == "expert_names") {
      EXPECT_EQ(parsed.value().expert_names, ExpertNames{});
    } else {
      ASSERT_FALSE(parsed.ok()) << key;
      EXPECT_EQ(parsed.error().why, key + " is missing");
    }
  }
}

TEST(ModelCard, EveryFactOfAnotherTypeIsRefusedByName) {
  const json whole = to_json(card());
  for (const auto& [key, value] : whole.items()) {
    for (const json& hostile : {json(nullptr), json(-1), json(0.5), json(true), json::object(), json{{"a", 1}},
                                json(json::array({json::array()})), json(std::numeric_limits<double>::infinity())}) {
      EXPECT_NE(why(key.c_str(), hostile).find(key), std::string::npos) << key << " " << hostile;
    }
  }
}

TEST(ModelCard, NumbersBeyondTheirLimitsAreRefusedAndNotCut) {
  const std::uint64_t wraps_to_one = (std::uint64_t{1} << 32) + 1;
  for (const char* key : {"num_layers", "num_experts", "top_k", "hidden_size", "intermediate_size"}) {
    EXPECT_EQ(why(key, 0), std::string(key) + " is 0");
    EXPECT_EQ(why(key, wraps_to_one), std::string(key) + " is 4294967297");
  }
  EXPECT_EQ(why("top_k", kTopKMax + 1), "top_k is 1025");
  EXPECT_EQ(why("hidden_size", kHiddenSizeMax), "");
  EXPECT_EQ(why("top_k", 129), "top_k is 129 of 128 experts");
}

TEST(ModelCard, LayersAscendBelowTheNumberOfLayers) {
  for (const json& layers : {json{3, 3}, json{3, 0}, json{0, 48}}) {
    EXPECT_EQ(why("moe_layers", layers), "moe_layers is no ascending list of layers below 48");
  }
  EXPECT_EQ(why("moe_layers", json::array()), "moe_layers is []");
  EXPECT_EQ(why("moe_layers", {0, -1}), "moe_layers is [0,-1]");
}

TEST(ModelCard, AnActivationThatTheKernelsLackIsRefused) {
  EXPECT_EQ(why("activation", "gelu"), "activation is \"gelu\"");
  EXPECT_EQ(why("activation", "clamped_swiglu"), "activation_limit is missing");
  EXPECT_EQ(why("activation_limit", 7.5), "activation_limit is 7.5");
  EXPECT_EQ(why("activation_limit", "7.5"), "activation_limit is \"7.5\"");
}

TEST(ModelCard, NamesOfExpertTensorsAreShortAndFew) {
  json names = to_json(card())["expert_names"];
  names["prefixes"] = json::array();
  for (std::size_t n = 0; n < kExpertNamesMax; ++n) names["prefixes"].push_back(std::string(kExpertNameBytesMax, 'x'));
  EXPECT_EQ(why("expert_names", names), "");
  names["prefixes"].push_back("");
  EXPECT_NE(why("expert_names", names), "");
  names["prefixes"] = {std::string(kExpertNameBytesMax + 1, 'x')};
  EXPECT_NE(why("expert_names", names), "");
  names["prefixes"] = {1};
  EXPECT_NE(why("expert_names", names), "");
  names["prefixes"] = json::array();
  EXPECT_NE(why("expert_names", names), "") << "no prefix";
  names.erase("prefixes");
  EXPECT_NE(why("expert_names", names), "");
}

TEST(ModelCard, LongHostileTextIsCutInTheMessage) {
  const std::string message = why("num_layers", std::string(100'000, 'x') + "\n");
  EXPECT_LT(message.size(), 120u);
}

TEST(ModelCard, IsAnObject) {
  for (const json& other : {json(json::value_t::discarded), json(nullptr), json("text"), json(1), json::array()}) {
    ASSERT_FALSE(parse_model_card(other).ok());
    EXPECT_EQ(parse_model_card(other).error().why, "it is no object");
  }
}

}  // namespace
}  // namespace kt::shm
