#include "coproc/engine/messages.h"

#include <unistd.h>

#include "coproc/engine/text.h"

namespace kt::coproc {

using shm::Verb;

const char* adapter_tensor_name(shm::AdapterTensor tensor) {
  switch (tensor) {
    case shm::AdapterTensor::kGateA:
      return "gate_a";
    case shm::AdapterTensor::kGateB:
      return "gate_b";
    case shm::AdapterTensor::kUpA:
      return "up_a";
    case shm::AdapterTensor::kUpB:
      return "up_b";
    case shm::AdapterTensor::kDownA:
      return "down_a";
    case shm::AdapterTensor::kDownB:
      return "down_b";
  }
  return "unknown tensor";
}

const char* command_name(const AdapterCommand& command) {
  return std::holds_alternative<CreateAdapter>(command) ? "adapter_create" : "adapter_delete";
}

std::string describe(const Session& session) {
  return "rank " + std::to_string(session.rank) + " (pid " + std::to_string(session.pid) + ") of job '" +
         session.job->id + "'";
}

std::string describe(const Session& session, const shm::Request& request) {
  std::string text = shm::verb_name(request.verb);
  std::uint32_t layer = request.layer;
  std::uint32_t adapter_id = request.adapter_id;
  const bool by_activation =
      request.verb == Verb::kFetch || request.verb == Verb::kBackward || request.verb == Verb::kRelease;
  if (by_activation) {
    text += " of activation " + std::to_string(request.act_id);
    if (const SavedActivation* activation = session.activations.find(request.act_id)) {
      layer = activation->layer;
      adapter_id = activation->adapter_id;
    }
  }
  if (!shm::is_collective(request.verb))
    text += std::string(by_activation ? "," : " of") + " layer " + std::to_string(layer);
  return text + " with adapter " + std::to_string(adapter_id) + " in step " + std::to_string(session.job->step);
}

std::string describe(const LastRequest& last, std::uint64_t now_ns) {
  std::string text = last.name;
  if (last.has_layer) text += " of layer " + std::to_string(last.layer);
  text += " in step " + std::to_string(last.step);
  return text + ", " + seconds_text(now_ns > last.at_ns ? now_ns - last.at_ns : 0) + " ago";
}

Error protocol_error(const Session& session, const shm::Request& request, std::string why) {
  return Error{ErrorCode::kInvalidArgument,
               describe(session) + " sent a malformed request and lost its session: " + describe(session, request),
               std::move(why),
               "use the client library of the daemon's release; if you do, please report this message as a bug"};
}

Error unknown_adapter(const Session& session, const shm::Request& request) {
  std::vector<std::uint32_t> known;
  for (const auto& [adapter_id, adapter] : session.job->adapters) known.push_back(adapter_id);
  return Error{ErrorCode::kNotFound,
               describe(session) + ": " + describe(session, request) + " names an unknown adapter",
               "the job has " + (known.empty() ? std::string("no adapters") : "the adapters " + join_ranks(known)),
               "create the adapter first (adapter_create); adapter 0 is the base model and has no LoRA tensors"};
}

Error unknown_activation(const Session& session, const shm::Request& request) {
  return Error{ErrorCode::kNotFound,
               describe(session) + ": " + describe(session, request) + " names no live activation",
               "it was never kept, a BACKWARD without KEEP used it up, it was released, or its adapter was deleted; " +
                   std::to_string(session.activations.size()) + " activations of this rank are live",
               "call backward once per forward, or pass retain_graph=True to all but the last backward"};
}

Error stale_activation(const Session& session, const shm::Request& request, const SavedActivation& activation) {
  return Error{ErrorCode::kStale,
               describe(session) + ": " + describe(session, request) + " uses a forward of another step",
               "the forward of layer " + std::to_string(activation.layer) + " ran in step " +
                   std::to_string(activation.step) + ", the job is at step " + std::to_string(session.job->step) +
                   ": adapter " + std::to_string(activation.adapter_id) + " was modified in between",
               "run forward and backward before optimizer.step()"};
}

Error rank_gone(const Session& session, SessionEnd why, const Error& reason, std::uint64_t now_ns) {
  const std::string last = "its last request was " + describe(session.last, now_ns);
  const std::string step = std::to_string(session.job->step);
  if (why == SessionEnd::kBye) {
    return Error{ErrorCode::kRankDied, describe(session) + " has left: no collective of this job can complete any more",
                 "it said bye at step " + step + "; " + last,
                 "let every rank finish training before the first one exits"};
  }
  const bool broke = why == SessionEnd::kProtocolError;
  return Error{ErrorCode::kRankDied,
               describe(session) + (broke ? " broke the protocol" : " died") + ": the job has failed",
               (broke ? reason.why + "; " : "") + last,
               "restart the training job from its last checkpoint; READ still shows the adapters as of step " + step};
}

Error shutting_down_error() {
  return Error{ErrorCode::kCoprocDied, "kt-coproc (pid " + std::to_string(::getpid()) + ") is shutting down",
               "it was told to stop; requests it had received before are complete",
               "start it again (kt-coproc run --model DIR) and resume from the last checkpoint"};
}

}  // namespace kt::coproc
