// The commands that other threads send to the engine, and the types in which it answers them.
//
// Values that are wrong in themselves never come here: the sender has checked them (coproc/daemon/control_requests.h).
// The engine refuses what does not fit the state: an unknown adapter, ranks that disagree, a failed job.
#pragma once
#include <cstdint>
#include <string>
#include <variant>
#include <vector>

#include "coproc/experts/adapter.h"
#include "shm/base/result.h"
#include "shm/base/unique_fd.h"
#include "shm/base/unique_function.h"
#include "shm/segment.h"

namespace kt::coproc {

struct OpenSession {
  std::uint32_t session_id = 0;
  std::uint32_t pid = 0;  // For display and messages only.
  std::string name;       // KT_COPROC_JOB or "".
  shm::Segment segment;
  UniqueFd doorbell;
};

enum class SessionEnd { kBye, kDied, kProtocolError };

struct CreateAdapter {
  std::uint32_t adapter_id = 0;
  std::vector<std::uint32_t> layers;  // Ascending, each once.
  AdapterLayerSpec spec;
};
struct DeleteAdapter {
  std::uint32_t adapter_id = 0;
};
using AdapterCommand = std::variant<CreateAdapter, DeleteAdapter>;

struct JoinJob {
  std::string job_id;
  std::string name;
  std::uint32_t rank = 0;
  std::uint32_t world_size = 0;
  std::vector<std::uint32_t> members;  // Ascending, each once; `rank` is one of them.
  double timeout_seconds = 0;          // 0: the default.
};
struct JoinAnswer {
  std::uint64_t step = 0;  // STEPs that the job has completed.
};

// Called on worker 0's thread; must not block. A command of a session that ended meanwhile is not answered.
using OnDone = UniqueFunction<void(Status)>;
using OnJoined = UniqueFunction<void(Result<JoinAnswer>)>;
using OnEnded = UniqueFunction<void()>;

}  // namespace kt::coproc
