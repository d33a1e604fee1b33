#include "tests/coproc/engine/engine_fixture.h"

#include <algorithm>
#include <chrono>
#include <cmath>
#include <cstring>
#include <random>
#include <stdexcept>

#include "shm/doorbell.h"

namespace kt::test {
namespace {

constexpr auto kWatchdog = std::chrono::seconds(30);
constexpr std::uint32_t kNobody = 0xffff'ffff;  // A session id that no test reaches.

std::pair<coproc::OnJoined, Host::Call> join_slot() {
  std::promise<Host::Answer> promise;
  Host::Call future = promise.get_future();
  return {[promise = std::move(promise)](Host::Answer answer) mutable { promise.set_value(std::move(answer)); },
          std::move(future)};
}

std::pair<coproc::OnDone, Host::Call> answer_slot() {
  auto [answer, call] = join_slot();
  return {[answer = std::move(answer)](const Status& status) mutable {
            answer(status.ok() ? Host::Answer(coproc::JoinAnswer{}) : Host::Answer(status.error()));
          },
          std::move(call)};
}

void wait(std::future<void> future, const char* what) {
  if (future.wait_for(kWatchdog) != std::future_status::ready) throw std::runtime_error(what);
}

}  // namespace

ExpertDims small_model(std::uint32_t element_bytes) {
  ExpertDims dims;
  dims.num_layers = 4;
  dims.moe_layers = kMoeLayers;
  dims.num_experts = 4;
  dims.top_k = 2;
  dims.hidden_size = 64;
  dims.intermediate_size = 32;
  dims.element_bytes = element_bytes;
  return dims;
}

const kernels::KernelTable& scalar_table(std::uint32_t element_bytes) {
  std::string why;
  const auto* table = kernels::find_table("scalar", element_bytes, &why);
  if (table == nullptr) throw std::runtime_error(why);
  return *table;
}

std::unique_ptr<coproc::ExpertWeights> random_weights(const ExpertDims& dims, const kernels::KernelTable& table) {
  auto created = coproc::ExpertWeights::create(dims, table);
  if (!created.ok()) throw std::runtime_error(created.error().text());
  auto weights = std::move(created).value();
  std::mt19937 random(11);
  std::normal_distribution<float> normal(0, 0.15f);
  const auto matrix = [&] {
    Bytes elements(std::size_t{dims.hidden_size} * dims.intermediate_size * dims.element_bytes);
    for (std::size_t at = 0; at < elements.size(); at += dims.element_bytes) {
      const float value = normal(random);
      std::memcpy(elements.data() + at, reinterpret_cast<const std::byte*>(&value) + 4 - dims.element_bytes,
                  dims.element_bytes);
    }
    return elements;
  };
  for (std::uint32_t layer = 0; layer < dims.moe_layers.size(); ++layer) {
    for (std::uint32_t expert = 0; expert < dims.num_experts; ++expert) {
      const Bytes gate = matrix(), up = matrix(), down = matrix();
      weights->set_expert(layer, expert, gate.data(), up.data(), down.data());
    }
  }
  return weights;
}

shm::StatusPageOwner make_page() {
  auto page = shm::StatusPageOwner::create();
  if (!page.ok()) throw std::runtime_error(page.error().text());
  return std::move(page).value();
}

coproc::AdapterLayerSpec default_spec() {
  coproc::AdapterLayerSpec spec;
  spec.gate_up = {4, 0.5};
  spec.down = {3, 2.0};
  return spec;
}

EngineOptions Host::default_options() {
  EngineOptions options;
  options.activation_bytes_max = std::uint64_t{1} << 30;
  return options;
}

Host::Host(std::uint32_t element_bytes, EngineOptions options)
    : dims_(small_model(element_bytes)),
      table_(scalar_table(element_bytes)),
      weights_(random_weights(dims_, table_)),
      pool_(std::vector<int>{-1, -1}),
      page_(make_page()),
      engine_(std::make_unique<coproc::Engine>(dims_, table_, *weights_, pool_, page_.page(), options)) {
  engine_->set_on_session_ended([this](std::uint32_t session_id, const Error& error) {
    const std::lock_guard lock(mutex_);
    broken_.emplace_back(session_id, error);
    if (when_broken_) when_broken_();
  });
  thread_ = std::thread([this] { engine_->run(); });
}

Host::~Host() {
  engine_->stop();
  thread_.join();
}

RankShape Host::shape() const {
  return {{dims_.hidden_size, dims_.top_k, dims_.element_bytes}, dims_.num_layers, dims_.num_experts};
}

std::unique_ptr<Rank> Host::open(const std::string& name) {
  auto segment = shm::Segment::create(++num_sessions_, shm::kArenaBytesMin);
  auto doorbell = shm::create_doorbell();
  if (!segment.ok() || !doorbell.ok()) throw std::runtime_error("no segment or doorbell");
  auto rank =
      std::make_unique<Rank>(UniqueFd(::dup(segment.value().fd())), UniqueFd(::dup(doorbell.value().get())), shape());
  rank->session_id = num_sessions_;
  auto [answer, call] = answer_slot();
  engine_->open_session(
      {num_sessions_, 1000 + num_sessions_, name, std::move(segment).value(), std::move(doorbell).value()},
      std::move(answer));
  if (const std::string error = error_of(get(std::move(call))); !error.empty()) throw std::runtime_error(error);
  return rank;
}

Error Host::refused_open() {
  auto segment = shm::Segment::create(++num_sessions_, shm::kArenaBytesMin);
  auto [answer, call] = answer_slot();
  engine_->open_session({num_sessions_, 1, "", std::move(segment).value(), shm::create_doorbell().value()},
                        std::move(answer));
  const Answer refused = get(std::move(call));
  if (refused.ok()) throw std::runtime_error("the session was opened");
  return refused.error();
}

Host::Call Host::create(const Rank& rank, std::uint32_t adapter_id, std::vector<std::uint32_t> layers,
                        coproc::AdapterLayerSpec spec) {
  auto [answer, call] = answer_slot();
  engine_->create_adapter(rank.session_id, {adapter_id, std::move(layers), spec}, std::move(answer));
  return std::move(call);
}

Host::Call Host::remove(const Rank& rank, std::uint32_t adapter_id) {
  auto [answer, call] = answer_slot();
  engine_->delete_adapter(rank.session_id, adapter_id, std::move(answer));
  return std::move(call);
}

Host::Call Host::join(const Rank& rank, JoinJob join) {
  auto [answer, call] = join_slot();
  engine_->join(rank.session_id, std::move(join), std::move(answer));
  return std::move(call);
}

void Host::end(const Rank& rank, SessionEnd why) {
  std::promise<void> ended;
  auto has_ended = ended.get_future();
  engine_->end_session(rank.session_id, why, [ended = std::move(ended)]() mutable { ended.set_value(); });
  wait(std::move(has_ended), "watchdog: the session does not end");
}

void Host::rounds(int count) {
  for (int i = 0; i <= count; ++i) {
    std::promise<void> passed;
    auto has_passed = passed.get_future();
    engine_->end_session(kNobody, SessionEnd::kBye, [passed = std::move(passed)]() mutable { passed.set_value(); });
    wait(std::move(has_passed), "watchdog: no round");
  }
}

Host::Pause::Pause(Host& host) {
  std::promise<void> reached;
  auto stands = reached.get_future();
  host.engine().end_session(kNobody, SessionEnd::kBye,
                            [reached = std::move(reached), released = released_.get_future()]() mutable {
                              reached.set_value();
                              released.wait();
                            });
  wait(std::move(stands), "watchdog: no pause");
}

std::vector<std::pair<std::uint32_t, Error>> Host::broken() {
  const std::lock_guard lock(mutex_);
  return broken_;
}

void Host::when_broken(std::function<void()> action) {
  const std::lock_guard lock(mutex_);
  when_broken_ = std::move(action);
}

std::vector<std::unique_ptr<Rank>> Host::open_job(std::uint32_t count, const std::string& job_id, std::uint32_t seed,
                                                  double timeout_seconds) {
  std::vector<std::unique_ptr<Rank>> ranks;
  for (std::uint32_t i = 0; i < count; ++i) {
    ranks.push_back(open(job_id));
    EXPECT_EQ(error_of(get(create(*ranks.back()))), "");
    Oracle::fill(*ranks.back(), *this, seed);
  }
  std::vector<Call> calls;
  for (std::uint32_t i = 0; i < count; ++i) {
    calls.push_back(join(*ranks[i], join_request(i, count, job_id, timeout_seconds)));
  }
  for (Call& call : calls) EXPECT_EQ(error_of(get(std::move(call))), "");
  return ranks;
}

Host::Answer get(Host::Call call) {
  if (call.wait_for(kWatchdog) != std::future_status::ready) {
    throw std::runtime_error("watchdog: no answer to a control command within 30 s");
  }
  return call.get();
}

std::string error_of(const Host::Answer& answer, ErrorCode* code) {
  if (code != nullptr) *code = answer.ok() ? ErrorCode::kOk : answer.error().code;
  if (answer.ok()) return "";
  return answer.error().what + "\n" + answer.error().why + "\n" + answer.error().fix;
}

JoinJob join_request(std::uint32_t rank, std::uint32_t world_size, const std::string& job_id, double timeout_seconds) {
  JoinJob join{job_id, job_id, rank, world_size, {}, timeout_seconds};
  for (std::uint32_t i = 0; i < world_size; ++i) join.members.push_back(i);
  return join;
}

std::vector<float> tensor_values(const coproc::Adapter& adapter, const ExpertDims& dims, std::uint32_t layer,
                                 AdapterTensor tensor, std::uint32_t seed) {
  const auto shape = adapter.shape(layer, tensor);
  if (!shape) return {};
  std::mt19937 random(seed * 1000 + layer * 10 + static_cast<std::uint32_t>(tensor));
  std::normal_distribution<float> normal(0, 0.1f);
  std::vector<float> values(dims.num_experts * static_cast<std::size_t>(shape->rows * shape->cols));
  for (float& value : values) value = normal(random);
  return values;
}

Oracle::Oracle(const Host& host)
    : dims_(host.dims()),
      pool_(std::vector<int>{-1}),
      compute_(host.dims(), host.table(), host.weights(), pool_),
      adapter_(host.dims(), host.table()) {
  if (!adapter_.add_layers(kMoeLayers, default_spec()).ok()) throw std::runtime_error("no adapter");
}

void Oracle::fill(std::uint32_t seed) {
  for (const std::uint32_t layer : kMoeLayers) {
    for (const AdapterTensor tensor : kTensors) {
      const auto values = tensor_values(adapter_, dims_, layer, tensor, seed);
      adapter_.write(TensorKind::kParam, layer, tensor, 0, dims_.num_experts, values.data());
    }
  }
}

void Oracle::fill(Rank& rank, const Host& host, std::uint32_t seed) {
  const Oracle shapes(host);
  for (const std::uint32_t layer : kMoeLayers) {
    for (const AdapterTensor tensor : kTensors) {
      const auto values = tensor_values(shapes.adapter_, host.dims(), layer, tensor, seed);
      const Ticket ticket =
          rank.send_write(kAdapter, TensorKind::kParam, layer, tensor, host.dims().num_experts, values);
      EXPECT_EQ(rank.finish(ticket).error.text(), Error{}.text());
    }
  }
}

Bytes Oracle::forward(std::uint32_t layer, bool adapted, const Tokens& tokens, coproc::SavedActivation* kept) {
  Bytes y(tokens.x.size());
  coproc::ForwardItem item;
  item.x = tokens.x.data();
  item.ids = tokens.ids.data();
  item.weights = tokens.weights.data();
  item.num_tokens = tokens.num_tokens;
  item.y = y.data();
  if (kept != nullptr) {
    kept->layer = layer;
    kept->num_tokens = tokens.num_tokens;
    kept->x = tokens.x;
    kept->ids = tokens.ids;
    kept->weights = tokens.weights;
    kept->gate_up.resize(tokens.ids.size() * 2 * static_cast<std::size_t>(dims_.intermediate_padded()) *
                         dims_.element_bytes);
    if (!kept->gate_up.empty()) item.save_gate_up = kept->gate_up.data();
  }
  compute_.forward(layer, adapted ? &adapter_ : nullptr, {&item, 1});
  return y;
}

std::vector<Oracle::Gradients> Oracle::backward(const std::vector<const coproc::SavedActivation*>& kept,
                                                const std::vector<Bytes>& dy, bool accumulate) {
  std::vector<Gradients> gradients(kept.size());
  std::vector<coproc::BackwardItem> items(kept.size());
  for (std::size_t i = 0; i < kept.size(); ++i) {
    gradients[i].dx.resize(dy[i].size());
    gradients[i].dw.resize(kept[i]->ids.size() * sizeof(float));
    items[i] = {dy[i].data(), kept[i], gradients[i].dx.data(), reinterpret_cast<float*>(gradients[i].dw.data())};
  }
  compute_.backward(kept.front()->layer, &adapter_, items, accumulate);
  return gradients;
}

void Oracle::step(const StepArgs& args) {
  shm::StepHeader header{};
  header.scale = args.scale;
  header.num_groups = args.groups.size();
  std::copy(args.groups.begin(), args.groups.end(), std::begin(header.groups));
  std::vector<std::uint8_t> group_of = args.group_of;
  if (group_of.empty()) group_of.assign(std::size_t{dims_.num_layers} * shm::kNumAdapterTensors, 0);
  adapter_.step(header, group_of, pool_);
}

double Oracle::squared_norm() {
  const std::vector<std::uint8_t> all(std::size_t{dims_.num_layers} * shm::kNumAdapterTensors, 0);
  return adapter_.squared_norm(all, pool_);
}

std::vector<float> Oracle::read(TensorKind kind, std::uint32_t layer, AdapterTensor tensor) const {
  const auto shape = adapter_.shape(layer, tensor);
  std::vector<float> values(
      kind == TensorKind::kT ? 1 : dims_.num_experts * static_cast<std::size_t>(shape->rows * shape->cols));
  adapter_.read(kind, layer, tensor, 0, dims_.num_experts, values.data());
  return values;
}

std::vector<float> read_tensor(Rank& rank, const Oracle& oracle, TensorKind kind, std::uint32_t layer,
                               AdapterTensor tensor) {
  const std::size_t count = oracle.read(kind, layer, tensor).size();
  const std::uint32_t num_experts = kind == TensorKind::kT ? 1 : rank.shape().num_experts;
  const Outcome outcome = rank.finish(rank.send_read(kAdapter, kind, layer, tensor, num_experts, count));
  EXPECT_TRUE(outcome.ok()) << outcome.error.text();
  return outcome.floats();
}

void expect_same_adapter(Rank& rank, const Oracle& oracle, const std::vector<TensorKind>& kinds) {
  for (const std::uint32_t layer : kMoeLayers) {
    for (const AdapterTensor tensor : kTensors) {
      for (const TensorKind kind : kinds) {
        EXPECT_EQ(read_tensor(rank, oracle, kind, layer, tensor), oracle.read(kind, layer, tensor))
            << "kind " << static_cast<int>(kind) << ", layer " << layer << ", tensor " << static_cast<int>(tensor);
      }
    }
  }
}

double relative_difference(const std::vector<float>& a, const std::vector<float>& b) {
  double difference = a.size() == b.size() ? 0 : INFINITY;
  double largest = 1e-30;
  for (std::size_t i = 0; i < std::min(a.size(), b.size()); ++i) {
    difference = std::max(difference, std::abs(static_cast<double>(a[i]) - static_cast<double>(b[i])));
    largest = std::max(largest, std::abs(static_cast<double>(b[i])));
  }
  return difference / largest;
}

}  // namespace kt::test
