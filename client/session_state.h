// What a Session owns, and the one path every request takes:
//
//   check fork and liveness → arena block → payload written → releases that wait → slot → wait → outputs read → block
//                                                             └──────── exchange() ───────┘              freed
#pragma once
#include <sys/types.h>

#include <atomic>
#include <cstdint>
#include <initializer_list>
#include <map>
#include <mutex>
#include <nlohmann/json.hpp>
#include <optional>
#include <span>
#include <string>
#include <utility>

#include "client/activation_table.h"
#include "client/arena.h"
#include "client/connection.h"
#include "client/fork_guard.h"
#include "client/liveness.h"
#include "client/session.h"
#include "client/submission.h"
#include "client/watchdog.h"
#include "shm/payload.h"

namespace kt::client {

inline Error invalid(std::string what, std::string why, std::string fix) {
  return Error{ErrorCode::kInvalidArgument, std::move(what), std::move(why), std::move(fix)};
}

struct CopyIn {
  shm::Part part;
  const void* from;
};
struct CopyOut {
  shm::Part part;
  void* to;
};

struct Session::State {
  explicit State(Connection opened);
  ~State();

  // kUnsupported in a forked child; the session's error once it is over.
  Status check_usable() const;

  // Sends one request, whose payload lies in the arena, after the RELEASEs that wait, and waits for the reply. `layer`:
  // for messages only. `outputs`: parts of the payload, filled with NaN when the session ends meanwhile.
  Result<shm::Reply> exchange(const shm::Request& request, std::optional<std::uint32_t> layer,
                              std::span<const OutputPart> outputs);

  // exchange() of a request whose payload is copied in and out.
  Result<shm::Reply> run(const shm::Request& request, std::optional<std::uint32_t> layer, std::uint64_t payload_bytes,
                         std::initializer_list<CopyIn> inputs, std::optional<CopyOut> output = std::nullopt);

  // One control packet and its answer, however long it takes. A closed socket becomes the session's error.
  Result<nlohmann::json> control(const nlohmann::json& request);

  // Sends the RELEASEs that wait. send_: waits for slots. try_send_: what finds a slot; the rest goes back.
  Status send_releases();
  void try_send_releases();

  // The shape of an adapter tensor created in this session; an error when there is none.
  Result<shm::TensorShape> tensor_shape(std::uint32_t adapter_id, const TensorRef& ref) const;

  shm::PayloadShape payload_shape() const {
    return {connection.model.hidden_size, connection.model.top_k, connection.model.element_bytes};
  }

  const pid_t owner_pid;
  Connection connection;
  const ForkGuard fork_guard;
  Liveness liveness;
  Arena arena;
  Submission submission;
  ActivationTable activations;
  std::uint32_t chunk_tokens_max = 0;  // Tokens of the largest FORWARD that fits the arena and the daemon's limit.
  std::atomic<std::uint64_t> next_act_id = 1;
  std::atomic<std::uint64_t> steps = 0;

  std::mutex control_mutex;  // One control packet at a time: answers come in order.
  mutable std::mutex specs_mutex;
  std::map<std::pair<std::uint32_t, std::uint32_t>, AdapterSpec> specs;  // By adapter and layer.

  std::optional<Watchdog> watchdog;  // Last: its thread uses all of the above.
};

}  // namespace kt::client
