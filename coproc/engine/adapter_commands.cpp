#include "coproc/engine/adapter_commands.h"

#include "coproc/engine/agreement.h"
#include "coproc/engine/messages.h"

namespace kt::coproc {

const AdapterCommand* AdapterCommands::waiting(const Session& session) const {
  const auto found = waiting_.find(session.id);
  return found == waiting_.end() ? nullptr : &found->second.command;
}

std::uint64_t AdapterCommands::since_ns(const Session& session) const {
  const auto found = waiting_.find(session.id);
  return found == waiting_.end() ? UINT64_MAX : found->second.asked_ns;
}

bool AdapterCommands::answer(const Session& session, const Status& status) {
  const auto found = waiting_.find(session.id);
  if (found == waiting_.end()) return false;
  OnDone answer = std::move(found->second.answer);
  waiting_.erase(found);
  answer(status);
  return true;
}

bool AdapterCommands::refuse(const Session& session, const Error& error) { return answer(session, error); }

void AdapterCommands::ask(Session& session, AdapterCommand command, OnDone answer, std::uint64_t now_ns) {
  session.note_command(command_name(command), now_ns);
  waiting_.emplace(session.id, Waiting{std::move(command), std::move(answer), now_ns});
  if (session.job->departure) {
    refuse(session, session.job->departure->error);
  } else if (session.job->members.size() == 1) {
    run(*session.job);
  }
}

void AdapterCommands::run(Job& job) {
  const std::vector<Session*> sessions = job.sessions();
  std::vector<RankedCommand> commands;
  commands.reserve(sessions.size());
  for (const Session* session : sessions) commands.push_back({session->rank, waiting(*session)});
  Status status = ok_status();
  if (const auto disagreement = command_disagreement(commands)) {
    status = Error{ErrorCode::kDisagreement,
                   "the ranks of job '" + job.id + "' disagree in " + command_name(*commands.front().command) +
                       " about " + disagreement->field,
                   disagreement->why + "; nothing was applied", "create and delete the same adapters on every rank"};
  } else {
    status = apply(job, *commands.front().command);
  }
  for (const Session* session : sessions) answer(*session, status);
}

Status AdapterCommands::apply(Job& job, const AdapterCommand& command) const {
  if (const auto* create = std::get_if<CreateAdapter>(&command)) {
    if (Adapter* const existing = job.find_adapter(create->adapter_id)) {
      return existing->add_layers(create->layers, create->spec);
    }
    auto made = std::make_unique<Adapter>(dims_, table_);
    KT_TRY_STATUS(made->add_layers(create->layers, create->spec));
    job.adapters.emplace(create->adapter_id, std::move(made));
    return ok_status();
  }
  const std::uint32_t adapter_id = std::get<DeleteAdapter>(command).adapter_id;
  if (job.adapters.erase(adapter_id) == 0) {
    return Error{ErrorCode::kNotFound, "job '" + job.id + "' has no adapter " + std::to_string(adapter_id),
                 "it was never created, or is deleted already", "delete an adapter once"};
  }
  // Its activations go with it: their backward has nothing to run through.
  for (Session* session : job.sessions()) session->activations.release_adapter(adapter_id);
  return ok_status();
}

}  // namespace kt::coproc
