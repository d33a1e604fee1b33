// Requests that involve nobody else and run at once when they reach the head of their queue: FETCH, RELEASE, READ,
// WRITE.
#include <cstring>

#include "coproc/engine/core.h"
#include "coproc/engine/messages.h"

namespace kt::coproc {

using shm::Verb;

Status Core::run_alone(Session& session, const Pending& head) {
  switch (head.request.verb) {
    case Verb::kFetch:
      return fetch(session, head.request);
    case Verb::kRelease:
      // Idempotent: a graph may be dropped after its backward, or after the job failed.
      release(session, head.request.act_id);
      return ok_status();
    default:
      return read_or_write(session, head.request);
  }
}

Status Core::fetch(Session& session, const shm::Request& request) {
  const auto found = session.activations.find(request.act_id);
  if (found == session.activations.end()) return unknown_activation(session, request);
  const Activation& activation = found->second;
  if (request.num_tokens != activation.num_tokens) {
    return protocol_error(session, request,
                          "num_tokens is " + std::to_string(request.num_tokens) + "; the forward had " +
                              std::to_string(activation.num_tokens));
  }
  const shm::FetchPayload payload(payload_shape(dims_), request.num_tokens);
  if (activation.y.size() != payload.y.bytes) {
    return Error{ErrorCode::kNotFound, describe(session) + ": " + describe(session, request) + " has no output to give",
                 "its FORWARD ran without KEEP_Y, so only what backward needs was kept",
                 "send KEEP_Y with the first FORWARD of a checkpointed function"};
  }
  std::byte* const y = session.segment.arena() + request.payload_offset + payload.y.offset;
  if (payload.y.bytes != 0) std::memcpy(y, activation.y.data(), payload.y.bytes);
  return ok_status();
}

Status Core::read_or_write(Session& session, const shm::Request& request) {
  Adapter* const adapter = session.job->find_adapter(request.adapter_id);
  if (adapter == nullptr) return unknown_adapter(session, request);
  const auto shape = adapter->shape(request.layer, request.tensor);
  if (!shape) {
    return Error{ErrorCode::kNotFound,
                 describe(session) + ": " + describe(session, request) + " names a tensor that does not exist",
                 std::string(adapter_tensor_name(request.tensor)) + " is not part of adapter " +
                     std::to_string(request.adapter_id) + " in layer " + std::to_string(request.layer),
                 "ask for the tensors that adapter_create made: up_a exists only without shared_a"};
  }
  if (Fault fault = check_tensor(request, *shape, session.segment.arena_bytes())) {
    return protocol_error(session, request, *std::move(fault));
  }
  auto* const values = reinterpret_cast<float*>(session.segment.arena() + request.payload_offset);
  if (request.verb == Verb::kRead) {
    adapter->read(request.kind, request.layer, request.tensor, request.first_expert, request.num_experts, values);
  } else {
    adapter->write(request.kind, request.layer, request.tensor, request.first_expert, request.num_experts, values);
    memory_changed_ = true;  // The first write of exp_avg allocates it.
  }
  return ok_status();
}

void Core::release(Session& session, std::uint64_t act_id) {
  const auto found = session.activations.find(act_id);
  if (found == session.activations.end()) return;
  session.job->activation_bytes -= found->second.bytes();
  session.activations.erase(found);
  memory_changed_ = true;
}

void Core::drop_activations(Session& session) {
  while (!session.activations.empty()) release(session, session.activations.begin()->first);
}

}  // namespace kt::coproc
