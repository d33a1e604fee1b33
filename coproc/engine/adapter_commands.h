// adapter_create and adapter_delete. For a job of one they run at once; in a joined job they are collectives of it,
// which fail without failing the job: nothing is applied, and every member gets the same error.
#pragma once
#include <cstdint>
#include <map>

#include "coproc/engine/registry.h"
#include "coproc/experts/dims.h"

namespace kt::coproc {

class AdapterCommands : public SessionListener {
 public:
  AdapterCommands(const ExpertDims& dims, const kernels::KernelTable& table) : dims_(dims), table_(table) {}

  // Runs the command, or leaves it waiting for the other members. The session has none that waits.
  void ask(Session& session, AdapterCommand command, OnDone answer, std::uint64_t now_ns);
  // The commands of all members, of which each has one that waits.
  void run(Job& job);
  // Answers the session's command with the error, if it has one. True: it had.
  bool refuse(const Session& session, const Error& error);

  const AdapterCommand* waiting(const Session& session) const;  // nullptr: none.
  std::uint64_t since_ns(const Session& session) const;         // When it was asked; UINT64_MAX: none waits.

  void on_leaving(Session& session, SessionEnd) override { waiting_.erase(session.id); }
  void on_job_failed(Session& session, const Error& error) override { refuse(session, error); }
  void on_peer_departed(Session& session, const Error& error) override { refuse(session, error); }

 private:
  struct Waiting {
    AdapterCommand command;
    OnDone answer;
    std::uint64_t asked_ns = 0;
  };
  Status apply(Job& job, const AdapterCommand& command) const;
  bool answer(const Session& session, const Status& status);

  const ExpertDims& dims_;
  const kernels::KernelTable& table_;
  std::map<std::uint32_t, Waiting> waiting_;  // By session_id.
};

}  // namespace kt::coproc
