#include "client/session_state.h"

#include <sys/socket.h>
#include <unistd.h>

#include <chrono>
#include <cstring>
#include <thread>

#include "shm/control.h"

namespace kt::client {
namespace {

// The most tokens (≤ tokens_max) whose FORWARD payload has at most bytes_max bytes. BACKWARD and FETCH of as many
// tokens need less.
std::uint32_t tokens_that_fit(const shm::PayloadShape& shape, std::uint64_t bytes_max, std::uint32_t tokens_max) {
  std::uint32_t fits = 0;
  std::uint32_t end = tokens_max;
  while (fits < end) {
    const std::uint32_t middle = fits + (end - fits + 1) / 2;
    if (shm::ForwardPayload(shape, middle).bytes <= bytes_max) {
      fits = middle;
    } else {
      end = middle - 1;
    }
  }
  return fits;
}

shm::Request release_request(std::uint64_t act_id) {
  shm::Request request;
  request.verb = shm::Verb::kRelease;
  request.act_id = act_id;
  return request;
}

}  // namespace

Session::State::State(Connection opened)
    : owner_pid(::getpid()),
      connection(std::move(opened)),
      fork_guard(connection.socket.get()),
      liveness(connection.model.daemon_pid, connection.model.path),
      arena(connection.segment.arena(), connection.segment.arena_bytes()),
      submission(connection.segment, connection.doorbell.get(), liveness) {
  chunk_tokens_max = tokens_that_fit(payload_shape(), arena.block_bytes_max(), connection.batch_tokens_max);
  watchdog.emplace(connection.socket.get(), connection.pidfd.get(), connection.segment, liveness,
                   Watchdog::Hooks{.tick = [this] { try_send_releases(); },
                                   .end =
                                       [this] {
                                         submission.close();
                                         arena.close();
                                         // Releases whoever waits for a control answer, also when a process that the
                                         // daemon left behind keeps the other end open.
                                         ::shutdown(connection.socket.get(), SHUT_RDWR);
                                       }});
}

Session::State::~State() { watchdog.reset(); }

Status Session::State::check_usable() const {
  if (::getpid() != owner_pid) {
    return Error{ErrorCode::kUnsupported,
                 "process " + std::to_string(::getpid()) + " uses the session of process " + std::to_string(owner_pid),
                 "it was forked after connect: a ring has one owner",
                 "connect in the child itself, or start it with spawn instead of fork"};
  }
  if (const End end = liveness.end(); end != End::kNone) return liveness.error(end);
  return ok_status();
}

Result<shm::Reply> Session::State::exchange(const shm::Request& request, std::optional<std::uint32_t> layer,
                                            std::span<const OutputPart> outputs) {
  KT_TRY_STATUS(send_releases());
  liveness.note_request(request.verb, layer, steps.load());
  KT_TRY(const std::uint64_t sequence, submission.submit(request, outputs));
  return submission.finish(sequence);
}

Result<shm::Reply> Session::State::run(const shm::Request& request, std::optional<std::uint32_t> layer,
                                       std::uint64_t payload_bytes, std::initializer_list<CopyIn> inputs,
                                       std::optional<CopyOut> output) {
  KT_TRY_STATUS(check_usable());
  auto block = arena.wait_allocate(payload_bytes);
  if (!block) return liveness.error(liveness.end());
  for (const auto& [part, from] : inputs) {
    if (part.bytes != 0) std::memcpy(block->data() + part.offset, from, part.bytes);
  }
  shm::Request placed = request;
  placed.payload_offset = block->offset();
  if (!output) return exchange(placed, layer, {});
  const OutputPart source{block->data() + output->part.offset, output->part.bytes};
  auto reply = exchange(placed, layer, {&source, 1});
  const OutputPart target{static_cast<std::byte*>(output->to), source.bytes};
  if (reply.ok()) std::memcpy(target.data, source.data, source.bytes);
  if (!reply.ok() && liveness.end() != End::kNone) poison({&target, 1});
  return reply;
}

Result<nlohmann::json> Session::State::control(const nlohmann::json& request) {
  KT_TRY_STATUS(check_usable());
  const std::lock_guard lock(control_mutex);
  auto answer = shm::call(connection.socket.get(), request, std::chrono::milliseconds(-1));
  if (answer.ok()) return std::move(answer).value().body;
  const bool closed = hung_up(connection.socket.get());
  if (!closed) return std::move(answer).error();
  // The watchdog finds out why. It needs its grace for a daemon that lives, and more only if this machine is stuck.
  for (int i = 0; i < 100 && liveness.end() == End::kNone; ++i) {
    std::this_thread::sleep_for(std::chrono::milliseconds(20));
  }
  const End end = liveness.end();
  if (end == End::kNone) return std::move(answer).error();
  return liveness.error(end);
}

Status Session::State::send_releases() {
  const ActivationTable::Map released = activations.take_released();
  for (const auto& [act_id, activation] : released) {
    for (const ActivationChunk& chunk : activation.chunks) {
      KT_TRY_STATUS(submission.post(release_request(chunk.act_id)));
    }
  }
  return ok_status();
}

void Session::State::try_send_releases() {
  ActivationTable::Map released = activations.take_released();
  while (!released.empty()) {
    auto& chunks = released.begin()->second.chunks;
    while (!chunks.empty() && submission.try_post(release_request(chunks.back().act_id))) chunks.pop_back();
    if (!chunks.empty()) break;
    released.erase(released.begin());
  }
  activations.give_back(std::move(released));
}

Result<shm::TensorShape> Session::State::tensor_shape(std::uint32_t adapter_id, const TensorRef& ref) const {
  const std::string name = "tensor " + std::to_string(static_cast<unsigned>(ref.tensor)) + " of adapter " +
                           std::to_string(adapter_id) + ", layer " + std::to_string(ref.layer);
  const std::lock_guard lock(specs_mutex);
  const auto found = specs.find({adapter_id, ref.layer});
  if (found == specs.end()) {
    return Error{ErrorCode::kNotFound, name + " does not exist", "this session created no such adapter on that layer",
                 "call create_adapter with that layer first"};
  }
  const AdapterSpec& spec = found->second;
  const shm::TensorShape shape = shm::tensor_shape(
      {connection.model.hidden_size, connection.model.intermediate_size, spec.gate_up.r, spec.shared_a, spec.down.r},
      ref.tensor);
  if (shape.size() != 0) return shape;
  return Error{ErrorCode::kNotFound, name + " does not exist",
               "the adapter has gate_up r = " + std::to_string(spec.gate_up.r) +
                   (spec.shared_a ? " with one A for gate and up" : "") + ", down r = " + std::to_string(spec.down.r),
               "ask only for the tensors that its spec has"};
}

}  // namespace kt::client
