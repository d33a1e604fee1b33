#include "coproc/model/families.h"

#include <gtest/gtest.h>

namespace kt::coproc {
namespace {

const Family& qwen3() { return *families()[1]; }

TEST(Families, NamesAreThoseOfTransformers) {
  ASSERT_EQ(qwen3().model_type, "qwen3_moe");
  EXPECT_EQ(qwen3().per_expert_name("model.", 3, 17, Projection::kGate),
            "model.layers.3.mlp.experts.17.gate_proj.weight");
  EXPECT_EQ(qwen3().per_expert_name("", 0, 0, Projection::kUp), "layers.0.mlp.experts.0.up_proj.weight");
  EXPECT_EQ(qwen3().per_expert_name("", 0, 0, Projection::kDown), "layers.0.mlp.experts.0.down_proj.weight");
  EXPECT_EQ(qwen3().fused_name("model.", 3, false), "model.layers.3.mlp.experts.gate_up_proj");
  EXPECT_EQ(qwen3().fused_name("model.", 3, true), "model.layers.3.mlp.experts.down_proj");
}

TEST(Families, ExpertNamesAreTakenApart) {
  const auto parts = parse_expert_name(qwen3(), "model.layers.12.mlp.experts.3.up_proj.weight");
  ASSERT_TRUE(parts);
  EXPECT_EQ(parts->prefix, "model.");
  EXPECT_EQ(parts->layer, 12U);
  EXPECT_EQ(parts->rest, "3.up_proj.weight");
  EXPECT_EQ(parse_expert_name(qwen3(), "layers.1.mlp.experts.down_proj")->prefix, "");
  EXPECT_EQ(parse_expert_name(qwen3(), "transformer.layers.1.mlp.experts.down_proj")->prefix, "transformer.");
}

TEST(Families, OtherNamesAreNoExperts) {
  for (const char* name : {"", "model.", "model.layers.", "model.layers.1", "model.layers.1.mlp.gate.weight",
                           "model.layers.x.mlp.experts.0.up_proj.weight", "model.layers.1.mlp.experts",
                           "model.layers.1.mlp.shared_expert.up_proj.weight", "lm_head.weight",
                           "model.layers.99999999999.mlp.experts.down_proj", "model.layers.-1.mlp.experts.down_proj",
                           "other.layers.1.mlp.experts.down_proj"}) {
    EXPECT_FALSE(parse_expert_name(qwen3(), name)) << name;
  }
}

TEST(Families, EveryArchitectureIsListed) {
  const std::string list = supported_architectures();
  EXPECT_NE(list.find("Qwen2MoeForCausalLM"), std::string::npos);
  EXPECT_NE(list.find("Qwen3MoeForCausalLM"), std::string::npos);
  EXPECT_NE(list.find("HYV4ForCausalLM"), std::string::npos);
}

}  // namespace
}  // namespace kt::coproc
