// HunYuan V4: the experts' gate and up are clamped.
#include "coproc/model/families.h"

namespace kt::coproc {
namespace {

constexpr std::string_view kHyV4Architectures[] = {"HYV4ForCausalLM", "HYV4Model"};
constexpr std::string_view kHyV4NumExpertsKeys[] = {"n_routed_experts", "num_local_experts"};
constexpr std::string_view kHyV4Prefixes[] = {"model.", ""};

Result<std::vector<std::uint32_t>> hy_v4_moe_layers(const ConfigReader& config, std::uint32_t num_layers) {
  return layers_by_type(config, num_layers, /*num_dense=*/1);
}

Result<Activation> hy_v4_activation(const ConfigReader& config) {
  KT_TRY_STATUS(config.require_silu());
  KT_TRY(const float limit, config.positive("swiglu_limit", 10));
  return Activation{ActivationKind::kClampedSwiGlu, limit};
}

}  // namespace

extern const Family kHyV4;
constinit const Family kHyV4 = {.model_type = "hy_v4",
                                .architectures = kHyV4Architectures,
                                .num_experts_keys = kHyV4NumExpertsKeys,
                                .moe_layers = hy_v4_moe_layers,
                                .activation = hy_v4_activation,
                                .prefixes = kHyV4Prefixes};

}  // namespace kt::coproc
