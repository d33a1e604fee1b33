#include "tests/support/test_rank.h"

#include <algorithm>
#include <cstring>
#include <stdexcept>

#include "shm/doorbell.h"

namespace kt::test {
namespace {

constexpr std::uint64_t kWatchdogNs = 30'000'000'000;

shm::Segment attach(UniqueFd fd) {
  auto segment = shm::Segment::attach(std::move(fd));
  if (!segment.ok()) throw std::runtime_error(segment.error().text());
  return std::move(segment).value();
}

shm::Request make_request(shm::Verb verb, std::uint32_t adapter_id) {
  shm::Request request;
  request.verb = verb;
  request.adapter_id = adapter_id;
  return request;
}

std::vector<std::uint8_t> mask_or_all(std::vector<std::uint8_t> group_of, const RankShape& shape) {
  if (group_of.empty()) group_of.assign(std::size_t{shape.num_layers} * shm::kNumAdapterTensors, 0);
  return group_of;
}

}  // namespace

Bytes random_elements(const RankShape& shape, std::size_t count, std::uint32_t seed) {
  std::mt19937 random(seed);
  std::normal_distribution<float> normal;
  const std::size_t size = shape.payload.element_bytes;
  Bytes elements(count * size);
  for (std::size_t i = 0; i < count; ++i) {
    const float value = normal(random);
    // The upper half of a float is a bf16 (little endian), the whole of it an fp32 element.
    std::memcpy(elements.data() + i * size, reinterpret_cast<const std::byte*>(&value) + sizeof value - size, size);
  }
  return elements;
}

Tokens random_tokens(const RankShape& shape, std::uint32_t num_tokens, std::uint32_t seed) {
  std::mt19937 random(seed + 1);
  Tokens tokens;
  tokens.num_tokens = num_tokens;
  tokens.x = random_elements(shape, std::size_t{num_tokens} * shape.payload.hidden_size, seed);
  const std::size_t num_routes = std::size_t{num_tokens} * shape.payload.top_k;
  for (std::size_t i = 0; i < num_routes; ++i) {
    tokens.ids.push_back(std::uniform_int_distribution<std::int32_t>(0, static_cast<int>(shape.num_experts))(random));
    tokens.weights.push_back(std::uniform_real_distribution<float>(0.1f, 0.9f)(random));
  }
  return tokens;
}

std::vector<float> Outcome::floats() const {
  std::vector<float> values(rows.size() / sizeof(float));
  if (!values.empty()) std::memcpy(values.data(), rows.data(), values.size() * sizeof(float));
  return values;
}

TestRank::TestRank(UniqueFd segment, UniqueFd doorbell, const RankShape& shape)
    : shape_(shape), segment_(attach(std::move(segment))), doorbell_(std::move(doorbell)), ring_(segment_) {}

// Space is taken in a circle; tests keep less than an arena in flight.
std::uint64_t TestRank::claim(std::uint64_t bytes) {
  if (num_outstanding_ == 0 || next_offset_ + bytes > segment_.arena_bytes()) next_offset_ = 0;
  const std::uint64_t offset = next_offset_;
  next_offset_ += round_up(bytes, shm::kPayloadAlignment);
  return offset;
}

void TestRank::put(std::uint64_t offset, const void* bytes, std::size_t num_bytes) {
  if (num_bytes != 0) std::memcpy(segment_.arena() + offset, bytes, num_bytes);
}

Ticket TestRank::publish(const shm::Request& request) {
  const auto sequence = ring_.try_submit(request);
  if (!sequence) throw std::runtime_error("the test has 256 requests in flight");
  ++num_outstanding_;
  last_sequence_ = *sequence;
  shm::ring_if_sleeping(segment_, doorbell_.get());
  Ticket ticket;
  ticket.sequence = *sequence;
  ticket.request = request;
  return ticket;
}

Ticket TestRank::send_forward(std::uint32_t layer, std::uint32_t adapter_id, std::uint64_t act_id, const Tokens& tokens,
                              std::uint8_t flags) {
  const shm::ForwardPayload payload(shape_.payload, tokens.num_tokens);
  shm::Request request = make_request(shm::Verb::kForward, adapter_id);
  request.flags = flags;
  request.layer = static_cast<std::uint16_t>(layer);
  request.act_id = act_id;
  request.num_tokens = tokens.num_tokens;
  request.payload_offset = claim(payload.bytes);
  put(request.payload_offset + payload.x.offset, tokens.x.data(), tokens.x.size());
  put(request.payload_offset + payload.ids.offset, tokens.ids.data(), tokens.ids.size() * 4);
  put(request.payload_offset + payload.weights.offset, tokens.weights.data(), tokens.weights.size() * 4);
  Ticket ticket = publish(request);
  ticket.out_rows = payload.y;
  return ticket;
}

Ticket TestRank::send_backward(std::uint64_t act_id, const Bytes& dy, std::uint8_t flags) {
  shm::Request request = make_request(shm::Verb::kBackward, 0);
  request.num_tokens =
      static_cast<std::uint32_t>(dy.size() / shape_.payload.element_bytes / shape_.payload.hidden_size);
  const shm::BackwardPayload payload(shape_.payload, request.num_tokens);
  request.flags = flags;
  request.act_id = act_id;
  request.payload_offset = claim(payload.bytes);
  put(request.payload_offset + payload.dy.offset, dy.data(), dy.size());
  Ticket ticket = publish(request);
  ticket.out_rows = payload.dx;
  ticket.out_extra = payload.dw;
  return ticket;
}

Ticket TestRank::send_fetch(std::uint64_t act_id, std::uint32_t num_tokens) {
  const shm::FetchPayload payload(shape_.payload, num_tokens);
  shm::Request request = make_request(shm::Verb::kFetch, 0);
  request.act_id = act_id;
  request.num_tokens = num_tokens;
  request.payload_offset = claim(payload.bytes);
  Ticket ticket = publish(request);
  ticket.out_rows = payload.y;
  return ticket;
}

Ticket TestRank::send_release(std::uint64_t act_id) {
  shm::Request request = make_request(shm::Verb::kRelease, 0);
  request.act_id = act_id;
  return publish(request);
}

Ticket TestRank::send_read(std::uint32_t adapter_id, shm::TensorKind kind, std::uint32_t layer,
                           shm::AdapterTensor tensor, std::uint32_t num_experts, std::size_t count) {
  shm::Request request = make_request(shm::Verb::kRead, adapter_id);
  request.kind = kind;
  request.layer = static_cast<std::uint16_t>(layer);
  request.tensor = tensor;
  request.num_experts = num_experts;
  request.payload_offset = claim(count * sizeof(float));
  Ticket ticket = publish(request);
  ticket.out_rows = {0, count * sizeof(float)};
  return ticket;
}

Ticket TestRank::send_write(std::uint32_t adapter_id, shm::TensorKind kind, std::uint32_t layer,
                            shm::AdapterTensor tensor, std::uint32_t num_experts, const std::vector<float>& values) {
  shm::Request request = make_request(shm::Verb::kWrite, adapter_id);
  request.kind = kind;
  request.layer = static_cast<std::uint16_t>(layer);
  request.tensor = tensor;
  request.num_experts = num_experts;
  request.payload_offset = claim(values.size() * sizeof(float));
  put(request.payload_offset, values.data(), values.size() * sizeof(float));
  return publish(request);
}

Ticket TestRank::send_barrier(std::uint32_t adapter_id) {
  return publish(make_request(shm::Verb::kBarrier, adapter_id));
}

Ticket TestRank::send_norm(std::uint32_t adapter_id, std::vector<std::uint8_t> group_of) {
  group_of = mask_or_all(std::move(group_of), shape_);
  shm::Request request = make_request(shm::Verb::kNorm, adapter_id);
  request.payload_offset = claim(shm::NormPayload(shape_.num_layers).bytes);
  put(request.payload_offset, group_of.data(), group_of.size());
  return publish(request);
}

Ticket TestRank::send_discard(std::uint32_t adapter_id) {
  return publish(make_request(shm::Verb::kDiscard, adapter_id));
}

Ticket TestRank::send_step(std::uint32_t adapter_id, std::uint64_t step, const StepArgs& args) {
  const shm::StepPayload payload(shape_.num_layers);
  shm::StepHeader header{};
  header.scale = args.scale;
  header.num_groups = args.groups.size();
  std::copy(args.groups.begin(), args.groups.end(), std::begin(header.groups));
  const std::vector<std::uint8_t> group_of = mask_or_all(args.group_of, shape_);
  shm::Request request = make_request(shm::Verb::kStep, adapter_id);
  request.step = step;
  request.payload_offset = claim(payload.bytes);
  put(request.payload_offset + payload.header.offset, &header, sizeof header);
  put(request.payload_offset + payload.group_of.offset, group_of.data(), group_of.size());
  return publish(request);
}

Ticket TestRank::send_raw(shm::Request request, const Bytes& payload, bool keep_offset) {
  if (!keep_offset) {
    request.payload_offset = claim(payload.size());
    put(request.payload_offset, payload.data(), payload.size());
  }
  return publish(request);
}

void TestRank::send_sequence(std::uint64_t sequence) {
  const auto index = static_cast<std::uint32_t>(last_sequence_ % shm::kNumSlots);  // The slot that is next.
  segment_.slot(index).request.sequence.store(sequence, std::memory_order_seq_cst);
  shm::ring_if_sleeping(segment_, doorbell_.get());
}

Outcome TestRank::finish(const Ticket& ticket) {
  if (!ring_.wait_done(ticket.sequence, 20'000, kWatchdogNs)) {
    throw std::runtime_error(std::string("watchdog: no reply to ") + shm::verb_name(ticket.request.verb) +
                             " within 30 s");
  }
  Outcome outcome;
  outcome.reply = *ring_.try_reply(ticket.sequence);
  if (outcome.reply.code != 0) {
    outcome.error = shm::error_from_reply(outcome.reply, ring_.message(ticket.sequence, outcome.reply));
  } else {
    const std::byte* const base = segment_.arena() + ticket.request.payload_offset;
    outcome.rows.assign(base + ticket.out_rows.offset, base + ticket.out_rows.offset + ticket.out_rows.bytes);
    outcome.extra.assign(base + ticket.out_extra.offset, base + ticket.out_extra.offset + ticket.out_extra.bytes);
  }
  ring_.consume(ticket.sequence);
  --num_outstanding_;
  return outcome;
}

}  // namespace kt::test
