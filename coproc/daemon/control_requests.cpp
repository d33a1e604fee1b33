#include "coproc/daemon/control_requests.h"

#include <algorithm>
#include <limits>

#include "coproc/engine/text.h"
#include "shm/status_page.h"
#include "shm/text.h"

namespace kt::coproc {
namespace {

using nlohmann::json;

constexpr std::size_t kLabelBytesMax = sizeof shm::JobRow::name - 1;
constexpr std::uint64_t kU32Max = std::numeric_limits<std::uint32_t>::max();
constexpr double kTimeoutSecondsMax = 1e8;  // Three years; it has to fit nanoseconds.
constexpr std::uint32_t kAdapterIdMax = 65535;

Error malformed(const char* key, const std::string& needed) {
  return Error{ErrorCode::kInvalidArgument, "a malformed control packet",
               std::string("its \"") + key + "\" has to be " + needed,
               "run client and daemon of the same kt-coproc release"};
}

Result<std::uint64_t> unsigned_field(const json& body, const char* key, std::uint64_t max = kU32Max) {
  const auto found = body.find(key);
  if (found == body.end() || !found->is_number_unsigned() || found->get<std::uint64_t>() > max) {
    return malformed(key, "a whole number from 0 to " + std::to_string(max));
  }
  return found->get<std::uint64_t>();
}

Result<std::uint32_t> u32_field(const json& body, const char* key) {
  KT_TRY(const std::uint64_t value, unsigned_field(body, key));
  return static_cast<std::uint32_t>(value);
}

Result<double> number_field(const json& body, const char* key, double min, double max) {
  const auto found = body.find(key);
  if (found == body.end() || !found->is_number()) return malformed(key, "a number");
  const double value = found->get<double>();
  if (!(value >= min && value <= max)) return malformed(key, "a number in its range");
  return value;
}

// Absent: "".
Result<std::string> text_field(const json& body, const char* key) {
  const auto found = body.find(key);
  if (found == body.end()) return std::string();
  if (!found->is_string()) return malformed(key, "a string");
  return shm::valid_utf8(shm::one_line(found->get<std::string>()));
}

// Absent: false.
Result<bool> flag_field(const json& body, const char* key) {
  const auto found = body.find(key);
  if (found == body.end()) return false;
  if (!found->is_boolean()) return malformed(key, "true or false");
  return found->get<bool>();
}

Result<std::vector<std::uint32_t>> list_field(const json& body, const char* key) {
  const auto found = body.find(key);
  const auto is_u32 = [](const json& item) {
    return item.is_number_unsigned() && item.get<std::uint64_t>() <= kU32Max;
  };
  if (found == body.end() || !found->is_array() || !std::all_of(found->begin(), found->end(), is_u32)) {
    return malformed(key, "a list of whole numbers");
  }
  return found->get<std::vector<std::uint32_t>>();
}

// A label for logs and monitors: never longer than its field.
Result<std::string> label_field(const json& body, const char* key) {
  KT_TRY(const std::string text, text_field(body, key));
  return std::string(shm::cut_utf8(text, kLabelBytesMax));
}

Result<shm::HalfSpec> half_field(const json& body, const char* key) {
  const auto found = body.find(key);
  if (found == body.end() || !found->is_object()) return malformed(key, "an object with r and scaling");
  shm::HalfSpec half;
  KT_TRY(half.r, u32_field(*found, "r"));
  if (half.r == 0 && !found->contains("scaling")) return half;
  constexpr double kScalingMax = std::numeric_limits<float>::max();
  KT_TRY(half.scaling, number_field(*found, "scaling", -kScalingMax, kScalingMax));
  return half;
}

Error senseless(std::string what, std::string why, std::string fix) {
  return Error{ErrorCode::kInvalidArgument, std::move(what), std::move(why), std::move(fix)};
}

// What is wrong with one rank's join by itself; empty: nothing.
std::string join_fault(const JoinJob& join) {
  const auto& members = join.members;
  if (join.job_id.empty() || join.job_id.size() > kLabelBytesMax) {
    return "job_id has " + std::to_string(join.job_id.size()) + " bytes; it needs 1 to " +
           std::to_string(kLabelBytesMax);
  }
  if (members.empty()) return "members is empty";
  for (std::size_t i = 1; i < members.size(); ++i) {
    if (members[i] <= members[i - 1]) return "members is " + join_ranks(members) + "; it must ascend, each rank once";
  }
  if (members.back() >= join.world_size) {
    return "members names rank " + std::to_string(members.back()) + "; world_size is " +
           std::to_string(join.world_size);
  }
  if (!std::binary_search(members.begin(), members.end(), join.rank)) {
    return "rank " + std::to_string(join.rank) + " is not among its own members " + join_ranks(members);
  }
  if (!(join.timeout_seconds >= 0 && join.timeout_seconds <= kTimeoutSecondsMax)) {
    return "timeout_seconds is " + number_text(join.timeout_seconds) + "; it must be 0 (the default) to 1e8";
  }
  return "";
}

}  // namespace

Status check(const DeleteAdapter& remove) {
  if (remove.adapter_id >= 1 && remove.adapter_id <= kAdapterIdMax) return ok_status();
  return senseless("adapter " + std::to_string(remove.adapter_id) + " was named in a control command",
                   "adapters are 1 to " + std::to_string(kAdapterIdMax) + "; 0 is the base model",
                   "use a number in that range");
}

Status check(const CreateAdapter& create) {
  KT_TRY_STATUS(check(DeleteAdapter{create.adapter_id}));
  const auto duplicate = std::adjacent_find(create.layers.begin(), create.layers.end());
  if (!create.layers.empty() && duplicate == create.layers.end()) return ok_status();
  return senseless(
      "adapter " + std::to_string(create.adapter_id) + " cannot be created",
      create.layers.empty() ? "no layers were named" : "layer " + std::to_string(*duplicate) + " was named twice",
      "name each layer that is to be adapted once");
}

Status check(const JoinJob& join) {
  std::string fault = join_fault(join);
  if (fault.empty()) return ok_status();
  return senseless("rank " + std::to_string(join.rank) + " cannot join job '" + join.job_id + "'", std::move(fault),
                   "send job_id, rank, world_size and members as the process group has them");
}

Result<HelloRequest> parse_hello(const json& body) {
  HelloRequest hello;
  constexpr std::uint64_t kU64Max = std::numeric_limits<std::uint64_t>::max();
  KT_TRY(hello.protocol, unsigned_field(body, "protocol", kU64Max));
  KT_TRY(hello.arena_bytes, unsigned_field(body, "arena_bytes", kU64Max));
  KT_TRY(hello.fingerprint, text_field(body, "fingerprint"));
  KT_TRY(hello.name, label_field(body, "name"));
  return hello;
}

Result<CreateAdapter> parse_adapter_create(const json& body) {
  CreateAdapter create;
  KT_TRY(create.adapter_id, u32_field(body, "adapter"));
  KT_TRY(create.layers, list_field(body, "layers"));
  std::sort(create.layers.begin(), create.layers.end());
  KT_TRY(create.spec.gate_up, half_field(body, "gate_up"));
  KT_TRY(create.spec.shared_a, flag_field(body["gate_up"], "shared_a"));
  KT_TRY(create.spec.down, half_field(body, "down"));
  return create;
}

Result<DeleteAdapter> parse_adapter_delete(const json& body) {
  KT_TRY(const std::uint32_t adapter_id, u32_field(body, "adapter"));
  return DeleteAdapter{adapter_id};
}

Result<JoinJob> parse_join(const json& body) {
  JoinJob join;
  KT_TRY(join.job_id, text_field(body, "job_id"));
  KT_TRY(join.name, label_field(body, "name"));
  KT_TRY(join.rank, u32_field(body, "rank"));
  KT_TRY(join.world_size, u32_field(body, "world_size"));
  KT_TRY(join.members, list_field(body, "members"));
  if (body.contains("timeout_seconds")) {
    KT_TRY(join.timeout_seconds, number_field(body, "timeout_seconds", 0, std::numeric_limits<double>::max()));
  }
  return join;
}

Result<bool> parse_stop(const json& body) { return flag_field(body, "drain"); }

}  // namespace kt::coproc
