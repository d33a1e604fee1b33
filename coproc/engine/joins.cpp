#include "coproc/engine/joins.h"

#include <algorithm>

#include "coproc/engine/agreement.h"
#include "coproc/engine/text.h"

namespace kt::coproc {
namespace {

constexpr std::size_t kNumFailedJoinsMax = 64;

Error join_disagreement(const std::string& job_id, std::string why, std::string fix) {
  return Error{ErrorCode::kDisagreement, "the ranks of job '" + job_id + "' cannot join", std::move(why),
               std::move(fix)};
}

}  // namespace

std::optional<Error> Joins::differing(const Group& group) {
  std::vector<Offer> offers;
  for (const Waiting* member : group) {
    const JoinJob& join = member->join;
    offers.push_back({join.rank,
                      {{"world_size", "a join with world_size " + std::to_string(join.world_size)},
                       {"members", "a join with members " + join_ranks(join.members)}}});
  }
  const std::string& job_id = group.front()->join.job_id;
  if (const auto disagreement = first_disagreement(offers)) {
    return join_disagreement(job_id, disagreement->why, "wrap the model over the same process group on every rank");
  }
  for (std::size_t i = 1; i < group.size(); ++i) {
    if (group[i]->join.rank != group[i - 1]->join.rank) continue;
    return join_disagreement(job_id,
                             "processes " + std::to_string(group[i - 1]->session->pid) + " and " +
                                 std::to_string(group[i]->session->pid) + " both say that they are rank " +
                                 std::to_string(group[i]->join.rank),
                             "give every process its own rank");
  }
  return std::nullopt;
}

// All of the group are in one joined job already, and it is the one they ask for.
bool Joins::is_joined_already(const Group& group) {
  const Job& job = *group.front()->session->job;
  const JoinJob& lowest = group.front()->join;
  if (!job.joined || job.world_size != lowest.world_size || job.ranks() != lowest.members) return false;
  return std::all_of(group.begin(), group.end(), [&](const Waiting* member) {
    return member->session->job == &job && member->session->rank == member->join.rank;
  });
}

// Why the members' states cannot become one: adapters differ, gradients or activations are there, a job would be split.
std::optional<Error> Joins::unfit_states(const Group& group) const {
  const JoinJob& lowest = group.front()->join;
  const Job& first_job = *group.front()->session->job;
  for (const Waiting* member : group) {
    const Session& session = *member->session;
    const Job& job = *session.job;
    const std::string rank = "rank " + std::to_string(member->join.rank);
    for (const Session* peer : job.sessions()) {
      const auto is_peer = [&](const Waiting* other) { return other->session == peer; };
      if (std::any_of(group.begin(), group.end(), is_peer)) continue;
      return join_disagreement(lowest.job_id,
                               rank + " is in job '" + job.id + "' with a process that does not join (pid " +
                                   std::to_string(peer->pid) + ")",
                               "join all ranks of a job, or none");
    }
    if (session.activations.size() != 0) {
      return join_disagreement(lowest.job_id,
                               rank + " holds " + std::to_string(session.activations.size()) +
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
    const std::string difference = adapters_difference(first_job, lowest.rank, job, member->join.rank, num_layers_);
    if (!difference.empty()) {
      return join_disagreement(lowest.job_id, difference, "create the same adapters on every rank before joining");
    }
  }
  return std::nullopt;
}

std::uint64_t Joins::timeout_ns(const JoinJob& join) const {
  if (join.timeout_seconds == 0) return default_timeout_ns_;
  return static_cast<std::uint64_t>(join.timeout_seconds * 1e9);
}

std::uint64_t Joins::due_ns() const {
  std::uint64_t due_ns = UINT64_MAX;
  for (const auto& [session_id, member] : waiting_) {
    const std::uint64_t timeout = timeout_ns(member.join);
    if (timeout <= UINT64_MAX - member.asked_ns) due_ns = std::min(due_ns, member.asked_ns + timeout);
  }
  return due_ns;
}

void Joins::ask(Session& session, JoinJob join, OnJoined answer, std::uint64_t now_ns) {
  session.note_command("join", now_ns);
  waiting_.emplace(session.id, Waiting{&session, std::move(join), std::move(answer), now_ns});
  tell_late(session);
}

bool Joins::answer(const Session& session, const Result<JoinAnswer>& result) {
  const auto found = waiting_.find(session.id);
  if (found == waiting_.end()) return false;
  OnJoined answer = std::move(found->second.answer);
  waiting_.erase(found);
  answer(result);
  return true;
}

bool Joins::refuse(const Session& session, const Error& error) { return answer(session, error); }

bool Joins::run(std::uint64_t now_ns) {
  std::map<std::string, Group> groups;
  for (const auto& [session_id, member] : waiting_) groups[member.join.job_id].push_back(&member);
  bool did = false;
  for (auto& [job_id, group] : groups) did |= run_group(group, now_ns);
  return did;
}

bool Joins::run_group(Group& group, std::uint64_t now_ns) {
  std::stable_sort(group.begin(), group.end(),
                   [](const Waiting* a, const Waiting* b) { return a->join.rank < b->join.rank; });
  if (const auto error = differing(group)) {
    fail(group, *error);
    return true;
  }
  const JoinJob& lowest = group.front()->join;
  const bool busy =
      std::any_of(group.begin(), group.end(), [](const Waiting* member) { return !member->session->queue.empty(); });
  if (group.size() == lowest.members.size() && !busy) {
    const auto error = is_joined_already(group) ? std::nullopt : unfit_states(group);
    if (error) {
      fail(group, *error);
    } else {
      complete(group);
    }
    return true;
  }

  std::uint64_t since_ns = UINT64_MAX;
  for (const Waiting* member : group) since_ns = std::min(since_ns, member->asked_ns);
  const std::uint64_t limit_ns = timeout_ns(lowest);
  if (now_ns < since_ns || now_ns - since_ns < limit_ns) return false;
  std::vector<std::uint32_t> missing = lowest.members;
  for (const Waiting* member : group) std::erase(missing, member->join.rank);
  const std::string who = missing.empty() ? "requests that never completed" : "ranks " + join_ranks(missing);
  fail(group,
       Error{ErrorCode::kTimeout, "joining job '" + lowest.job_id + "' timed out: missing are " + who,
             std::to_string(group.size()) + " of " + std::to_string(lowest.members.size()) + " members asked within " +
                 seconds_text(limit_ns) + "; a rank that has not asked has no last request here",
             "see whether the missing ranks are alive; wrap the model on every rank. If they are only slow, "
             "raise the timeout of the process group"});
  return true;
}

// A group that is one joined job already stays as it is.
void Joins::complete(const Group& group) {
  std::vector<Registry::Place> members;
  for (const Waiting* member : group) members.push_back({member->session, member->join.rank});
  const JoinJob& lowest = group.front()->join;
  const Job& job =
      is_joined_already(group) ? *group.front()->session->job : registry_.merge(lowest, timeout_ns(lowest), members);
  for (const auto& member : members) answer(*member.session, JoinAnswer{job.step});
}

void Joins::fail(const Group& group, const Error& error) {
  const std::size_t num_members = group.front()->join.members.size();
  Failed failed{group.front()->join.job_id, {}, error};
  for (const Waiting* member : group) {
    failed.told.push_back(member->join.rank);
    answer(*member->session, error);
  }
  if (failed.told.size() >= num_members) return;
  if (failed_.size() == kNumFailedJoinsMax) failed_.erase(failed_.begin());
  failed_.push_back(std::move(failed));
}

// A member that was told already asks again: that is a new attempt.
void Joins::tell_late(Session& session) {
  const JoinJob& join = waiting_.at(session.id).join;
  const auto same_job = [&](const Failed& failed) { return failed.job_id == join.job_id; };
  const auto found = std::find_if(failed_.begin(), failed_.end(), same_job);
  if (found == failed_.end()) return;
  if (std::find(found->told.begin(), found->told.end(), join.rank) != found->told.end()) {
    failed_.erase(found);
    return;
  }
  const Error error = found->error;
  found->told.push_back(join.rank);
  if (found->told.size() >= join.members.size()) failed_.erase(found);
  answer(session, error);
}

void Joins::leave(const Session& session, SessionEnd why) {
  const auto left = waiting_.find(session.id);
  if (left == waiting_.end()) return;
  const JoinJob& join = left->second.join;
  Group group;
  for (const auto& [session_id, other] : waiting_) {
    if (session_id != session.id && other.join.job_id == join.job_id) group.push_back(&other);
  }
  if (group.empty()) return;
  fail(group, Error{ErrorCode::kRankDied,
                    "rank " + std::to_string(join.rank) + " (pid " + std::to_string(session.pid) + ") " +
                        (why == SessionEnd::kBye ? "left" : "died") + " while joining job '" + join.job_id + "'",
                    "it was in step " + std::to_string(session.job->step) + "; " + std::to_string(group.size()) +
                        " other ranks were waiting",
                    "restart the training job"});
}

void Joins::on_leaving(Session& session, SessionEnd why) {
  leave(session, why);
  waiting_.erase(session.id);
}

void Joins::on_job_failed(Session& session, const Error& error) {
  leave(session, SessionEnd::kDied);
  refuse(session, error);
}

}  // namespace kt::coproc
