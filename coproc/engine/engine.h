// The engine: every session, job, adapter and activation of the daemon, owned by one thread (worker 0).
//
// Worker 0 loops: take commands → receive requests of every session (copy, validate) → run what may run → compute a
// batch with the worker pool → reply. Nothing else touches the state, so there are no locks in it. Other threads post
// commands; they take effect between batches.
#pragma once
#include <cstdint>
#include <functional>
#include <memory>

#include "coproc/engine/commands.h"
#include "coproc/experts/dims.h"
#include "coproc/experts/expert_compute.h"
#include "shm/base/result.h"
#include "shm/status_page.h"

namespace kt::coproc {

struct EngineOptions {
  bool deterministic = false;  // Accumulating BACKWARDs of a layer run as a collective, in rank order.
  std::uint32_t batch_tokens_max = 16384;
  std::uint64_t activation_bytes_max = 0;                 // Of all jobs together, shared equally by jobs.
  std::uint64_t collective_timeout_ns = 600'000'000'000;  // For jobs that named none in join: 10 min.
};

class Engine {
 public:
  Engine(const ExpertDims& dims, const kernels::KernelTable& table, const ExpertWeights& weights, WorkerPool& pool,
         shm::StatusPage& page, EngineOptions options);
  ~Engine();

  // Called on worker 0's thread when a session broke the protocol: the server closes its socket.
  void set_on_session_ended(std::function<void(std::uint32_t session_id, const Error& error)> callback);

  // Worker 0's loop. Returns after stop().
  void run();

  // Commands, from any thread (commands.h says what may be in them and how they are answered).
  void open_session(OpenSession session, OnDone answer);
  void end_session(std::uint32_t session_id, SessionEnd why, OnEnded answer);
  void create_adapter(std::uint32_t session_id, CreateAdapter create, OnDone answer);
  void delete_adapter(std::uint32_t session_id, std::uint32_t adapter_id, OnDone answer);
  void join(std::uint32_t session_id, JoinJob join, OnJoined answer);
  // Requests received so far complete; collectives that cannot and later requests are answered with kCoprocDied naming
  // the shutdown; every segment's state becomes kShuttingDown. `done` is called when nothing is in flight any more.
  void shut_down(OnEnded done);
  void stop();

 private:
  struct State;
  std::unique_ptr<State> state_;
};

}  // namespace kt::coproc
