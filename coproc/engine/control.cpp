// Control commands about adapters. For a job of one they run at once; in a joined job they are collectives of it, which
// fail without failing the job: nothing is applied, and every member gets the same error.
#include "shm/control.h"

#include <algorithm>

#include "coproc/engine/core.h"
#include "coproc/engine/messages.h"
#include "shm/doorbell.h"

namespace kt::coproc {
namespace {

constexpr std::uint32_t kAdapterIdMax = 65535;

std::optional<Error> check_adapter_id(std::uint32_t adapter_id) {
  if (adapter_id >= 1 && adapter_id <= kAdapterIdMax) return std::nullopt;
  return invalid_control("adapter " + std::to_string(adapter_id) + " was named in a control command",
                         "adapters are 1 to " + std::to_string(kAdapterIdMax) + "; 0 is the base model",
                         "use a number in that range");
}

}  // namespace

Session* Core::session_for(std::uint32_t session_id, const Answer& answer) {
  const auto found = sessions_.find(session_id);
  if (found == sessions_.end()) return nullptr;  // It ended meanwhile: nobody waits for the answer.
  Session& session = *found->second;
  if (shutting_down_) {
    answer(shm::error_reply(shutting_down()));
    return nullptr;
  }
  if (session.job->failure) {
    answer(shm::error_reply(session.job->failure->error));
    return nullptr;
  }
  if (session.control) {
    answer(shm::error_reply(invalid_control(
        describe(session) + " sent two control commands at once",
        std::string(command_name(*session.control)) + " still waits for other ranks", "wait for the first answer")));
    return nullptr;
  }
  return &session;
}

void Core::create_adapter(std::uint32_t session_id, CreateAdapter create, Answer answer) {
  Session* const session = session_for(session_id, answer);
  if (session == nullptr) return;
  std::sort(create.layers.begin(), create.layers.end());
  auto error = check_adapter_id(create.adapter_id);
  const auto duplicate = std::adjacent_find(create.layers.begin(), create.layers.end());
  if (!error && (create.layers.empty() || duplicate != create.layers.end())) {
    error = invalid_control(
        "adapter " + std::to_string(create.adapter_id) + " cannot be created",
        create.layers.empty() ? "no layers were named" : "layer " + std::to_string(*duplicate) + " was named twice",
        "name each layer that is to be adapted once");
  }
  if (error) {
    answer(shm::error_reply(*error));
    return;
  }
  ask(*session, ControlRequest{std::move(create), std::move(answer), shm::now_ns()});
}

void Core::delete_adapter(std::uint32_t session_id, std::uint32_t adapter_id, Answer answer) {
  Session* const session = session_for(session_id, answer);
  if (session == nullptr) return;
  if (const auto error = check_adapter_id(adapter_id)) {
    answer(shm::error_reply(*error));
    return;
  }
  ask(*session, ControlRequest{DeleteAdapter{adapter_id}, std::move(answer), shm::now_ns()});
}

// The command is sound by itself: runs it, or leaves it waiting for the other members.
void Core::ask(Session& session, ControlRequest request) {
  session.last.name = command_name(request);
  session.last.has_layer = false;
  session.last.step = session.job->step;
  session.last.at_ns = request.asked_ns;
  session.control = std::move(request);
  if (std::holds_alternative<JoinJob>(session.control->what)) return;
  if (session.job->departure) {
    answer_control(session, shm::error_reply(session.job->departure->error));
  } else if (session.job->members.size() == 1) {
    run_control_collective(*session.job);
  }
}

void Core::run_control_collective(Job& job) {
  const std::vector<Session*> sessions = job.sessions();
  std::vector<RankedCommand> commands;
  commands.reserve(sessions.size());
  for (const Session* session : sessions) commands.push_back({session->rank, &*session->control});
  Status status = ok_status();
  if (const auto disagreement = control_disagreement(commands)) {
    status = Error{ErrorCode::kDisagreement,
                   "the ranks of job '" + job.id + "' disagree in " + command_name(*commands.front().command) +
                       " about " + disagreement->field,
                   disagreement->why + "; nothing was applied", "create and delete the same adapters on every rank"};
  } else {
    status = apply_control(job, *commands.front().command);
  }
  const nlohmann::json body = status.ok() ? nlohmann::json{{"ok", true}} : shm::error_reply(status.error());
  for (Session* session : sessions) answer_control(*session, body);
}

Status Core::apply_control(Job& job, const ControlRequest& request) {
  memory_changed_ = true;
  if (const auto* create = std::get_if<CreateAdapter>(&request.what)) return create_layers(job, *create);
  return remove_adapter(job, std::get<DeleteAdapter>(request.what).adapter_id);
}

Status Core::create_layers(Job& job, const CreateAdapter& create) {
  if (Adapter* const existing = job.find_adapter(create.adapter_id))
    return existing->add_layers(create.layers, create.spec);
  auto made = std::make_unique<Adapter>(dims_, table_);
  KT_TRY_STATUS(made->add_layers(create.layers, create.spec));
  job.adapters.emplace(create.adapter_id, std::move(made));
  return ok_status();
}

// Activations of a deleted adapter go with it: their backward has nothing to run through (kNotFound).
Status Core::remove_adapter(Job& job, std::uint32_t adapter_id) {
  if (job.adapters.erase(adapter_id) == 0) {
    return Error{ErrorCode::kNotFound, "job '" + job.id + "' has no adapter " + std::to_string(adapter_id),
                 "it was never created, or is deleted already", "delete an adapter once"};
  }
  for (Session* session : job.sessions()) {
    std::vector<std::uint64_t> act_ids;
    for (const auto& [act_id, activation] : session->activations) {
      if (activation.adapter_id == adapter_id) act_ids.push_back(act_id);
    }
    for (const std::uint64_t act_id : act_ids) release(*session, act_id);
  }
  return ok_status();
}

void Core::answer_control(Session& session, const nlohmann::json& body) {
  const Answer answer = std::move(session.control->answer);
  session.control.reset();
  answer(body);
}

}  // namespace kt::coproc
