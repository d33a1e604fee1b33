#include "client/session.h"

#include <unistd.h>

#include <chrono>
#include <utility>

#include "client/session_state.h"
#include "shm/control.h"

namespace kt::client {
namespace {

using nlohmann::json;

// How long an exiting process waits for the daemon to have let go of its session.
constexpr std::chrono::seconds kByeTimeout{5};

}  // namespace

Session::Session(std::unique_ptr<State> state) : state_(std::move(state)) {}

Result<std::unique_ptr<Session>> Session::connect(const ConnectOptions& options) {
  KT_TRY(Connection connection, open_connection(options));
  auto state = std::make_unique<State>(std::move(connection));
  if (state->chunk_tokens_max == 0) {
    return Error{ErrorCode::kInvalidArgument, "the arena is too small for this model",
                 "one token of hidden size " + std::to_string(state->connection.model.hidden_size) + " needs " +
                     std::to_string(shm::ForwardPayload(state->payload_shape(), 1).bytes) + " bytes, " +
                     std::to_string(state->arena.block_bytes_max()) + " fit",
                 "ask for a larger arena"};
  }
  return std::unique_ptr<Session>(new Session(std::move(state)));
}

Session::~Session() {
  if (::getpid() != state_->owner_pid) {
    // A forked child has no watchdog thread to join and must not end its parent's session: leave everything be.
    static_cast<void>(state_.release());
    return;
  }
  state_->watchdog.reset();
  if (state_->liveness.end() != End::kNone) return;
  // The answer tells that the session is gone; when it does not come, closing the socket says the same.
  const auto ignored = shm::call(state_->connection.socket.get(), json{{"op", "bye"}}, kByeTimeout);
  static_cast<void>(ignored);
}

const ModelInfo& Session::model() const { return state_->connection.model; }

Status Session::create_adapter(std::uint32_t adapter_id, const AdapterSpec& spec) {
  const json request = {
      {"op", "adapter_create"},
      {"adapter", adapter_id},
      {"layers", spec.layers},
      {"gate_up", {{"r", spec.gate_up.r}, {"scaling", spec.gate_up.scaling}, {"shared_a", spec.shared_a}}},
      {"down", {{"r", spec.down.r}, {"scaling", spec.down.scaling}}}};
  KT_TRY_STATUS(state_->control(request));
  const std::lock_guard lock(state_->specs_mutex);
  for (const std::uint32_t layer : spec.layers) state_->specs[{adapter_id, layer}] = spec;
  return ok_status();
}

Status Session::delete_adapter(std::uint32_t adapter_id) {
  KT_TRY_STATUS(state_->control({{"op", "adapter_delete"}, {"adapter", adapter_id}}));
  const std::lock_guard lock(state_->specs_mutex);
  std::erase_if(state_->specs, [adapter_id](const auto& entry) { return entry.first.first == adapter_id; });
  return ok_status();
}

Result<std::uint64_t> Session::join(const JoinSpec& spec) {
  const json request = {{"op", "join"},
                        {"job_id", spec.job_id},
                        {"name", spec.name},
                        {"rank", spec.rank},
                        {"world_size", spec.world_size},
                        {"members", spec.members},
                        {"timeout_seconds", spec.timeout_seconds}};
  KT_TRY(const json answer, state_->control(request));
  const auto step = answer.find("step");
  if (step == answer.end() || !step->is_number_unsigned()) {
    return Error{ErrorCode::kVersionMismatch, "the daemon's answer to join is not understood", "it has no step",
                 "run client and daemon of the same kt-coproc release"};
  }
  state_->steps.store(step->get<std::uint64_t>());
  return step->get<std::uint64_t>();
}

std::uint64_t Session::steps() const { return state_->steps.load(); }

json Session::stats() const { return shm::status_json(state_->connection.status.page()); }

bool Session::daemon_alive() const {
  const End end = state_->liveness.end();
  if (end == End::kDied || end == End::kShutDown) return false;
  return !process_ended(state_->connection.pidfd.get(), 0);
}

}  // namespace kt::client
