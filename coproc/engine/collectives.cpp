#include "coproc/engine/collectives.h"

#include <algorithm>

#include "coproc/engine/messages.h"
#include "coproc/engine/text.h"

namespace kt::coproc {

using shm::Verb;

std::uint64_t Collectives::ring_since_ns(const Session& session) const {
  if (session.queue.empty()) return UINT64_MAX;
  const std::uint64_t head_ns = session.queue.front().head_ns;
  return head_ns != 0 && heads_.is_collective(session) ? head_ns : UINT64_MAX;
}

std::uint64_t Collectives::since_ns(const Session& session) const {
  return std::min(ring_since_ns(session), commands_.since_ns(session));
}

const char* Collectives::name(const Session& session) const {
  if (ring_since_ns(session) != UINT64_MAX) return shm::verb_name(session.queue.front().request.verb);
  return command_name(*commands_.waiting(session));
}

std::uint64_t Collectives::due_ns() const {
  std::uint64_t due_ns = UINT64_MAX;
  for (const auto& [session_id, session] : registry_.sessions()) {
    const std::uint64_t since = since_ns(*session);
    const std::uint64_t timeout = session->job->collective_timeout_ns;
    if (since != UINT64_MAX && timeout <= UINT64_MAX - since) due_ns = std::min(due_ns, since + timeout);
  }
  return due_ns;
}

bool Collectives::run(std::uint64_t now_ns) {
  bool did = false;
  for (const auto& [key, job] : registry_.jobs()) did |= run_job(*job, now_ns);
  return did;
}

bool Collectives::run_job(Job& job, std::uint64_t now_ns) {
  if (job.failure) return false;
  std::size_t num_in_ring = 0, num_in_command = 0, num_waiting = 0;
  std::uint64_t since = UINT64_MAX;
  for (const Session* session : job.sessions()) {
    if (ring_since_ns(*session) != UINT64_MAX) ++num_in_ring;
    if (commands_.since_ns(*session) != UINT64_MAX) ++num_in_command;
    if (since_ns(*session) != UINT64_MAX) ++num_waiting;
    since = std::min(since, since_ns(*session));
  }
  const std::size_t num_members = job.members.size();
  if (num_in_command == num_members) {
    commands_.run(job);
  } else if (num_in_ring == num_members) {
    run_ring(job);
  } else if (num_waiting == num_members) {
    differ_in_call(job);
  } else if (num_waiting > 0 && now_ns >= since && now_ns - since >= job.collective_timeout_ns) {
    time_out(job, now_ns, since);
  } else {
    return false;
  }
  return true;
}

// Some wait in the ring, the others in a command: neither will ever be complete.
void Collectives::differ_in_call(Job& job) {
  std::vector<Offer> offers;
  for (const Session* session : job.sessions()) offers.push_back({session->rank, {{"the verb", name(*session)}}});
  const auto disagreement = first_disagreement(offers);
  disagree(job, "a collective",
           disagreement ? *disagreement : Disagreement{"the verb", "they wait in different calls"});
}

void Collectives::disagree(Job& job, const std::string& collective, const Disagreement& disagreement) {
  registry_.fail(job, JobFailure{Error{ErrorCode::kDisagreement,
                                       "the ranks of job '" + job.id + "' disagree in " + collective + " about " +
                                           disagreement.field + " (step " + std::to_string(job.step) + ")",
                                       disagreement.why + "; nothing was applied",
                                       "make the same optimizer calls with the same values on every rank, then restart "
                                       "from the last checkpoint"}});
}

void Collectives::run_ring(Job& job) {
  const std::vector<Session*> sessions = job.sessions();
  std::vector<RankedRequest> requests;
  for (const Session* session : sessions) {
    const Pending& head = session->queue.front();
    RankedRequest ranked{session->rank, &head, head.request.adapter_id, 0};
    if (head.request.verb == Verb::kBackward) {
      const BatchKey key = Heads::key(*session);
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
  const Status status = apply(job, lowest, reply);
  if (job.failure) return;  // The heads are told when they are looked at.
  for (Session* session : sessions) {
    session->answer_head(accounting_, reply, status.ok() ? nullptr : &status.error());
  }
}

Status Collectives::apply(Job& job, const Pending& lowest, shm::Reply& reply) {
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
  }
  return ok_status();
}

// Deterministic mode: contributions enter S in rank order, in as many batches as the token limit makes of them.
void Collectives::run_in_rank_order(Job& job) {
  Batch batch;
  for (Session* session : job.sessions()) {
    const std::uint64_t num_tokens = session->queue.front().request.num_tokens;
    if (!batch.sessions.empty() && batch.num_tokens + num_tokens > batches_.tokens_max()) {
      batches_.run(std::move(batch));
      batch = Batch{};
    }
    batch.job = &job;
    batch.key = Heads::key(*session);
    batch.num_tokens += num_tokens;
    batch.sessions.push_back(session);
  }
  batches_.run(std::move(batch));
}

void Collectives::time_out(Job& job, std::uint64_t now_ns, std::uint64_t since_ns) {
  std::string waiting, missing, last;
  for (const Session* session : job.sessions()) {
    const std::string rank = "rank " + std::to_string(session->rank);
    if (this->since_ns(*session) != UINT64_MAX) {
      waiting.append(waiting.empty() ? "" : ", ").append(rank).append(" in ").append(name(*session));
      continue;
    }
    missing.append(missing.empty() ? "" : ", ").append(rank).append(" (pid ");
    missing.append(std::to_string(session->pid)).append(")");
    last.append("; the last request of ").append(rank).append(" was ").append(describe(session->last, now_ns));
  }
  registry_.fail(job,
                 JobFailure{Error{ErrorCode::kTimeout,
                                  "a collective of job '" + job.id + "' timed out in step " + std::to_string(job.step) +
                                      ": missing is " + missing,
                                  waiting + " waited " + seconds_text(now_ns - since_ns) + " of at most " +
                                      seconds_text(job.collective_timeout_ns) + last,
                                  "see what the missing rank is doing; every rank must make the same optimizer calls. "
                                  "If it is only slow, raise the timeout of the process group"}});
}

}  // namespace kt::coproc
