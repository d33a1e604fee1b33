#include "tests/client/fake_daemon.h"

#include <poll.h>
#include <sys/eventfd.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <sys/un.h>

#include <algorithm>
#include <cstring>

#include "shm/base/result.h"
#include "shm/control.h"

namespace kt::client::testing {

using nlohmann::json;

FakeDaemon::FakeDaemon(FakeModel model, std::uint32_t adapter_r)
    : model_(model), adapter_r_(adapter_r), socket_path_(directory_.file("kt.sock")), wake_(::eventfd(0, EFD_CLOEXEC)) {
  listener_ = UniqueFd(::socket(AF_UNIX, SOCK_SEQPACKET | SOCK_CLOEXEC, 0));
  sockaddr_un address{};
  address.sun_family = AF_UNIX;
  std::strncpy(address.sun_path, socket_path_.c_str(), sizeof address.sun_path - 1);
  KT_CHECK(::bind(listener_.get(), reinterpret_cast<sockaddr*>(&address), sizeof address) == 0);
  KT_CHECK(::chmod(socket_path_.c_str(), 0600) == 0 && ::listen(listener_.get(), 4) == 0);
  auto status = shm::StatusPageOwner::create();
  KT_CHECK(status.ok());
  status_.emplace(std::move(status).value());
  thread_ = std::thread([this] { serve(); });
}

FakeDaemon::~FakeDaemon() {
  {
    const std::lock_guard lock(mutex_);
    stop_ = true;
  }
  KT_CHECK(::eventfd_write(wake_.get(), 1) == 0);
  thread_.join();
}

void FakeDaemon::answer_next(json answer) {
  const std::lock_guard lock(mutex_);
  next_answers_.push_back(std::move(answer));
}

json FakeDaemon::hello() const {
  const std::lock_guard lock(mutex_);
  return hello_;
}

std::vector<shm::Request> FakeDaemon::requests() const {
  const std::lock_guard lock(mutex_);
  return requests_;
}

std::size_t FakeDaemon::num_live_activations() const {
  const std::lock_guard lock(mutex_);
  return activations_.size();
}

void FakeDaemon::hold(bool held) {
  {
    const std::lock_guard lock(mutex_);
    held_ = held;
  }
  KT_CHECK(::eventfd_write(wake_.get(), 1) == 0);
}

void FakeDaemon::refuse_next(Error error, std::uint32_t num_others) {
  const std::lock_guard lock(mutex_);
  num_before_refusal_ = num_others;
  refuse_next_ = std::move(error);
}

void FakeDaemon::hang_up() {
  {
    const std::lock_guard lock(mutex_);
    hang_up_ = true;
  }
  KT_CHECK(::eventfd_write(wake_.get(), 1) == 0);
}

// Sleeps as the real daemon does (doorbell.h): sets the flag, looks again, polls.
void FakeDaemon::serve() {
  for (;;) {
    {
      const std::lock_guard lock(mutex_);
      if (stop_) return;
      if (hang_up_) socket_.reset();
    }
    if (ring_) take_requests();
    if (ring_) shm::set_sleeping(*segment_, true);
    const bool sleep = !ring_ || !ring_->has_request();
    pollfd watched[] = {{socket_.valid() ? socket_.get() : listener_.get(), POLLIN, 0},
                        {doorbell_.get(), POLLIN, 0},
                        {wake_.get(), POLLIN, 0}};
    const bool is_over = ring_ && !socket_.valid();
    if (is_over) watched[0].fd = -1;
    ::poll(watched, 3, sleep ? -1 : 0);
    if (ring_) shm::set_sleeping(*segment_, false);
    if (watched[1].revents != 0) shm::clear_doorbell(doorbell_.get());
    if (watched[2].revents != 0) {
      eventfd_t ignored = 0;
      ::eventfd_read(wake_.get(), &ignored);
    }
    if (watched[0].revents == 0) continue;
    if (socket_.valid()) {
      answer_control();
    } else {
      socket_ = UniqueFd(::accept4(listener_.get(), nullptr, nullptr, SOCK_CLOEXEC));
    }
  }
}

json FakeDaemon::hello_reply() const {
  std::vector<std::uint32_t> layers(model_.num_layers);
  for (std::uint32_t i = 0; i < model_.num_layers; ++i) layers[i] = i;
  return {{"ok", true},
          {"session_id", 1},
          {"daemon_id", "fake"},
          {"daemon_pid", ::getpid()},
          {"element_bytes", 4},
          {"model", shm::to_json({.path = "/models/fake",
                                  .architecture = "FakeMoe",
                                  .fingerprint = "abc",
                                  .weight_format = "fp32",
                                  .num_layers = model_.num_layers,
                                  .num_experts = model_.num_experts,
                                  .top_k = model_.top_k,
                                  .hidden_size = model_.hidden_size,
                                  .intermediate_size = model_.intermediate_size,
                                  .moe_layers = layers,
                                  .activation = {}})},
          {"limits", {{"batch_tokens_max", model_.batch_tokens_max}, {"activation_bytes_max", 1 << 20}}},
          {"deterministic", false}};
}

void FakeDaemon::answer_control() {
  auto packet = shm::receive_packet(socket_.get(), std::chrono::milliseconds(0));
  if (!packet.ok()) {
    client_left_ = true;
    socket_.reset();
    return;
  }
  const json& body = packet.value().body;
  const bool is_hello = body.at("op") == "hello";
  if (is_hello && hang_up_at_hello_) {
    socket_.reset();
    return;
  }
  json answer = is_hello ? hello_reply() : json{{"ok", true}, {"step", 7}};
  {
    const std::lock_guard lock(mutex_);
    if (is_hello) hello_ = body;
    if (!next_answers_.empty()) {
      answer = next_answers_.front();
      next_answers_.pop_front();
    }
  }
  if (!is_hello || !answer.at("ok").get<bool>()) {
    static_cast<void>(shm::send_packet(socket_.get(), answer).ok());
    return;
  }
  auto segment = shm::Segment::create(1, body.at("arena_bytes").get<std::uint64_t>());
  auto doorbell = shm::create_doorbell();
  KT_CHECK(segment.ok() && doorbell.ok());
  segment_.emplace(std::move(segment).value());
  doorbell_ = std::move(doorbell).value();
  ring_.emplace(*segment_);
  static_cast<void>(shm::send_packet(socket_.get(), answer, {segment_->fd(), status_->fd(), doorbell_.get()}).ok());
}

void FakeDaemon::take_requests() {
  while (auto received = ring_->try_receive()) {
    const std::lock_guard lock(mutex_);
    requests_.push_back(received->request);
    unanswered_.push_back(*received);
  }
  while (!unanswered_.empty()) {
    {
      const std::lock_guard lock(mutex_);
      if (held_) return;
    }
    answer(unanswered_.front());
    unanswered_.pop_front();
  }
}

void FakeDaemon::answer(const shm::ReceivedRequest& received) {
  shm::Reply reply;
  std::optional<Error> error;
  {
    const std::lock_guard lock(mutex_);
    const bool may_refuse = refuse_next_ && received.request.verb != shm::Verb::kRelease;
    if (may_refuse && num_before_refusal_-- == 0) std::swap(error, refuse_next_);
    if (!error) error = perform(received.request, reply);
  }
  ring_->reply(received.sequence, reply, error ? &*error : nullptr);
}

float* FakeDaemon::floats(const shm::Request& request, const shm::Part& part) const {
  return reinterpret_cast<float*>(segment_->arena() + request.payload_offset + part.offset);
}

std::optional<Error> FakeDaemon::perform(const shm::Request& request, shm::Reply& reply) {
  switch (request.verb) {
    case shm::Verb::kForward:
      return forward(request);
    case shm::Verb::kBackward:
      return backward(request);
    case shm::Verb::kRelease:
      activations_.erase(request.act_id);
      break;
    case shm::Verb::kFetch: {
      const Kept& kept = activations_.at(request.act_id);
      std::copy(kept.y.begin(), kept.y.end(), floats(request, shm::FetchPayload(shape(), request.num_tokens).y));
      break;
    }
    case shm::Verb::kRead:
    case shm::Verb::kWrite:
      read_or_write(request);
      break;
    case shm::Verb::kNorm: {
      const auto* const groups = reinterpret_cast<const std::uint8_t*>(segment_->arena() + request.payload_offset);
      const std::size_t count = std::size_t{model_.num_layers} * shm::kNumAdapterTensors;
      reply.value = static_cast<double>(
          std::count_if(groups, groups + count, [](std::uint8_t group) { return group != shm::kFrozen; }));
      break;
    }
    default:
      break;
  }
  return std::nullopt;
}

std::optional<Error> FakeDaemon::forward(const shm::Request& request) {
  const shm::ForwardPayload payload(shape(), request.num_tokens);
  const std::size_t hidden = model_.hidden_size;
  const float* const x = floats(request, payload.x);
  const float* const weights = floats(request, payload.weights);
  const auto* const first_id = reinterpret_cast<const std::int32_t*>(floats(request, payload.ids));
  Kept kept;
  kept.num_tokens = request.num_tokens;
  kept.ids.assign(first_id, first_id + std::size_t{request.num_tokens} * model_.top_k);
  for (const std::int32_t id : kept.ids) KT_CHECK(id >= 0 && id <= static_cast<std::int32_t>(model_.num_experts));
  float* const y = floats(request, payload.y);
  for (std::size_t token = 0; token < request.num_tokens; ++token) {
    float sum = 0;
    for (std::size_t j = token * model_.top_k; j < (token + 1) * model_.top_k; ++j) {
      sum += weights[j] * static_cast<float>(kept.ids[j] + 1);
    }
    for (std::size_t h = token * hidden; h < (token + 1) * hidden; ++h) y[h] = x[h] + sum;
  }
  if ((request.flags & shm::kKeepY) != 0) kept.y.assign(y, y + request.num_tokens * hidden);
  if (request.act_id != 0) KT_CHECK(activations_.emplace(request.act_id, std::move(kept)).second);
  return std::nullopt;
}

std::optional<Error> FakeDaemon::backward(const shm::Request& request) {
  const auto found = activations_.find(request.act_id);
  if (found == activations_.end()) return Error{ErrorCode::kNotFound, "no such activation", "gone", "keep it"};
  KT_CHECK(found->second.num_tokens == request.num_tokens);
  const shm::BackwardPayload payload(shape(), request.num_tokens);
  const float* const dy = floats(request, payload.dy);
  float* const dx = floats(request, payload.dx);
  float* const dw = floats(request, payload.dw);
  for (std::size_t i = 0; i < std::size_t{request.num_tokens} * model_.hidden_size; ++i) dx[i] = 2 * dy[i];
  for (std::size_t i = 0; i < std::size_t{request.num_tokens} * model_.top_k; ++i) {
    dw[i] = dy[i / model_.top_k * model_.hidden_size] + static_cast<float>(found->second.ids[i]);
  }
  if ((request.flags & shm::kKeep) == 0) activations_.erase(found);
  return std::nullopt;
}

void FakeDaemon::read_or_write(const shm::Request& request) {
  const bool is_a = request.tensor == shm::AdapterTensor::kGateA || request.tensor == shm::AdapterTensor::kUpA;
  const std::uint64_t width =
      is_a || request.tensor == shm::AdapterTensor::kDownB ? model_.hidden_size : model_.intermediate_size;
  const std::uint64_t elements = request.kind == shm::TensorKind::kT ? 1 : width * adapter_r_;
  const shm::TensorShape shape{static_cast<std::int64_t>(elements), 1};
  float* value = floats(request, shm::TensorPayload(request.kind, request.num_experts, shape).values);
  for (std::uint32_t expert = request.first_expert; expert < request.first_expert + request.num_experts; ++expert) {
    std::vector<float>& values = values_[expert];
    values.resize(elements);
    if (request.verb == shm::Verb::kWrite) {
      std::copy_n(value, elements, values.begin());
    } else {
      std::copy_n(values.begin(), elements, value);
    }
    value += elements;
  }
}

}  // namespace kt::client::testing
