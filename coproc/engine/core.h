// The engine's state and what happens to it: worker 0's thread only, so there is no lock in here.
//
//   commands ──► sessions, jobs          (lifecycle.cpp, control.cpp, join.cpp)
//   slots ─► receive ─► queue ─► advance ─► collectives ─► one batch ─► replies
//            (core.cpp)         (core.cpp,  (collective.cpp) (batch.cpp)
//                                alone.cpp)
//
// Invariants
//   C1  A session's requests are answered only at the front of its queue: they take effect in ring order (O1). The
//       exceptions take no effect: failures told at a session's end, and refusals while the daemon shuts down.
//   C2  Sessions end only in commands, receive() and advance(); batches and collectives find them all alive.
//   C3  A head that waits (FORWARD, BACKWARD, a collective) is never held to an earlier state of its job: check_head()
//       looks at it in every round, and gather() takes only heads that pass it at that moment.
#pragma once
#include <cstdint>
#include <functional>
#include <map>
#include <memory>
#include <string>
#include <vector>

#include "coproc/engine/accounting.h"
#include "coproc/engine/agreement.h"
#include "coproc/engine/engine.h"
#include "coproc/engine/fair_share.h"
#include "coproc/engine/job.h"
#include "coproc/engine/session.h"
#include "coproc/engine/sleeper.h"
#include "coproc/engine/validate.h"

namespace kt::coproc {

class Core {
 public:
  using Answer = Engine::Answer;

  Core(const ExpertDims& dims, const kernels::KernelTable& table, const ExpertWeights& weights, WorkerPool& pool,
       shm::StatusPage& page, const EngineOptions& options);

  std::function<void(std::uint32_t session_id, const Error& error)> on_session_ended;

  // Commands: see Engine.
  void open_session(OpenSession open, const Answer& answer);
  void end_session(std::uint32_t session_id, SessionEnd why, const Answer& answer);
  void create_adapter(std::uint32_t session_id, CreateAdapter create, Answer answer);
  void delete_adapter(std::uint32_t session_id, std::uint32_t adapter_id, Answer answer);
  void join(std::uint32_t session_id, JoinJob join, Answer answer);
  void shut_down(std::function<void()> done);

  // One round of worker 0: everything that can run without waiting, and one batch. True: look again at once.
  bool round();

  // For worker 0's sleep.
  bool has_request() const;  // Some ring holds a request (S1).
  void set_sleeping(bool sleeping);
  std::uint64_t sleep_ns_max(std::uint64_t now_ns) const;  // UINT64_MAX: until something comes.
  Sleeper& sleeper() { return sleeper_; }

 private:
  // What a batch is made of: the same for all its requests.
  struct BatchKey {
    shm::Verb verb = shm::Verb::kNone;
    std::uint32_t layer = 0;
    std::uint32_t adapter_id = 0;
    bool accumulate = false;
    friend bool operator==(const BatchKey&, const BatchKey&) = default;
  };
  struct Batch {
    Job* job = nullptr;
    BatchKey key;
    std::vector<Session*> sessions;  // Ascending by rank; each one's head belongs to the batch.
    std::uint64_t num_tokens = 0;
  };
  // Joins of one job_id that ended in an error before all had asked: whoever comes later is told the same.
  struct FailedJoin {
    std::string job_id;
    std::vector<std::uint32_t> told;  // Ranks.
    Error error;
  };

  // core.cpp: from slot to reply.
  bool receive(Session& session);
  bool accept(Session& session, const shm::ReceivedRequest& received, std::uint64_t expected);
  bool advance(Session& session);
  Status prepare_head(Session& session, Pending& head);
  Status check_head(const Session& session, const Pending& head) const;
  void answer_head(Session& session, shm::Reply reply, const Error* error);
  // Answers the head with the status. An error of code kInvalidArgument is a protocol error: false, the session is
  // gone.
  bool settle(Session& session, const Status& status);
  void refuse_head(Session& session, const JobFailure& failure);
  void note_request(Session& session, const shm::Request& request, std::uint64_t now_ns) const;
  void refresh_memory();

  // alone.cpp: requests that involve nobody else.
  Status run_alone(Session& session, const Pending& head);
  Status fetch(Session& session, const shm::Request& request);
  Status read_or_write(Session& session, const shm::Request& request);
  void release(Session& session, std::uint64_t act_id);
  void drop_activations(Session& session);

  // batch.cpp: FORWARD and BACKWARD.
  BatchKey batch_key(const Session& session) const;  // Of the head; verb kNone: not for a batch.
  bool is_collective(const Session& session, const Pending& head) const;
  Batch gather(Job& job) const;
  bool run_next_batch();
  void run_batch(Batch& batch);
  void run_forward(Batch& batch);
  void run_backward(const Batch& batch);
  Status keep_activation(const Session& session, Pending& head, Activation& activation) const;

  // collective.cpp
  bool run_collectives(Job& job, std::uint64_t now_ns);
  void run_ring_collective(Job& job);
  void run_in_rank_order(Job& job);
  Status apply_collective(Job& job, const Pending& lowest, shm::Reply& reply);
  void time_out(Job& job, std::uint64_t now_ns, std::uint64_t since_ns);
  void disagree(Job& job, const std::string& collective, const Disagreement& disagreement);
  // Since when a session waits in a collective of its job; UINT64_MAX: it does not.
  std::uint64_t ring_wait_ns(const Session& session) const;     // Its head.
  std::uint64_t control_wait_ns(const Session& session) const;  // adapter_create or adapter_delete.

  // control.cpp
  Session* session_for(std::uint32_t session_id, const Answer& answer);
  void ask(Session& session, ControlRequest request);
  void run_control_collective(Job& job);
  Status apply_control(Job& job, const ControlRequest& request);
  Status create_layers(Job& job, const CreateAdapter& create);
  Status remove_adapter(Job& job, std::uint32_t adapter_id);
  void answer_control(Session& session, const nlohmann::json& body);

  // join.cpp
  bool run_joins(std::uint64_t now_ns);
  bool run_join(std::vector<Session*>& group, std::uint64_t now_ns);
  void complete_join(const std::vector<Session*>& group);
  void fail_join(const std::vector<Session*>& group, const Error& error);
  void tell_late_joiner(Session& session);
  std::uint64_t join_timeout_ns(const JoinJob& join) const;
  void leave_join(const Session& session, SessionEnd why);

  // lifecycle.cpp
  Job& new_job(std::string id, std::string name);
  void move_to_job(Session& session, Job& job, std::uint32_t rank);
  void erase_job(Job& job);
  void publish_jobs();
  void remove_session(Session& session, SessionEnd why, const Error& reason);
  void break_session(Session& session, const Error& error);  // It broke the protocol.
  void fail_job(Job& job, JobFailure failure);
  bool finish_shutdown();

  const ExpertDims& dims_;
  const kernels::KernelTable& table_;
  WorkerPool& pool_;
  const EngineOptions options_;
  ExpertCompute compute_;
  Accounting accounting_;
  Sleeper sleeper_;

  std::map<std::uint32_t, std::unique_ptr<Session>> sessions_;  // By session_id.
  std::map<std::uint64_t, std::unique_ptr<Job>> jobs_;          // By key.
  std::vector<FailedJoin> failed_joins_;
  std::uint64_t num_arrivals_ = 0;
  std::uint64_t num_jobs_made_ = 0;
  FairShare fair_share_;
  CostEstimate forward_cost_, backward_cost_;
  bool memory_changed_ = true;
  bool shutting_down_ = false;
  std::vector<std::function<void()>> on_shut_down_;
};

}  // namespace kt::coproc
