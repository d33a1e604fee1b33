// A rank's connection to the daemon: control socket, segment, ring, arena, watchdog. No torch, no Python.
//
// All methods are thread-safe. Blocking ones hold no lock while they wait; the Python binding releases the GIL around
// them. Once the daemon is dead every call returns kCoprocDied; after a fork the child's calls return kUnsupported.
#pragma once
#include <cstdint>
#include <memory>
#include <nlohmann/json.hpp>
#include <span>
#include <string>
#include <vector>

#include "client/claim.h"
#include "shm/base/result.h"
#include "shm/model_card.h"
#include "shm/protocol.h"
#include "shm/tensor_shape.h"

namespace kt::client {

struct ConnectOptions {
  std::string address = "auto";  // "auto", "unix:/path" (KT_COPROC's values).
  std::string fingerprint;       // "" = whatever the daemon serves.
  std::string name;              // KT_COPROC_JOB.
  std::uint64_t arena_bytes = shm::kArenaBytesDefault;
};

// The model, and how its daemon serves it.
struct ModelInfo : shm::ModelCard {
  std::string daemon_id;
  std::uint32_t daemon_pid = 0;
  std::uint32_t element_bytes = 2;
};

struct AdapterSpec {
  std::vector<std::uint32_t> layers;
  shm::HalfSpec gate_up;
  bool shared_a = false;
  shm::HalfSpec down;
};
struct JoinSpec {
  std::string job_id, name;
  std::uint32_t rank = 0, world_size = 1;
  std::vector<std::uint32_t> members;
  double timeout_seconds = 0;
};

struct TensorRef {
  shm::TensorKind kind = shm::TensorKind::kParam;
  std::uint32_t layer = 0;
  shm::AdapterTensor tensor = shm::AdapterTensor::kGateA;
  std::uint32_t first_expert = 0;
  std::uint32_t num_experts = 0;
};

class Session {
 public:
  static Result<std::unique_ptr<Session>> connect(const ConnectOptions& options);
  ~Session();  // bye.

  const ModelInfo& model() const;

  // Control.
  Status create_adapter(std::uint32_t adapter_id, const AdapterSpec& spec);
  Status delete_adapter(std::uint32_t adapter_id);
  Result<std::uint64_t> join(const JoinSpec& spec);  // -> step

  // Room for one experts call, whose tensors the caller writes and reads in the arena itself: see claim.h. Waits while
  // other claims fill the arena. Refuses an unknown layer or activation, and flags the verb does not have.
  std::uint64_t new_act_id();
  Result<Claim> claim(const ForwardCall& call);
  Result<Claim> claim(const BackwardCall& call);
  Result<Claim> claim(const FetchCall& call);
  // Never blocks on the daemon and may run on any thread, also in a destructor: queued, sent before the next request.
  void release(std::uint64_t act_id);

  // Adapter tensors: f32[num_experts, rows, cols]; count = number of floats of `values`. Split to fit the arena.
  Status read(std::uint32_t adapter_id, const TensorRef& ref, std::span<float> values);
  Status write(std::uint32_t adapter_id, const TensorRef& ref, std::span<const float> values);

  // Collectives of the job. group_of: u8[num_layers][6] (kFrozen = leave out).
  Status barrier(std::uint32_t adapter_id);
  Result<double> squared_norm(std::uint32_t adapter_id, std::span<const std::uint8_t> group_of);
  Status discard(std::uint32_t adapter_id);
  Status step(std::uint32_t adapter_id, double scale, std::span<const shm::StepGroup> groups,
              std::span<const std::uint8_t> group_of);
  std::uint64_t steps() const;  // STEPs of this job that completed, as this rank saw them.

  // The object of `kt-coproc status --json`, read from the status page.
  nlohmann::json stats() const;
  bool daemon_alive() const;

 private:
  friend class Claim;
  struct State;
  explicit Session(std::unique_ptr<State> state);
  std::unique_ptr<State> state_;
};

}  // namespace kt::client
