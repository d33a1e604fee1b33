// A rank for tests: the rank's end of one session, without the client library. One thread at a time.
//
//   send() claims payload space, fills it, publishes and rings; finish() waits, copies the results out and frees the
//   slot.
#pragma once
#include <cstddef>
#include <cstdint>
#include <random>
#include <string>
#include <vector>

#include "shm/base/result.h"
#include "shm/base/unique_fd.h"
#include "shm/payload.h"
#include "shm/ring.h"
#include "shm/segment.h"

namespace kt::test {

using Bytes = std::vector<std::byte>;

// The sizes a rank needs to know of the model.
struct RankShape {
  shm::PayloadShape payload;
  std::uint32_t num_layers = 0;
  std::uint32_t num_experts = 0;
};

// One forward's input, as elements of the wire.
struct Tokens {
  std::uint32_t num_tokens = 0;
  Bytes x;
  std::vector<std::int32_t> ids;
  std::vector<float> weights;
};
Tokens random_tokens(const RankShape& shape, std::uint32_t num_tokens, std::uint32_t seed);
Bytes random_elements(const RankShape& shape, std::size_t count, std::uint32_t seed);

// A STEP's arguments: one group for everything unless changed.
struct StepArgs {
  double scale = 1;
  std::vector<shm::StepGroup> groups = {{1e-3, 0.9, 0.999, 1e-8, 0.01, 1}};
  std::vector<std::uint8_t> group_of;  // Empty: all tensors in group 0.
};

struct Ticket {
  std::uint64_t sequence = 0;
  shm::Request request;
  shm::Part out_rows;   // y, dx or values, from the payload's start.
  shm::Part out_extra;  // dw.
};

// A finished request: error.code is kOk or the reply's.
struct Outcome {
  shm::Reply reply;
  Error error;
  Bytes rows;
  Bytes extra;
  bool ok() const { return error.code == ErrorCode::kOk; }
  std::vector<float> floats() const;  // rows as f32.
};

class TestRank {
 public:
  // Throws std::runtime_error when the segment cannot be attached.
  TestRank(UniqueFd segment, UniqueFd doorbell, const RankShape& shape);

  Ticket send_forward(std::uint32_t layer, std::uint32_t adapter_id, std::uint64_t act_id, const Tokens& tokens,
                      std::uint8_t flags = 0);
  Ticket send_backward(std::uint64_t act_id, const Bytes& dy, std::uint8_t flags);
  Ticket send_fetch(std::uint64_t act_id, std::uint32_t num_tokens);
  Ticket send_release(std::uint64_t act_id);
  // count: floats of the answer, or of the values.
  Ticket send_read(std::uint32_t adapter_id, shm::TensorKind kind, std::uint32_t layer, shm::AdapterTensor tensor,
                   std::uint32_t num_experts, std::size_t count);
  Ticket send_write(std::uint32_t adapter_id, shm::TensorKind kind, std::uint32_t layer, shm::AdapterTensor tensor,
                    std::uint32_t num_experts, const std::vector<float>& values);
  Ticket send_barrier(std::uint32_t adapter_id);
  Ticket send_norm(std::uint32_t adapter_id, std::vector<std::uint8_t> group_of = {});
  Ticket send_discard(std::uint32_t adapter_id);
  Ticket send_step(std::uint32_t adapter_id, std::uint64_t step, const StepArgs& args = {});
  // Any bytes: the payload is `payload` at the claimed offset, unless keep_offset.
  Ticket send_raw(shm::Request request, const Bytes& payload, bool keep_offset = false);
  // Publishes a sequence number that no client would.
  void send_sequence(std::uint64_t sequence);

  // Throws std::runtime_error when there is no reply within 30 s (the watchdog).
  Outcome finish(const Ticket& ticket);
  bool is_done(const Ticket& ticket) const { return ring_.try_reply(ticket.sequence).has_value(); }

  const shm::Segment& segment() const { return segment_; }
  const RankShape& shape() const { return shape_; }

 private:
  std::uint64_t claim(std::uint64_t bytes);
  void put(std::uint64_t offset, const void* bytes, std::size_t num_bytes);
  Ticket publish(const shm::Request& request);

  const RankShape shape_;
  const shm::Segment segment_;
  const UniqueFd doorbell_;
  shm::RankRing ring_;
  std::uint64_t next_offset_ = 0;
  std::uint64_t last_sequence_ = 0;
  std::uint32_t num_outstanding_ = 0;
};

}  // namespace kt::test
