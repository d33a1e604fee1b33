// join: the jobs of one that processes start with become one job, whose lowest rank's adapters all members share.
//
// A join takes effect after every earlier ring request of its members. A session that is told an error keeps the job it
// had.
#include <algorithm>
#include <cmath>
#include <set>

#include "coproc/engine/core.h"
#include "coproc/engine/messages.h"
#include "shm/control.h"
#include "shm/doorbell.h"

namespace kt::coproc {
namespace {

constexpr std::size_t kJobIdBytesMax = 63;  // What the status page shows.
constexpr double kTimeoutSecondsMax = 1e8;
constexpr std::size_t kNumFailedJoinsMax = 64;

const JoinJob& join_of(const Session& session) { return std::get<JoinJob>(session.control->what); }

bool waits_in_join(const Session& session) {
  return session.control && std::holds_alternative<JoinJob>(session.control->what);
}

// What is wrong with one rank's join by itself; empty: nothing.
std::string join_fault(const JoinJob& join) {
  const auto& members = join.members;
  if (join.job_id.empty() || join.job_id.size() > kJobIdBytesMax) {
    return "job_id has " + std::to_string(join.job_id.size()) + " bytes; it needs 1 to " +
           std::to_string(kJobIdBytesMax);
  }
  if (members.empty()) return "members is empty";
  for (std::size_t i = 1; i < members.size(); ++i) {
    if (members[i] <= members[i - 1]) return "members is " + join_ranks(members) + "; it must ascend, each rank once";
  }
  if (members.back() >= join.world_size) {
    return "members names rank " + std::to_string(members.back()) + "; world_size is " +
           std::to_string(join.world_size);
  }
  if (!std::binary_search(members.begin(), members.end(), join.rank)) {
    return "rank " + std::to_string(join.rank) + " is not among its own members " + join_ranks(members);
  }
  if (!(join.timeout_seconds >= 0 && join.timeout_seconds <= kTimeoutSecondsMax)) {
    return "timeout_seconds is " + number_text(join.timeout_seconds) + "; it must be 0 (the default) to 1e8";
  }
  return "";
}

Error join_disagreement(const std::string& job_id, std::string why, std::string fix) {
  return Error{ErrorCode::kDisagreement, "the ranks of job '" + job_id + "' cannot join", std::move(why),
               std::move(fix)};
}

std::optional<Error> differing_joins(const std::vector<Session*>& group) {
  std::vector<Offer> offers;
  for (const Session* session : group) {
    const JoinJob& join = join_of(*session);
    offers.push_back({join.rank,
                      {{"world_size", "a join with world_size " + std::to_string(join.world_size)},
                       {"members", "a join with members " + join_ranks(join.members)}}});
  }
  const JoinJob& lowest = join_of(*group.front());
  if (const auto disagreement = first_disagreement(offers)) {
    return join_disagreement(lowest.job_id, disagreement->why,
                             "wrap the model over the same process group on every rank");
  }
  for (std::size_t i = 1; i < group.size(); ++i) {
    if (join_of(*group[i]).rank != join_of(*group[i - 1]).rank) continue;
    return join_disagreement(lowest.job_id,
                             "processes " + std::to_string(group[i - 1]->pid) + " and " +
                                 std::to_string(group[i]->pid) + " both say that they are rank " +
                                 std::to_string(join_of(*group[i]).rank),
                             "give every process its own rank");
  }
  return std::nullopt;
}

// All of the group are in one joined job already, and it is the one they ask for.
bool is_joined_already(const std::vector<Session*>& group) {
  const Job& job = *group.front()->job;
  const JoinJob& lowest = join_of(*group.front());
  if (!job.joined || job.world_size != lowest.world_size || job.ranks() != lowest.members) return false;
  return std::all_of(group.begin(), group.end(), [&](const Session* session) {
    return session->job == &job && session->rank == join_of(*session).rank;
  });
}

// Why the members' states cannot become one: adapters differ, gradients or activations are there, a job would be split.
std::optional<Error> unfit_states(const std::vector<Session*>& group, std::uint32_t num_layers) {
  const JoinJob& lowest = join_of(*group.front());
  const Job& first_job = *group.front()->job;
  for (const Session* session : group) {
    const Job& job = *session->job;
    const std::string rank = "rank " + std::to_string(join_of(*session).rank);
    for (const Session* peer : job.sessions()) {
      if (std::find(group.begin(), group.end(), peer) != group.end()) continue;
      return join_disagreement(lowest.job_id,
                               rank + " is in job '" + job.id + "' with a process that does not join (pid " +
                                   std::to_string(peer->pid) + ")",
                               "join all ranks of a job, or none");
    }
    if (!session->activations.empty()) {
      return join_disagreement(lowest.job_id,
                               rank + " holds " + std::to_string(session->activations.size()) +
                                   " activations of forwards that had no backward yet",
                               "wrap the model before the first forward that needs gradients");
    }
    for (const auto& [adapter_id, adapter] : job.adapters) {
      if (!adapter->has_gradients()) continue;
      return join_disagreement(lowest.job_id,
                               rank + " holds gradients in adapter " + std::to_string(adapter_id) + " (step " +
                                   std::to_string(job.step) + ")",
                               "call zero_grad() before the model is wrapped");
    }
    const std::string difference = adapters_difference(first_job, lowest.rank, job, join_of(*session).rank, num_layers);
    if (!difference.empty()) {
      return join_disagreement(lowest.job_id, difference, "create the same adapters on every rank before joining");
    }
  }
  return std::nullopt;
}

}  // namespace

void Core::join(std::uint32_t session_id, JoinJob join, Answer answer) {
  Session* const session = session_for(session_id, answer);
  if (session == nullptr) return;
  if (std::string fault = join_fault(join); !fault.empty()) {
    answer(shm::error_reply(invalid_control(describe(*session) + " cannot join job '" + join.job_id + "'",
                                            std::move(fault),
                                            "send job_id, rank, world_size and members as the process "
                                            "group has them")));
    return;
  }
  ask(*session, ControlRequest{std::move(join), std::move(answer), shm::now_ns()});
  tell_late_joiner(*session);
}

std::uint64_t Core::join_timeout_ns(const JoinJob& join) const {
  if (join.timeout_seconds == 0) return options_.collective_timeout_ns;
  return static_cast<std::uint64_t>(join.timeout_seconds * 1e9);
}

bool Core::run_joins(std::uint64_t now_ns) {
  std::map<std::string, std::vector<Session*>> groups;
  for (const auto& [session_id, session] : sessions_) {
    if (waits_in_join(*session)) groups[join_of(*session).job_id].push_back(session.get());
  }
  bool did = false;
  for (auto& [job_id, group] : groups) did |= run_join(group, now_ns);
  return did;
}

bool Core::run_join(std::vector<Session*>& group, std::uint64_t now_ns) {
  const auto by_rank = [](const Session* a, const Session* b) { return join_of(*a).rank < join_of(*b).rank; };
  std::stable_sort(group.begin(), group.end(), by_rank);
  if (const auto error = differing_joins(group)) {
    fail_join(group, *error);
    return true;
  }
  const JoinJob& lowest = join_of(*group.front());
  const bool busy =
      std::any_of(group.begin(), group.end(), [](const Session* session) { return !session->queue.empty(); });
  if (group.size() == lowest.members.size() && !busy) {
    if (is_joined_already(group)) {
      const nlohmann::json body = {{"ok", true}, {"step", group.front()->job->step}};
      for (Session* session : group) answer_control(*session, body);
    } else if (const auto error = unfit_states(group, dims_.num_layers)) {
      fail_join(group, *error);
    } else {
      complete_join(group);
    }
    return true;
  }

  std::uint64_t since_ns = UINT64_MAX;
  for (const Session* session : group) since_ns = std::min(since_ns, session->control->asked_ns);
  const std::uint64_t timeout_ns = join_timeout_ns(lowest);
  if (now_ns < since_ns || now_ns - since_ns < timeout_ns) return false;
  std::vector<std::uint32_t> missing = lowest.members;
  for (const Session* session : group) std::erase(missing, join_of(*session).rank);
  const std::string who = missing.empty() ? "requests that never completed" : "ranks " + join_ranks(missing);
  fail_join(
      group,
      Error{ErrorCode::kTimeout, "joining job '" + lowest.job_id + "' timed out: missing are " + who,
            std::to_string(group.size()) + " of " + std::to_string(lowest.members.size()) + " members asked within " +
                seconds_text(timeout_ns) + "; a rank that has not asked has no last request here",
            "see whether the missing ranks are alive; wrap the model on every rank. If they are only slow, "
            "raise the timeout of the process group"});
  return true;
}

void Core::complete_join(const std::vector<Session*>& group) {
  const JoinJob lowest = join_of(*group.front());
  Job& job = new_job(lowest.job_id, lowest.name);
  job.joined = true;
  job.world_size = lowest.world_size;
  job.collective_timeout_ns = join_timeout_ns(lowest);
  job.adapters = std::move(group.front()->job->adapters);
  std::set<Job*> old_jobs;
  for (Session* session : group) {
    old_jobs.insert(session->job);
    move_to_job(*session, job, join_of(*session).rank);
  }
  for (Job* old_job : old_jobs) erase_job(*old_job);
  publish_jobs();
  const nlohmann::json body = {{"ok", true}, {"step", job.step}};
  for (Session* session : group) answer_control(*session, body);
}

void Core::fail_join(const std::vector<Session*>& group, const Error& error) {
  const JoinJob lowest = join_of(*group.front());
  FailedJoin failed{lowest.job_id, {}, error};
  for (Session* session : group) {
    failed.told.push_back(join_of(*session).rank);
    answer_control(*session, shm::error_reply(error));
  }
  if (failed.told.size() >= lowest.members.size()) return;
  if (failed_joins_.size() == kNumFailedJoinsMax) failed_joins_.erase(failed_joins_.begin());
  failed_joins_.push_back(std::move(failed));
}

// A member that asks after the others were told an error is told the same, once, instead of waiting for the deadline.
// A member that was told already asks again: that is a new attempt.
void Core::tell_late_joiner(Session& session) {
  const JoinJob& join = join_of(session);
  const auto same_job = [&](const FailedJoin& failed) { return failed.job_id == join.job_id; };
  const auto found = std::find_if(failed_joins_.begin(), failed_joins_.end(), same_job);
  if (found == failed_joins_.end()) return;
  if (std::find(found->told.begin(), found->told.end(), join.rank) != found->told.end()) {
    failed_joins_.erase(found);
    return;
  }
  const Error error = found->error;
  found->told.push_back(join.rank);
  if (found->told.size() >= join.members.size()) failed_joins_.erase(found);
  answer_control(session, shm::error_reply(error));
}

// A session that ends, or whose job fails, while it waits in a join: the others would wait for it in vain.
void Core::leave_join(const Session& session, SessionEnd why) {
  if (!waits_in_join(session)) return;
  const JoinJob& left = join_of(session);
  std::vector<Session*> group;
  for (const auto& [session_id, other] : sessions_) {
    if (other.get() != &session && waits_in_join(*other) && join_of(*other).job_id == left.job_id) {
      group.push_back(other.get());
    }
  }
  if (group.empty()) return;
  fail_join(group, Error{ErrorCode::kRankDied,
                         "rank " + std::to_string(left.rank) + " (pid " + std::to_string(session.pid) + ") " +
                             (why == SessionEnd::kBye ? "left" : "died") + " while joining job '" + left.job_id + "'",
                         "it was in step " + std::to_string(session.job->step) + "; " + std::to_string(group.size()) +
                             " other ranks were waiting",
                         "restart the training job"});
}

}  // namespace kt::coproc
