// A Session's READs and WRITEs of adapter tensors, split along experts where they exceed the arena.
#include <algorithm>
#include <utility>

#include "client/session_state.h"

namespace kt::client {
namespace {

using shm::Request;
using shm::Verb;

// READ or WRITE of a tensor in chunks of experts: calls send(request, payload, first float, number of floats) for each.
template <class State, class Send>
Status each_tensor_chunk(State& state, Verb verb, std::uint32_t adapter_id, const TensorRef& ref, std::size_t count,
                         const Send& send) {
  KT_TRY_STATUS(state.check_usable());
  KT_TRY(const shm::TensorShape shape, state.tensor_shape(adapter_id, ref));
  const bool is_t = ref.kind == shm::TensorKind::kT;
  const std::uint64_t expert_floats = is_t ? 1 : static_cast<std::uint64_t>(shape.size());
  const std::uint64_t num_experts = is_t ? 1 : ref.num_experts;
  const std::uint64_t first_expert = is_t ? 0 : ref.first_expert;
  if (first_expert + num_experts > state.connection.model.num_experts || count != num_experts * expert_floats) {
    return invalid(std::string(shm::verb_name(verb)) + " of adapter " + std::to_string(adapter_id) + ", layer " +
                       std::to_string(ref.layer) + " does not fit the tensor",
                   std::to_string(count) + " values for " + std::to_string(num_experts) + " experts from " +
                       std::to_string(first_expert) + " of " + std::to_string(state.connection.model.num_experts) +
                       "; an expert has " + std::to_string(shape.rows) + " x " + std::to_string(shape.cols),
                   "pass float32[num_experts, rows, cols], or one float for the step count");
  }
  const std::uint64_t fitting = state.arena.block_bytes_max() / (expert_floats * 4);
  if (fitting == 0) {
    return invalid("one expert of adapter " + std::to_string(adapter_id) + ", layer " + std::to_string(ref.layer) +
                       " does not fit the arena",
                   "it has " + std::to_string(expert_floats * 4) + " bytes, the arena takes " +
                       std::to_string(state.arena.block_bytes_max()),
                   "connect with a larger arena");
  }
  for (std::uint64_t done = 0; done < num_experts;) {
    const std::uint64_t chunk = std::min(fitting, num_experts - done);
    Request request;
    request.verb = verb;
    request.adapter_id = adapter_id;
    request.kind = ref.kind;
    request.layer = static_cast<std::uint16_t>(ref.layer);
    request.tensor = ref.tensor;
    request.first_expert = static_cast<std::uint32_t>(first_expert + done);
    request.num_experts = static_cast<std::uint32_t>(chunk);
    const shm::TensorPayload payload(ref.kind, chunk, shape);
    KT_TRY_STATUS(send(request, payload, done * expert_floats));
    done += chunk;
  }
  return ok_status();
}

}  // namespace

Status Session::read(std::uint32_t adapter_id, const TensorRef& ref, std::span<float> values) {
  const auto send = [&](const Request& request, const shm::TensorPayload& payload, std::uint64_t first) -> Status {
    KT_TRY_STATUS(state_->run(request, ref.layer, payload.bytes, {}, CopyOut{payload.values, values.data() + first}));
    return ok_status();
  };
  return each_tensor_chunk(*state_, Verb::kRead, adapter_id, ref, values.size(), send);
}

Status Session::write(std::uint32_t adapter_id, const TensorRef& ref, std::span<const float> values) {
  const auto send = [&](const Request& request, const shm::TensorPayload& payload, std::uint64_t first) -> Status {
    KT_TRY_STATUS(state_->run(request, ref.layer, payload.bytes, {{payload.values, values.data() + first}}));
    return ok_status();
  };
  return each_tensor_chunk(*state_, Verb::kWrite, adapter_id, ref, values.size(), send);
}

}  // namespace kt::client
