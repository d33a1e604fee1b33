#include "coproc/engine/at_once.h"

#include <cstring>

#include "coproc/engine/activations.h"
#include "coproc/engine/messages.h"
#include "coproc/engine/validate.h"

namespace kt::coproc {

using shm::Verb;

namespace {

Status fetch(Session& session, const shm::Request& request, const ExpertDims& dims) {
  KT_TRY(const SavedActivation* const activation, find_activation(session, request));
  const shm::FetchPayload payload(payload_shape(dims), request.num_tokens);
  if (activation->y.size() != payload.y.bytes) {
    return Error{ErrorCode::kNotFound, describe(session) + ": " + describe(session, request) + " has no output to give",
                 "its FORWARD ran without KEEP_Y, so only what backward needs was kept",
                 "send KEEP_Y with the first FORWARD of a checkpointed function"};
  }
  std::byte* const y = session.segment.arena() + request.payload_offset + payload.y.offset;
  if (payload.y.bytes != 0) std::memcpy(y, activation->y.data(), payload.y.bytes);
  return ok_status();
}

Status read_or_write(Session& session, const shm::Request& request) {
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
  }
  return ok_status();
}

}  // namespace

bool runs_at_once(Verb verb) {
  return verb == Verb::kFetch || verb == Verb::kRead || verb == Verb::kWrite || verb == Verb::kRelease;
}

Status run_at_once(Session& session, const shm::Request& request, const ExpertDims& dims) {
  if (request.verb == Verb::kFetch) return fetch(session, request, dims);
  if (request.verb != Verb::kRelease) return read_or_write(session, request);
  // Idempotent: a graph may be dropped after its backward, or after the job failed.
  session.activations.release(request.act_id);
  return ok_status();
}

}  // namespace kt::coproc
