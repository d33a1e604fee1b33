#include "coproc/engine/job.h"

#include "coproc/engine/text.h"

namespace kt::coproc {
namespace {

std::string describe_half(const shm::HalfSpec& half) {
  if (half.r == 0) return "none";
  return "r " + std::to_string(half.r) + " scaling " + number_text(half.scaling);
}

std::string describe_spec(const AdapterLayerSpec* spec) {
  if (spec == nullptr) return "not adapted";
  return "gate_up " + describe_half(spec->gate_up) + (spec->shared_a ? " shared_a" : "") + ", down " +
         describe_half(spec->down);
}

std::string ids_text(const Job& job) {
  std::vector<std::uint32_t> ids;
  for (const auto& [adapter_id, adapter] : job.adapters) ids.push_back(adapter_id);
  return ids.empty() ? "none" : join_ranks(ids);
}

}  // namespace

Adapter* Job::find_adapter(std::uint32_t adapter_id) const {
  const auto found = adapters.find(adapter_id);
  return found == adapters.end() ? nullptr : found->second.get();
}

bool Job::has_sessions() const {
  for (const Member& member : members) {
    if (member.session != nullptr) return true;
  }
  return false;
}

std::vector<Session*> Job::sessions() const {
  std::vector<Session*> present;
  for (const Member& member : members) {
    if (member.session != nullptr) present.push_back(member.session);
  }
  return present;
}

std::vector<std::uint32_t> Job::ranks() const {
  std::vector<std::uint32_t> all;
  for (const Member& member : members) all.push_back(member.rank);
  return all;
}

std::string adapters_difference(const Job& job_a, std::uint32_t rank_a, const Job& job_b, std::uint32_t rank_b,
                                std::uint32_t num_layers) {
  const std::string name_a = "rank " + std::to_string(rank_a);
  const std::string name_b = "rank " + std::to_string(rank_b);
  if (ids_text(job_a) != ids_text(job_b)) {
    return name_a + " has the adapters " + ids_text(job_a) + ", " + name_b + " has " + ids_text(job_b);
  }
  for (const auto& [adapter_id, adapter_a] : job_a.adapters) {
    const Adapter& adapter_b = *job_b.find_adapter(adapter_id);
    if (adapter_a->same_specs(adapter_b)) continue;
    for (std::uint32_t layer = 0; layer < num_layers; ++layer) {
      const std::string spec_a = describe_spec(adapter_a->spec(layer));
      const std::string spec_b = describe_spec(adapter_b.spec(layer));
      if (spec_a == spec_b) continue;
      std::string text = "adapter " + std::to_string(adapter_id) + ", layer " + std::to_string(layer) + ": ";
      return text.append(name_a).append(" has ").append(spec_a).append("; ").append(name_b).append(" has ").append(
          spec_b);
    }
    std::string text = "adapter " + std::to_string(adapter_id);
    return text.append(" differs between ").append(name_a).append(" and ").append(name_b);
  }
  return "";
}

}  // namespace kt::coproc
