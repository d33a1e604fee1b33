// Which sessions and jobs there are: how they begin and end, and how a job fails.
//
// Whoever keeps something of a session that waits (Joins, AdapterCommands) listens, and is told before the session or
// its job is gone.
#pragma once
#include <cstdint>
#include <functional>
#include <map>
#include <memory>
#include <string>
#include <vector>

#include "coproc/engine/accounting.h"
#include "coproc/engine/commands.h"
#include "coproc/engine/job.h"
#include "coproc/engine/session.h"
#include "coproc/engine/sleeper.h"
#include "coproc/experts/worker_pool.h"

namespace kt::coproc {

class SessionListener {
 public:
  virtual ~SessionListener() = default;
  virtual void on_leaving(Session& session, SessionEnd why) = 0;            // It ends: what it waits for is void.
  virtual void on_job_failed(Session& session, const Error& error) = 0;     // Its job failed.
  virtual void on_peer_departed(Session& session, const Error& error) = 0;  // A peer of its job said bye.
};

class Registry {
 public:
  using Sessions = std::map<std::uint32_t, std::unique_ptr<Session>>;  // By session_id.
  using Jobs = std::map<std::uint64_t, std::unique_ptr<Job>>;          // By key: in the order of creation.
  struct Place {
    Session* session = nullptr;
    std::uint32_t rank = 0;
  };

  Registry(Accounting& accounting, Sleeper& sleeper, WorkerPool& pool, std::uint64_t collective_timeout_ns);
  // Listeners are told in the order in which they were added, and outlive the last call.
  void add_listener(SessionListener& listener) { listeners_.push_back(&listener); }
  // Called when a session broke the protocol, after it is gone.
  std::function<void(std::uint32_t session_id, const Error& error)> on_session_ended;

  // A session starts as a job of one.
  Status open(OpenSession open);
  void end(std::uint32_t session_id, SessionEnd why);
  void break_session(Session& session, const Error& error);  // It broke the protocol.
  // The requests that wait are told when they are looked at, and later ones as they come; READ and RELEASE still run.
  void fail(Job& job, JobFailure failure);
  // The sessions, ascending by rank, leave their jobs, which hold nobody else, for a new one. It gets the adapters of
  // the first.
  Job& merge(const JoinJob& join, std::uint64_t collective_timeout_ns, const std::vector<Place>& members);
  // No more sessions from now on; every segment says so.
  void shut_down();
  bool shutting_down() const { return shutting_down_; }

  const Sessions& sessions() const { return sessions_; }
  const Jobs& jobs() const { return jobs_; }
  Session* find(std::uint32_t session_id) const;  // nullptr: it has ended.
  // act(session) for every session; it may end that session. True: one of them returned true.
  template <class Act>
  bool any_session(Act act) const {
    bool did = false;
    for (auto it = sessions_.begin(); it != sessions_.end();) did |= act(*(it++)->second);
    return did;
  }
  MemoryBytes memory() const;  // What sessions and jobs hold now.

 private:
  Job& new_job(std::string id, std::string name);
  void move_to_job(Session& session, Job& job, std::uint32_t rank);
  void erase_job(Job& job);
  void publish_jobs();
  void remove(Session& session, SessionEnd why, const Error& reason);

  Accounting& accounting_;
  Sleeper& sleeper_;
  WorkerPool& pool_;
  const std::uint64_t collective_timeout_ns_;
  std::vector<SessionListener*> listeners_;
  Sessions sessions_;
  Jobs jobs_;
  std::uint64_t num_jobs_made_ = 0;
  bool shutting_down_ = false;
};

// Bytes of activations that the job's sessions hold.
std::uint64_t activation_bytes(const Job& job);

}  // namespace kt::coproc
