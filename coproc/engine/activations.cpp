#include "coproc/engine/activations.h"

#include <new>

#include "coproc/engine/activation_budget.h"
#include "coproc/engine/messages.h"
#include "coproc/engine/validate.h"

namespace kt::coproc {

Result<const SavedActivation*> find_activation(const Session& session, const shm::Request& request) {
  const SavedActivation* const activation = session.activations.find(request.act_id);
  if (activation == nullptr) return unknown_activation(session, request);
  if (request.num_tokens != activation->num_tokens) {
    return protocol_error(session, request,
                          "num_tokens is " + std::to_string(request.num_tokens) + "; the forward had " +
                              std::to_string(activation->num_tokens));
  }
  return activation;
}

Result<SavedActivation*> Activations::keep(Session& session, Pending& head) const {
  const shm::Request& request = head.request;
  const bool keep_y = (request.flags & shm::kKeepY) != 0;
  ActivationBudget budget;
  budget.bytes_max = bytes_max_;
  budget.num_jobs = registry_.jobs().size();
  budget.job_bytes = activation_bytes(*session.job);
  for (const auto& [id, any] : registry_.sessions()) budget.all_bytes += any->activations.bytes();
  const std::uint64_t input_bytes = activation_input_bytes(dims_, request.num_tokens, keep_y);
  const std::uint64_t gate_up_bytes = activation_gate_up_bytes(dims_, request.num_tokens);
  const Keep keep = budget.decide(input_bytes, gate_up_bytes);
  const auto refused = [&](const std::string& why) {
    return Error{ErrorCode::kActivationLimit,
                 describe(session) + ": " + describe(session, request) + " cannot keep its activation", why,
                 "use smaller micro-batches or activation checkpointing, or give the daemon a larger "
                 "activation_bytes_max"};
  };
  if (keep == Keep::kRefused) {
    return refused("its " + std::to_string(request.num_tokens) + " tokens need " + std::to_string(input_bytes) +
                   " bytes even without G and U; the job holds " + std::to_string(budget.job_bytes) + " of the " +
                   std::to_string(budget.share_bytes()) + " bytes that are its share (activation_bytes_max " +
                   std::to_string(budget.bytes_max) + ", " + std::to_string(budget.num_jobs) + " jobs)");
  }
  const shm::ForwardPayload payload(payload_shape(dims_), request.num_tokens);
  const std::byte* const base = session.segment.arena() + request.payload_offset;
  SavedActivation activation;
  activation.layer = request.layer;
  activation.adapter_id = request.adapter_id;
  activation.step = session.job->step;
  activation.num_tokens = request.num_tokens;
  try {
    activation.x.assign(base + payload.x.offset, base + payload.x.offset + payload.x.bytes);
    const auto* const weights = reinterpret_cast<const float*>(base + payload.weights.offset);
    activation.weights.assign(weights, weights + head.ids.size());
    if (keep == Keep::kAll) activation.gate_up.resize(gate_up_bytes);
    if (keep_y) activation.y.resize(payload.y.bytes);
  } catch (const std::bad_alloc&) {
    return refused("the system has no memory for " + std::to_string(input_bytes + gate_up_bytes) + " bytes");
  }
  activation.ids = std::move(head.ids);
  return &session.activations.add(request.act_id, std::move(activation));
}

}  // namespace kt::coproc
