#include "coproc/engine/validate.h"

#include <algorithm>
#include <cstring>

namespace kt::coproc {
namespace {

using shm::Verb;

std::string in_words(const char* field, std::uint64_t value, const std::string& rule) {
  return std::string(field) + " is " + std::to_string(value) + "; " + rule;
}

// Copies bytes that the client may change at any time. The barrier keeps the compiler from reading the source again
// when the copy is used.
void copy_shared(void* target, const std::byte* source, std::size_t bytes) {
  if (bytes != 0) std::memcpy(target, source, bytes);
  asm volatile("" ::: "memory");
}

std::uint8_t allowed_flags(Verb verb) {
  if (verb == Verb::kForward) return shm::kKeepY;
  if (verb == Verb::kBackward) return shm::kKeep | shm::kAccumulate;
  return 0;
}

Fault check_payload(const shm::Request& request, std::uint64_t bytes, std::uint64_t arena_bytes) {
  const std::uint64_t offset = request.payload_offset;
  if (offset % shm::kPayloadAlignment != 0) {
    return in_words("payload_offset", offset, "it must be a multiple of " + std::to_string(shm::kPayloadAlignment));
  }
  if (offset > arena_bytes || bytes > arena_bytes - offset) {
    return in_words("payload_offset", offset,
                    "a payload of " + std::to_string(bytes) + " bytes there does not lie in the arena of " +
                        std::to_string(arena_bytes) + " bytes");
  }
  return std::nullopt;
}

Fault check_layer(const shm::Request& request, const ExpertDims& dims) {
  if (dims.moe_index(request.layer) >= 0) return std::nullopt;
  return in_words("layer", request.layer,
                  "the model has routed experts in " + std::to_string(dims.moe_layers.size()) + " of its " +
                      std::to_string(dims.num_layers) + " layers, and not in that one");
}

Fault check_tensor_fields(const shm::Request& request, const ExpertDims& dims) {
  if (Fault fault = check_layer(request, dims)) return fault;
  if (request.kind > shm::TensorKind::kT) {
    return in_words("kind", static_cast<std::uint64_t>(request.kind), "the last kind is 4 (t)");
  }
  if (request.tensor > shm::AdapterTensor::kDownB) {
    return in_words("tensor", static_cast<std::uint64_t>(request.tensor), "the last tensor is 5 (down_b)");
  }
  if (request.kind == shm::TensorKind::kT) {
    if (request.first_expert == 0 && request.num_experts == 1) return std::nullopt;
    return "t is one number: first_expert must be 0 and num_experts 1, not " + std::to_string(request.first_expert) +
           " and " + std::to_string(request.num_experts);
  }
  const std::uint64_t end = std::uint64_t{request.first_expert} + request.num_experts;
  if (end <= dims.num_experts) return std::nullopt;
  return "experts " + std::to_string(request.first_expert) + " to " + std::to_string(end) + " (exclusive) of " +
         std::to_string(dims.num_experts) + " were asked for";
}

Fault check_activation_fields(const shm::Request& request) {
  if (request.verb == Verb::kForward) {
    if (request.act_id != 0 || (request.flags & shm::kKeepY) == 0) return std::nullopt;
    return "KEEP_Y is set but act_id is 0: there is nothing to keep y with";
  }
  if (request.act_id != 0) return std::nullopt;
  return "act_id is 0, which names no activation";
}

std::uint64_t payload_bytes(const shm::Request& request, const ExpertDims& dims) {
  const shm::PayloadShape shape = payload_shape(dims);
  switch (request.verb) {
    case Verb::kForward:
      return shm::ForwardPayload(shape, request.num_tokens).bytes;
    case Verb::kFetch:
      return shm::FetchPayload(shape, request.num_tokens).bytes;
    case Verb::kBackward:
      return shm::BackwardPayload(shape, request.num_tokens).bytes;
    case Verb::kNorm:
      return shm::NormPayload(dims.num_layers).bytes;
    case Verb::kStep:
      return shm::StepPayload(dims.num_layers).bytes;
    default:
      return 0;
  }
}

}  // namespace

shm::PayloadShape payload_shape(const ExpertDims& dims) {
  return shm::PayloadShape{dims.hidden_size, dims.top_k, dims.element_bytes};
}

Fault check_request(const shm::Request& request, const ExpertDims& dims, std::uint64_t arena_bytes) {
  if (request.verb == Verb::kNone || request.verb > Verb::kStep) {
    return in_words("verb", static_cast<std::uint64_t>(request.verb), "verbs are 1 to 10");
  }
  if ((request.flags & ~allowed_flags(request.verb)) != 0) {
    return in_words("flags", request.flags,
                    std::string(shm::verb_name(request.verb)) + " takes only the bits of " +
                        std::to_string(allowed_flags(request.verb)));
  }
  if (request.reserved != 0) return in_words("reserved", request.reserved, "it must be 0");
  if (request.stream_flag >= shm::kNumSlots) {
    return in_words("stream_flag", request.stream_flag, "flags are 0 to " + std::to_string(shm::kNumSlots - 1));
  }
  switch (request.verb) {
    case Verb::kForward:
      if (Fault fault = check_layer(request, dims)) return fault;
      [[fallthrough]];
    case Verb::kFetch:
    case Verb::kBackward:
    case Verb::kRelease:
      if (Fault fault = check_activation_fields(request)) return fault;
      break;
    case Verb::kRead:
    case Verb::kWrite:
      if (Fault fault = check_tensor_fields(request, dims)) return fault;
      break;
    default:
      break;
  }
  return check_payload(request, payload_bytes(request, dims), arena_bytes);
}

Fault check_tensor(const shm::Request& request, const shm::TensorShape& shape, std::uint64_t arena_bytes) {
  const shm::TensorPayload payload(request.kind, request.num_experts, shape);
  return check_payload(request, payload.bytes, arena_bytes);
}

Fault copy_ids(const shm::Segment& segment, const shm::Request& request, const ExpertDims& dims,
               std::vector<std::int32_t>& ids) {
  const shm::ForwardPayload payload(payload_shape(dims), request.num_tokens);
  ids.resize(std::size_t{request.num_tokens} * dims.top_k);
  copy_shared(ids.data(), segment.arena() + request.payload_offset + payload.ids.offset, payload.ids.bytes);
  const auto out_of_range = [&](std::int32_t id) {
    return id < 0 || static_cast<std::uint32_t>(id) > dims.num_experts;
  };
  const auto bad = std::find_if(ids.begin(), ids.end(), out_of_range);
  if (bad == ids.end()) return std::nullopt;
  const auto position = static_cast<std::size_t>(bad - ids.begin());
  return "the expert id of token " + std::to_string(position / dims.top_k) + ", slot " +
         std::to_string(position % dims.top_k) + " is " + std::to_string(*bad) + "; ids are 0 to " +
         std::to_string(dims.num_experts) + " (the last one contributes nothing)";
}

Fault copy_step(const shm::Segment& segment, const shm::Request& request, const ExpertDims& dims,
                shm::StepHeader& header, std::vector<std::uint8_t>& group_of) {
  const shm::StepPayload payload(dims.num_layers);
  const std::byte* const base = segment.arena() + request.payload_offset;
  copy_shared(&header, base + payload.header.offset, sizeof header);
  group_of.resize(payload.group_of.bytes);
  copy_shared(group_of.data(), base + payload.group_of.offset, payload.group_of.bytes);
  if (header.num_groups > shm::kNumGroupsMax) {
    return in_words("num_groups", header.num_groups, "at most " + std::to_string(shm::kNumGroupsMax) + " fit");
  }
  for (std::size_t i = 0; i < header.num_groups; ++i) {
    if (header.groups[i].decoupled <= 1) continue;
    return in_words("decoupled", header.groups[i].decoupled, "it is 0 or 1 (group " + std::to_string(i) + ")");
  }
  std::fill(std::begin(header.groups) + header.num_groups, std::end(header.groups), shm::StepGroup{});
  const auto unknown = [&](std::uint8_t group) { return group != shm::kFrozen && group >= header.num_groups; };
  const auto bad = std::find_if(group_of.begin(), group_of.end(), unknown);
  if (bad == group_of.end()) return std::nullopt;
  const auto position = static_cast<std::size_t>(bad - group_of.begin());
  return in_words("group_of", *bad,
                  "layer " + std::to_string(position / shm::kNumAdapterTensors) + ", tensor " +
                      std::to_string(position % shm::kNumAdapterTensors) + " names a group beyond the " +
                      std::to_string(header.num_groups) + " that were sent");
}

void copy_norm(const shm::Segment& segment, const shm::Request& request, const ExpertDims& dims,
               std::vector<std::uint8_t>& group_of) {
  const shm::NormPayload payload(dims.num_layers);
  group_of.resize(payload.group_of.bytes);
  copy_shared(group_of.data(), segment.arena() + request.payload_offset + payload.group_of.offset,
              payload.group_of.bytes);
}

}  // namespace kt::coproc
