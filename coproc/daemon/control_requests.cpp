#include "coproc/daemon/control_requests.h"

#include <algorithm>
#include <limits>

#include "shm/status_page.h"
#include "shm/text.h"

namespace kt::coproc {
namespace {

using nlohmann::json;

constexpr std::size_t kLabelBytesMax = sizeof shm::JobRow::name - 1;
constexpr std::uint64_t kU32Max = std::numeric_limits<std::uint32_t>::max();
constexpr double kTimeoutSecondsMax = 1e9;  // 30 years; a larger number would not fit nanoseconds.

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

Result<HalfSpec> half_field(const json& body, const char* key) {
  const auto found = body.find(key);
  if (found == body.end() || !found->is_object()) return malformed(key, "an object with r and scaling");
  HalfSpec half;
  KT_TRY(half.r, u32_field(*found, "r"));
  if (half.r == 0 && !found->contains("scaling")) return half;
  constexpr double kScalingMax = std::numeric_limits<float>::max();
  KT_TRY(half.scaling, number_field(*found, "scaling", -kScalingMax, kScalingMax));
  return half;
}

}  // namespace

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
  KT_TRY(create.spec.gate_up, half_field(body, "gate_up"));
  KT_TRY(create.spec.shared_a, flag_field(body["gate_up"], "shared_a"));
  KT_TRY(create.spec.down, half_field(body, "down"));
  return create;
}

Result<std::uint32_t> parse_adapter_delete(const json& body) { return u32_field(body, "adapter"); }

Result<JoinJob> parse_join(const json& body) {
  JoinJob join;
  KT_TRY(join.job_id, text_field(body, "job_id"));
  KT_TRY(join.name, label_field(body, "name"));
  KT_TRY(join.rank, u32_field(body, "rank"));
  KT_TRY(join.world_size, u32_field(body, "world_size"));
  KT_TRY(join.members, list_field(body, "members"));
  if (body.contains("timeout_seconds")) {
    KT_TRY(join.timeout_seconds, number_field(body, "timeout_seconds", 0, kTimeoutSecondsMax));
  }
  return join;
}

Result<bool> parse_stop(const json& body) { return flag_field(body, "drain"); }

}  // namespace kt::coproc
