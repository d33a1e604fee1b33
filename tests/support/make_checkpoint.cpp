// make_checkpoint DIR [key=value …]: writes a small random checkpoint for tests of whole processes. Keys and defaults
// are CheckpointSpec's: layers, experts, top_k, hidden, intermediate, shards, seed, dtype=bf16|f16|f32,
// layout=per_expert|fused.
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <map>
#include <string>

#include "tests/support/checkpoint_writer.h"

namespace kt::testing {
namespace {

bool set_option(CheckpointSpec& spec, const std::string& key, const std::string& value) {
  const std::map<std::string, std::uint32_t*> counts = {{"layers", &spec.num_layers},
                                                        {"experts", &spec.num_experts},
                                                        {"top_k", &spec.top_k},
                                                        {"hidden", &spec.hidden_size},
                                                        {"intermediate", &spec.intermediate_size},
                                                        {"shards", &spec.num_shards}};
  const std::map<std::string, WeightDType> dtypes = {
      {"bf16", WeightDType::kBf16}, {"f16", WeightDType::kF16}, {"f32", WeightDType::kF32}};
  const std::map<std::string, Layout> layouts = {{"per_expert", Layout::kPerExpert}, {"fused", Layout::kFused}};
  if (const auto count = counts.find(key); count != counts.end()) {
    *count->second = static_cast<std::uint32_t>(std::strtoul(value.c_str(), nullptr, 10));
    return *count->second > 0;
  }
  if (key == "seed") {
    spec.seed = std::strtoull(value.c_str(), nullptr, 10);
    return true;
  }
  if (key == "dtype" && dtypes.contains(value)) {
    spec.dtype = dtypes.at(value);
    return true;
  }
  if (key == "layout" && layouts.contains(value)) {
    spec.layout = layouts.at(value);
    return true;
  }
  return false;
}

}  // namespace
}  // namespace kt::testing

int main(int argc, char** argv) {
  if (argc < 2) {
    std::fprintf(stderr, "usage: make_checkpoint DIR [key=value …]\n");
    return 2;
  }
  kt::testing::CheckpointSpec spec;
  for (int i = 2; i < argc; ++i) {
    const std::string option = argv[i];
    const std::size_t equals = option.find('=');
    if (equals == std::string::npos ||
        !kt::testing::set_option(spec, option.substr(0, equals), option.substr(equals + 1))) {
      std::fprintf(stderr, "make_checkpoint: cannot use '%s'\n", argv[i]);
      return 2;
    }
  }
  kt::testing::write_checkpoint(argv[1], spec);
  return 0;
}
