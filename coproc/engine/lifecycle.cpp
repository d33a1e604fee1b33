// How sessions and jobs begin and end, the failure of a job, and the shutdown.
#include <spdlog/spdlog.h>

#include "coproc/engine/core.h"
#include "coproc/engine/messages.h"
#include "shm/control.h"
#include "shm/doorbell.h"

namespace kt::coproc {

using shm::now_ns;

void Core::open_session(OpenSession open, const Answer& answer) {
  const auto refuse = [&](const Error& error) {
    accounting_.reject_session();
    answer(shm::error_reply(error));
  };
  if (shutting_down_) return refuse(shutting_down());
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
  memory_changed_ = true;
  answer({{"ok", true}});
}

void Core::end_session(std::uint32_t session_id, SessionEnd why, const Answer& answer) {
  const auto found = sessions_.find(session_id);
  if (found != sessions_.end()) {
    Session& session = *found->second;
    const bool bye = why == SessionEnd::kBye;
    const Error reason{ErrorCode::kRankDied, describe(session) + (bye ? " said bye" : " lost its connection"),
                       bye ? "the request was still waiting when the session ended"
                           : "its control socket closed, or carried what is no control packet",
                       "wait for every request before closing the session"};
    remove_session(session, why, reason);
  }
  if (answer) answer({{"ok", true}});
}

Job& Core::new_job(std::string id, std::string name) {
  auto owned = std::make_unique<Job>();
  Job& job = *owned;
  job.key = ++num_jobs_made_;
  job.id = std::move(id);
  job.name = std::move(name);
  job.collective_timeout_ns = options_.collective_timeout_ns;
  jobs_.emplace(job.key, std::move(owned));
  return job;
}

// Callers move members in ascending order of rank.
void Core::move_to_job(Session& session, Job& job, std::uint32_t rank) {
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

void Core::erase_job(Job& job) {
  accounting_.close_job(job);
  jobs_.erase(job.key);
  memory_changed_ = true;
}

// Also gives a row to jobs that found none when they began.
void Core::publish_jobs() {
  for (const auto& [key, job] : jobs_) accounting_.publish_job(*job);
}

// reason: what the session's own outstanding requests are told.
void Core::remove_session(Session& session, SessionEnd why, const Error& reason) {
  Job& job = *session.job;
  const std::uint64_t now = now_ns();
  for (const Pending& pending : session.queue) {
    session.ring.reply(pending.sequence, shm::Reply{}, &reason);
    accounting_.answered(session.account, pending.request.verb, 0, false, pending.received_ns, now);
  }
  session.queue.clear();
  leave_join(session, why);
  session.control.reset();
  drop_activations(session);
  for (Member& member : job.members) {
    if (member.session == &session) member.session = nullptr;
  }
  if (job.has_sessions() && !job.failure) {
    JobFailure gone{rank_gone(session, why, reason, now), session.rank, session.last.layer, session.last.step};
    if (why != SessionEnd::kBye) {
      fail_job(job, std::move(gone));
    } else {
      for (Session* peer : job.sessions()) {
        if (control_wait_ns(*peer) != UINT64_MAX) answer_control(*peer, shm::error_reply(gone.error));
      }
      job.departure = std::move(gone);
    }
  }
  sleeper_.remove(session.doorbell.get());
  accounting_.close_rank(session.account);
  sessions_.erase(session.id);
  memory_changed_ = true;
  if (!job.has_sessions()) erase_job(job);
  publish_jobs();
}

void Core::break_session(Session& session, const Error& error) {
  const std::uint32_t session_id = session.id;
  spdlog::warn("session {}: {}; {}", session_id, error.what, error.why);
  remove_session(session, SessionEnd::kProtocolError, error);
  if (on_session_ended) on_session_ended(session_id, error);
}

// The requests that wait are told by advance(), and later ones as they come; READ and RELEASE go on.
void Core::fail_job(Job& job, JobFailure failure) {
  spdlog::warn("job {} failed: {}; {}", job.id, failure.error.what, failure.error.why);
  job.failure = std::move(failure);
  for (const auto& [adapter_id, adapter] : job.adapters) adapter->discard(pool_);
  for (Session* session : job.sessions()) {
    drop_activations(*session);
    if (!session->control) continue;
    leave_join(*session, SessionEnd::kDied);
    answer_control(*session, shm::error_reply(job.failure->error));
  }
  accounting_.publish_job(job);
  memory_changed_ = true;
}

void Core::shut_down(std::function<void()> done) {
  on_shut_down_.push_back(std::move(done));
  if (shutting_down_) return;
  // What is in the rings now counts as received before the shutdown.
  for (auto it = sessions_.begin(); it != sessions_.end();) receive(*(it++)->second);
  shutting_down_ = true;
  for (const auto& [session_id, session] : sessions_) {
    session->segment.header().state.store(shm::SessionState::kShuttingDown, std::memory_order_release);
  }
}

// Called when nothing can run: what still waits, waits for other ranks, and they will not come any more.
bool Core::finish_shutdown() {
  bool did = false;
  const Error error = shutting_down();
  for (const auto& [session_id, session] : sessions_) {
    if (!session->queue.empty()) {
      answer_head(*session, shm::Reply{}, &error);
      did = true;
    }
    if (session->control) {
      answer_control(*session, shm::error_reply(error));
      did = true;
    }
  }
  if (did) return true;
  const auto callbacks = std::move(on_shut_down_);
  on_shut_down_.clear();
  for (const auto& done : callbacks) done();
  return !callbacks.empty();
}

}  // namespace kt::coproc
