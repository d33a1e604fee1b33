#include "coproc/engine/registry.h"

#include <spdlog/spdlog.h>

#include <set>

#include "coproc/engine/messages.h"
#include "shm/doorbell.h"

namespace kt::coproc {

using shm::now_ns;

Registry::Registry(Accounting& accounting, Sleeper& sleeper, WorkerPool& pool, std::uint64_t collective_timeout_ns)
    : accounting_(accounting), sleeper_(sleeper), pool_(pool), collective_timeout_ns_(collective_timeout_ns) {}

Session* Registry::find(std::uint32_t session_id) const {
  const auto found = sessions_.find(session_id);
  return found == sessions_.end() ? nullptr : found->second.get();
}

Status Registry::open(OpenSession open) {
  const auto refuse = [&](Error error) {
    accounting_.reject_session();
    return error;
  };
  if (shutting_down_) return refuse(shutting_down_error());
  KT_CHECK(!sessions_.contains(open.session_id));  // The server counts them up.
  auto owned = std::make_unique<Session>(std::move(open));
  Session& session = *owned;
  if (!sleeper_.add(session.doorbell.get())) {
    return refuse(
        os_error("epoll_ctl", "session " + std::to_string(session.id), "raise the limit on open files: ulimit -n"));
  }
  if (!accounting_.open_rank(session.account, now_ns())) {
    sleeper_.remove(session.doorbell.get());
    return refuse(Error{
        ErrorCode::kNoResources, "the daemon cannot take another session",
        std::to_string(sessions_.size()) + " sessions are open, the limit is " + std::to_string(shm::kNumRankRowsMax),
        "end a training job, or start a second daemon"});
  }
  session.last.at_ns = now_ns();
  sessions_.emplace(session.id, std::move(owned));
  Job& job = new_job("session-" + std::to_string(session.id), session.name);
  move_to_job(session, job, 0);
  publish_jobs();
  return ok_status();
}

void Registry::end(std::uint32_t session_id, SessionEnd why) {
  Session* const session = find(session_id);
  if (session == nullptr) return;
  const bool bye = why == SessionEnd::kBye;
  const Error reason{ErrorCode::kRankDied, describe(*session) + (bye ? " said bye" : " lost its connection"),
                     bye ? "the request was still waiting when the session ended"
                         : "its control socket closed, or carried what is no control packet",
                     "wait for every request before closing the session"};
  remove(*session, why, reason);
}

Job& Registry::new_job(std::string id, std::string name) {
  auto owned = std::make_unique<Job>();
  Job& job = *owned;
  job.key = ++num_jobs_made_;
  job.id = std::move(id);
  job.name = std::move(name);
  job.collective_timeout_ns = collective_timeout_ns_;
  jobs_.emplace(job.key, std::move(owned));
  return job;
}

// Callers move members in ascending order of rank.
void Registry::move_to_job(Session& session, Job& job, std::uint32_t rank) {
  if (session.job != nullptr) {
    for (Member& member : session.job->members) {
      if (member.session == &session) member.session = nullptr;
    }
  }
  job.members.push_back({rank, &session});
  session.job = &job;
  session.rank = rank;
  accounting_.describe_rank(session.account, session.id, session.pid, rank, job.id);
}

void Registry::erase_job(Job& job) {
  accounting_.close_job(job);
  jobs_.erase(job.key);
}

// Also gives a row to jobs that found none when they began.
void Registry::publish_jobs() {
  for (const auto& [key, job] : jobs_) accounting_.publish_job(*job);
}

Job& Registry::merge(const JoinJob& join, std::uint64_t collective_timeout_ns, const std::vector<Place>& members) {
  Job& job = new_job(join.job_id, join.name);
  job.joined = true;
  job.world_size = join.world_size;
  job.collective_timeout_ns = collective_timeout_ns;
  job.adapters = std::move(members.front().session->job->adapters);
  std::set<Job*> old_jobs;
  for (const Place& member : members) {
    old_jobs.insert(member.session->job);
    move_to_job(*member.session, job, member.rank);
  }
  for (Job* old_job : old_jobs) erase_job(*old_job);
  publish_jobs();
  return job;
}

// reason: what the session's own outstanding requests are told.
void Registry::remove(Session& session, SessionEnd why, const Error& reason) {
  Job& job = *session.job;
  session.refuse_all(accounting_, reason);
  for (SessionListener* listener : listeners_) listener->on_leaving(session, why);
  session.activations.clear();
  for (Member& member : job.members) {
    if (member.session == &session) member.session = nullptr;
  }
  if (job.has_sessions() && !job.failure) {
    JobFailure gone{rank_gone(session, why, reason, now_ns()), session.rank, session.last.layer, session.last.step};
    if (why != SessionEnd::kBye) {
      fail(job, std::move(gone));
    } else {
      for (Session* peer : job.sessions()) {
        for (SessionListener* listener : listeners_) listener->on_peer_departed(*peer, gone.error);
      }
      job.departure = std::move(gone);
    }
  }
  sleeper_.remove(session.doorbell.get());
  accounting_.close_rank(session.account);
  sessions_.erase(session.id);
  if (!job.has_sessions()) erase_job(job);
  publish_jobs();
}

void Registry::break_session(Session& session, const Error& error) {
  const std::uint32_t session_id = session.id;
  spdlog::warn("session {}: {}; {}", session_id, error.what, error.why);
  remove(session, SessionEnd::kProtocolError, error);
  if (on_session_ended) on_session_ended(session_id, error);
}

void Registry::fail(Job& job, JobFailure failure) {
  spdlog::warn("job {} failed: {}; {}", job.id, failure.error.what, failure.error.why);
  job.failure = std::move(failure);
  for (const auto& [adapter_id, adapter] : job.adapters) adapter->discard(pool_);
  for (Session* session : job.sessions()) {
    session->activations.clear();
    for (SessionListener* listener : listeners_) listener->on_job_failed(*session, job.failure->error);
  }
  accounting_.publish_job(job);
}

void Registry::shut_down() {
  shutting_down_ = true;
  for (const auto& [session_id, session] : sessions_) {
    session->segment.header().state.store(shm::SessionState::kShuttingDown, std::memory_order_release);
  }
}

MemoryBytes Registry::memory() const {
  MemoryBytes bytes;
  for (const auto& [key, job] : jobs_) {
    for (const auto& [adapter_id, adapter] : job->adapters) {
      bytes.adapters += adapter->parameter_bytes();
      bytes.gradients += adapter->gradient_bytes();
      bytes.optimizer += adapter->optimizer_bytes();
    }
  }
  for (const auto& [session_id, session] : sessions_) {
    bytes.activations += session->activations.bytes();
    bytes.arenas += session->segment.arena_bytes();
  }
  return bytes;
}

std::uint64_t activation_bytes(const Job& job) {
  std::uint64_t bytes = 0;
  for (const Session* session : job.sessions()) bytes += session->activations.bytes();
  return bytes;
}

}  // namespace kt::coproc
