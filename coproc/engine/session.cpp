#include "coproc/engine/session.h"

#include <utility>

#include "coproc/engine/job.h"
#include "shm/doorbell.h"

namespace kt::coproc {

using shm::now_ns;
using shm::Verb;

void Session::answer_head(Accounting& accounting, const shm::Reply& reply, const Error* error) {
  const Pending head = std::move(queue.front());
  queue.pop_front();
  ring.reply(head.sequence, reply, error);
  accounting.answered(account, head.request.verb, head.request.num_tokens, error == nullptr, head.received_ns,
                      now_ns());
}

void Session::refuse_head(Accounting& accounting, const JobFailure& failure) {
  shm::Reply reply;
  reply.rank = failure.rank;
  reply.layer = failure.layer;
  reply.step = failure.step;
  answer_head(accounting, reply, &failure.error);
}

void Session::refuse_all(Accounting& accounting, const Error& reason) {
  const std::uint64_t now = now_ns();
  for (const Pending& pending : queue) {
    ring.reply(pending.sequence, shm::Reply{}, &reason);
    accounting.answered(account, pending.request.verb, 0, false, pending.received_ns, now);
  }
  queue.clear();
}

void Session::note_request(const shm::Request& request, std::uint64_t now_ns) {
  if (request.verb == Verb::kRelease) return;
  last.name = shm::verb_name(request.verb);
  last.has_layer = !shm::is_collective(request.verb);
  if (last.has_layer) last.layer = request.layer;
  if (request.verb == Verb::kBackward || request.verb == Verb::kFetch) {
    if (const SavedActivation* activation = activations.find(request.act_id)) last.layer = activation->layer;
  }
  last.step = job->step;
  last.at_ns = now_ns;
}

void Session::note_command(const char* command, std::uint64_t now_ns) {
  last.name = command;
  last.has_layer = false;
  last.step = job->step;
  last.at_ns = now_ns;
}

}  // namespace kt::coproc
