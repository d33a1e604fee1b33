#include "coproc/engine/heads.h"

#include "coproc/engine/activations.h"
#include "coproc/engine/at_once.h"
#include "coproc/engine/messages.h"
#include "coproc/engine/validate.h"
#include "shm/doorbell.h"

namespace kt::coproc {

using shm::Verb;

bool Heads::advance(Session& session) {
  bool did = false;
  bool copied = false;
  while (!session.queue.empty()) {
    Pending& head = session.queue.front();
    const Verb verb = head.request.verb;
    accounting_.show_state(session.account, verb);
    if (session.job->failure && verb != Verb::kRead && verb != Verb::kRelease) {
      session.refuse_head(accounting_, *session.job->failure);
      did = true;
      continue;
    }
    if (runs_at_once(verb)) {
      // One copy per round and session: the others' turns come between.
      if (copied) return true;
      copied = verb != Verb::kRelease;
      did = true;
      if (!settle(session, run_at_once(session, head.request, dims_))) return true;
      continue;
    }
    Status status = head.head_ns == 0 ? prepare(session, head) : ok_status();
    if (status.ok()) status = check(session);
    if (status.ok() && session.job->departure && is_collective(session)) {
      session.refuse_head(accounting_, *session.job->departure);
      did = true;
      continue;
    }
    if (status.ok()) return did;
    did = true;
    if (!settle(session, status)) return true;
  }
  accounting_.show_state(session.account, Verb::kNone);
  return did;
}

// Answers the head with the status. An error of code kInvalidArgument is a protocol error: false, the session is gone.
bool Heads::settle(Session& session, const Status& status) {
  if (!status.ok() && status.error().code == ErrorCode::kInvalidArgument) {
    registry_.break_session(session, status.error());
    return false;
  }
  session.answer_head(accounting_, shm::Reply{}, status.ok() ? nullptr : &status.error());
  return true;
}

Status Heads::prepare(Session& session, Pending& head) const {
  head.head_ns = shm::now_ns();
  const shm::Request& request = head.request;
  if (request.stream_flag != 0) {
    return Error{ErrorCode::kUnsupported, describe(session) + ": " + describe(session, request) + " uses a stream flag",
                 "stream_flag is " + std::to_string(request.stream_flag) + "; this daemon has no GPU ordering",
                 "synchronise the stream before the request and send stream_flag 0"};
  }
  Fault fault;
  if (request.verb == Verb::kForward) {
    fault = copy_ids(session.segment, request, dims_, head.ids);
  } else if (request.verb == Verb::kNorm) {
    copy_norm(session.segment, request, dims_, head.group_of);
  } else if (request.verb == Verb::kStep) {
    head.header = std::make_unique<shm::StepHeader>();
    fault = copy_step(session.segment, request, dims_, *head.header, head.group_of);
  }
  if (fault) return protocol_error(session, request, *std::move(fault));
  return ok_status();
}

Status Heads::check(const Session& session) {
  const shm::Request& request = session.queue.front().request;
  if (request.verb == Verb::kForward) {
    if (request.adapter_id != 0 && session.job->find_adapter(request.adapter_id) == nullptr) {
      return unknown_adapter(session, request);
    }
    if (request.act_id != 0 && session.activations.find(request.act_id) != nullptr) {
      return protocol_error(session, request, "act_id is " + std::to_string(request.act_id) + ", which is live");
    }
  } else if (request.verb == Verb::kBackward) {
    KT_TRY(const SavedActivation* const activation, find_activation(session, request));
    if (activation->adapter_id != 0 && activation->step != session.job->step) {
      return stale_activation(session, request, *activation);
    }
  }
  return ok_status();
}

BatchKey Heads::key(const Session& session) {
  if (session.queue.empty() || session.queue.front().head_ns == 0) return {};
  const shm::Request& request = session.queue.front().request;
  if (request.verb == Verb::kForward) return {request.verb, request.layer, request.adapter_id, false};
  if (request.verb != Verb::kBackward) return {};
  const SavedActivation* const activation = session.activations.find(request.act_id);
  if (activation == nullptr) return {};
  const bool accumulate = (request.flags & shm::kAccumulate) != 0 && activation->adapter_id != 0;
  return {request.verb, activation->layer, activation->adapter_id, accumulate};
}

// In deterministic mode the backwards that add to a shared S are collectives too: they run in rank order.
bool Heads::is_collective(const Session& session) const {
  if (session.queue.empty()) return false;
  if (shm::is_collective(session.queue.front().request.verb)) return true;
  if (!deterministic_ || session.job->members.size() == 1) return false;
  return key(session).accumulate;
}

}  // namespace kt::coproc
