// Collectives of a job (O3): run once when they are the next request of every member, or fail for all of them.
#include <algorithm>

#include "coproc/engine/core.h"
#include "coproc/engine/messages.h"
#include "shm/doorbell.h"

namespace kt::coproc {

using shm::Verb;

std::uint64_t Core::ring_wait_ns(const Session& session) const {
  if (session.queue.empty()) return UINT64_MAX;
  const Pending& head = session.queue.front();
  return head.head_ns != 0 && is_collective(session, head) ? head.head_ns : UINT64_MAX;
}

std::uint64_t Core::control_wait_ns(const Session& session) const {
  if (!session.control || std::holds_alternative<JoinJob>(session.control->what)) return UINT64_MAX;
  return session.control->asked_ns;
}

bool Core::run_collectives(Job& job, std::uint64_t now_ns) {
  if (job.failure) return false;
  std::size_t num_in_ring = 0, num_in_control = 0, num_waiting = 0;
  std::uint64_t since_ns = UINT64_MAX;
  for (const Session* session : job.sessions()) {
    const std::uint64_t ring_ns = ring_wait_ns(*session);
    const std::uint64_t control_ns = control_wait_ns(*session);
    num_in_ring += ring_ns != UINT64_MAX ? 1 : 0;
    num_in_control += control_ns != UINT64_MAX ? 1 : 0;
    num_waiting += ring_ns != UINT64_MAX || control_ns != UINT64_MAX ? 1 : 0;
    since_ns = std::min({since_ns, ring_ns, control_ns});
  }
  const std::size_t num_members = job.members.size();
  if (num_in_control == num_members) {
    run_control_collective(job);
  } else if (num_in_ring == num_members) {
    run_ring_collective(job);
  } else if (num_waiting == num_members) {
    // Some wait in the ring, the others in a control command: neither will ever be complete.
    std::vector<Offer> offers;
    for (const Session* session : job.sessions()) {
      const bool in_ring = ring_wait_ns(*session) != UINT64_MAX;
      const char* name =
          in_ring ? shm::verb_name(session->queue.front().request.verb) : command_name(*session->control);
      offers.push_back({session->rank, {{"the verb", name}}});
    }
    const auto disagreement = first_disagreement(offers);
    disagree(job, "a collective",
             disagreement ? *disagreement : Disagreement{"the verb", "they wait in different calls"});
  } else if (num_waiting > 0 && now_ns >= since_ns && now_ns - since_ns >= job.collective_timeout_ns) {
    time_out(job, now_ns, since_ns);
  } else {
    return false;
  }
  return true;
}

void Core::disagree(Job& job, const std::string& collective, const Disagreement& disagreement) {
  fail_job(job, JobFailure{Error{ErrorCode::kDisagreement,
                                 "the ranks of job '" + job.id + "' disagree in " + collective + " about " +
                                     disagreement.field + " (step " + std::to_string(job.step) + ")",
                                 disagreement.why + "; nothing was applied",
                                 "make the same optimizer calls with the same values on every rank, then restart from "
                                 "the last checkpoint"}});
}

void Core::run_ring_collective(Job& job) {
  const std::vector<Session*> sessions = job.sessions();
  std::vector<RankedRequest> requests;
  for (const Session* session : sessions) {
    const Pending& head = session->queue.front();
    RankedRequest ranked{session->rank, &head, head.request.adapter_id, 0};
    if (head.request.verb == Verb::kBackward) {
      const BatchKey key = batch_key(*session);
      ranked.adapter_id = key.adapter_id;
      ranked.layer = key.layer;
    }
    requests.push_back(ranked);
  }
  const Pending& lowest = *requests.front().pending;
  if (const auto disagreement = ring_disagreement(requests)) {
    disagree(job, shm::verb_name(lowest.request.verb), *disagreement);
    return;
  }
  if (lowest.request.verb == Verb::kBackward) {
    run_in_rank_order(job);
    return;
  }
  shm::Reply reply;
  const Status status = apply_collective(job, lowest, reply);
  if (job.failure) return;  // The heads are told by advance().
  for (Session* session : sessions) answer_head(*session, reply, status.ok() ? nullptr : &status.error());
}

Status Core::apply_collective(Job& job, const Pending& lowest, shm::Reply& reply) {
  const shm::Request& request = lowest.request;
  reply.step = job.step;
  if (request.verb == Verb::kBarrier) return ok_status();
  Adapter* const adapter = job.find_adapter(request.adapter_id);
  if (adapter == nullptr) return unknown_adapter(*job.sessions().front(), request);
  switch (request.verb) {
    case Verb::kNorm:
      reply.value = adapter->squared_norm(lowest.group_of, pool_);
      break;
    case Verb::kDiscard:
      adapter->discard(pool_);
      break;
    default:
      if (request.step != job.step) {
        disagree(
            job, "STEP",
            {"the step", "every rank asks for STEP at step " + std::to_string(request.step) +
                             ", but the job has completed " + std::to_string(job.step) + " STEPs since it was joined"});
        break;
      }
      adapter->step(*lowest.header, lowest.group_of, pool_);
      reply.step = ++job.step;
      accounting_.count_step();
      accounting_.publish_job(job);
      memory_changed_ = true;  // The first step allocates the optimizer state.
  }
  return ok_status();
}

// Deterministic mode: contributions enter S in rank order, in as many batches as the token limit makes of them.
void Core::run_in_rank_order(Job& job) {
  Batch batch;
  for (Session* session : job.sessions()) {
    const std::uint64_t num_tokens = session->queue.front().request.num_tokens;
    if (!batch.sessions.empty() && batch.num_tokens + num_tokens > options_.batch_tokens_max) {
      run_batch(batch);
      batch = Batch{};
    }
    batch.job = &job;
    batch.key = batch_key(*session);
    batch.num_tokens += num_tokens;
    batch.sessions.push_back(session);
  }
  run_batch(batch);
}

void Core::time_out(Job& job, std::uint64_t now_ns, std::uint64_t since_ns) {
  std::string waiting, missing, last;
  for (const Session* session : job.sessions()) {
    const std::string rank = "rank " + std::to_string(session->rank);
    const bool in_ring = ring_wait_ns(*session) != UINT64_MAX;
    if (in_ring || control_wait_ns(*session) != UINT64_MAX) {
      const std::string name =
          in_ring ? shm::verb_name(session->queue.front().request.verb) : command_name(*session->control);
      waiting.append(waiting.empty() ? "" : ", ").append(rank).append(" in ").append(name);
      continue;
    }
    missing.append(missing.empty() ? "" : ", ").append(rank).append(" (pid ");
    missing.append(std::to_string(session->pid)).append(")");
    last.append("; the last request of ").append(rank).append(" was ").append(describe(session->last, now_ns));
  }
  fail_job(job, JobFailure{Error{ErrorCode::kTimeout,
                                 "a collective of job '" + job.id + "' timed out in step " + std::to_string(job.step) +
                                     ": missing is " + missing,
                                 waiting + " waited " + seconds_text(now_ns - since_ns) + " of at most " +
                                     seconds_text(job.collective_timeout_ns) + last,
                                 "see what the missing rank is doing; every rank must make the same optimizer calls. "
                                 "If it is only slow, raise the timeout of the process group"}});
}

}  // namespace kt::coproc
