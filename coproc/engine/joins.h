// join: the jobs of one that processes start with become one job, whose lowest rank's adapters all members share.
//
// A join takes effect after every earlier ring request of its members. A session that is told an error keeps the job it
// had.
#pragma once
#include <cstdint>
#include <map>
#include <string>
#include <vector>

#include "coproc/engine/registry.h"

namespace kt::coproc {

class Joins : public SessionListener {
 public:
  Joins(Registry& registry, std::uint32_t num_layers, std::uint64_t default_timeout_ns)
      : registry_(registry), num_layers_(num_layers), default_timeout_ns_(default_timeout_ns) {}

  // The session has no join that waits. A member that asks after the others were told an error is told the same, once,
  // instead of waiting for the deadline.
  void ask(Session& session, JoinJob join, OnJoined answer, std::uint64_t now_ns);
  // Completes or refuses what can be. True: it did something.
  bool run(std::uint64_t now_ns);
  // Answers the session's join with the error, if it has one. True: it had.
  bool refuse(const Session& session, const Error& error);

  bool waits(const Session& session) const { return waiting_.contains(session.id); }
  std::uint64_t due_ns() const;  // When the next join that waits times out; UINT64_MAX: none waits.

  void on_leaving(Session& session, SessionEnd why) override;
  void on_job_failed(Session& session, const Error& error) override;
  void on_peer_departed(Session&, const Error&) override {}

 private:
  struct Waiting {
    Session* session = nullptr;
    JoinJob join;
    OnJoined answer;
    std::uint64_t asked_ns = 0;
  };
  using Group = std::vector<const Waiting*>;  // Those who wait for one job_id.
  // Joins of one job_id that ended in an error before all had asked: whoever comes later is told the same.
  struct Failed {
    std::string job_id;
    std::vector<std::uint32_t> told;  // Ranks.
    Error error;
  };

  static std::optional<Error> differing(const Group& group);
  static bool is_joined_already(const Group& group);
  std::optional<Error> unfit_states(const Group& group) const;
  bool run_group(Group& group, std::uint64_t now_ns);
  void complete(const Group& group);
  void fail(const Group& group, const Error& error);
  void tell_late(Session& session);
  // The others of its job_id would wait in vain for the session.
  void leave(const Session& session, SessionEnd why);
  bool answer(const Session& session, const Result<JoinAnswer>& result);
  std::uint64_t timeout_ns(const JoinJob& join) const;

  Registry& registry_;
  const std::uint32_t num_layers_;
  const std::uint64_t default_timeout_ns_;
  std::map<std::uint32_t, Waiting> waiting_;  // By session_id.
  std::vector<Failed> failed_;
};

}  // namespace kt::coproc
