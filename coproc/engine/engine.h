// The engine: every session, job, adapter and activation of the daemon, owned by one thread (worker 0).
//
// Worker 0 loops: take commands → receive requests of every session (copy, validate) → run what may run (scheduler) →
// compute a batch with the worker pool → reply. Nothing else touches the state, so there are no locks in it. Other
// threads post commands; they take effect between batches.
#pragma once
#include <cstdint>
#include <functional>
#include <memory>
#include <nlohmann/json.hpp>
#include <string>
#include <vector>

#include "coproc/experts/adapter.h"
#include "coproc/experts/dims.h"
#include "coproc/experts/expert_layer.h"
#include "shm/base/unique_fd.h"
#include "shm/segment.h"
#include "shm/status_page.h"

namespace kt::coproc {

struct EngineOptions {
  bool deterministic = false;  // Accumulating BACKWARDs of a layer run as a collective, in rank order.
  std::uint32_t batch_tokens_max = 16384;
  std::uint64_t activation_bytes_max = 0;                 // Of all jobs together, shared equally by jobs.
  std::uint64_t collective_timeout_ns = 600'000'000'000;  // For jobs that named none in join: 10 min.
};

struct OpenSession {
  std::uint32_t session_id = 0;
  std::uint32_t pid = 0;  // For display and messages only.
  std::string name;       // KT_COPROC_JOB or "".
  shm::Segment segment;
  UniqueFd doorbell;
};
struct CreateAdapter {
  std::uint32_t adapter_id = 0;
  std::vector<std::uint32_t> layers;
  AdapterLayerSpec spec;
};
struct JoinJob {
  std::string job_id;
  std::string name;
  std::uint32_t rank = 0;
  std::uint32_t world_size = 0;
  std::vector<std::uint32_t> members;
  double timeout_seconds = 0;  // 0: the default.
};
enum class SessionEnd { kBye, kDied, kProtocolError };

class Engine {
 public:
  // The answer to a command: a control reply body ({"ok":true,…} or an error_reply). Called on worker 0's thread; must
  // not block. Answers of a session that ended meanwhile are not given.
  using Answer = std::function<void(nlohmann::json)>;

  Engine(const ExpertDims& dims, const kernels::KernelTable& table, const ExpertWeights& weights, WorkerPool& pool,
         shm::StatusPage& page, EngineOptions options);
  ~Engine();

  // Called on worker 0's thread when a session broke the protocol: the server closes its socket.
  void set_on_session_ended(std::function<void(std::uint32_t session_id, const Error& error)> callback);

  // Worker 0's loop. Returns after stop().
  void run();

  // Commands, from any thread.
  void open_session(OpenSession session, Answer answer);
  void end_session(std::uint32_t session_id, SessionEnd why, Answer answer);
  void create_adapter(std::uint32_t session_id, CreateAdapter create, Answer answer);
  void delete_adapter(std::uint32_t session_id, std::uint32_t adapter_id, Answer answer);
  void join(std::uint32_t session_id, JoinJob join, Answer answer);
  // Requests received so far complete; collectives that cannot and later requests are answered with kCoprocDied naming
  // the shutdown; every segment's state becomes kShuttingDown. `done` is called when nothing is in flight any more.
  void shut_down(std::function<void()> done);
  void stop();

 private:
  struct State;
  std::unique_ptr<State> state_;
};

}  // namespace kt::coproc
