#include "coproc/engine/engine.h"

#include "coproc/engine/command_inbox.h"
#include "coproc/engine/core.h"
#include "shm/doorbell.h"

namespace kt::coproc {
namespace {

// About what a sleep and a wake-up cost together (two processes, both asleep: 43 µs measured): spinning this long costs
// at most as much again as it can save.
constexpr std::uint64_t kSpinNs = 50'000;

}  // namespace

struct Engine::State {
  State(const ExpertDims& dims, const kernels::KernelTable& table, const ExpertWeights& weights, WorkerPool& pool,
        shm::StatusPage& page, const EngineOptions& options)
      : core(dims, table, weights, pool, page, options) {
    KT_CHECK(core.sleeper().add(inbox.fd()));
  }

  // True: something came within kSpinNs.
  bool spin() const {
    const std::uint64_t end_ns = shm::now_ns() + kSpinNs;
    do {
      if (core.has_request() || !inbox.empty()) return true;
      shm::cpu_relax();
    } while (shm::now_ns() < end_ns);
    return false;
  }

  // A rank that publishes after the second look sees `sleeping` and rings; one that published before is seen (S0/S1).
  void sleep() {
    core.set_sleeping(true);
    if (!core.has_request() && inbox.empty()) core.sleeper().wait(core.sleep_ns_max(shm::now_ns()));
    core.set_sleeping(false);
  }

  CommandInbox inbox;
  Core core;
  bool stopped = false;
};

Engine::Engine(const ExpertDims& dims, const kernels::KernelTable& table, const ExpertWeights& weights,
               WorkerPool& pool, shm::StatusPage& page, EngineOptions options)
    : state_(std::make_unique<State>(dims, table, weights, pool, page, options)) {}

Engine::~Engine() = default;

void Engine::set_on_session_ended(std::function<void(std::uint32_t session_id, const Error& error)> callback) {
  state_->core.on_session_ended = std::move(callback);
}

void Engine::run() {
  State& state = *state_;
  for (;;) {
    bool did = state.inbox.run_all();
    if (state.stopped) return;
    did |= state.core.round();
    if (!did && !state.spin()) state.sleep();
  }
}

void Engine::open_session(OpenSession session, Answer answer) {
  // std::function copies what it holds, and a segment cannot be copied.
  auto shared = std::make_shared<OpenSession>(std::move(session));
  state_->inbox.post(
      [this, shared, answer = std::move(answer)] { state_->core.open_session(std::move(*shared), answer); });
}

void Engine::end_session(std::uint32_t session_id, SessionEnd why, Answer answer) {
  state_->inbox.post(
      [this, session_id, why, answer = std::move(answer)] { state_->core.end_session(session_id, why, answer); });
}

void Engine::create_adapter(std::uint32_t session_id, CreateAdapter create, Answer answer) {
  state_->inbox.post([this, session_id, create = std::move(create), answer = std::move(answer)] {
    state_->core.create_adapter(session_id, create, answer);
  });
}

void Engine::delete_adapter(std::uint32_t session_id, std::uint32_t adapter_id, Answer answer) {
  state_->inbox.post([this, session_id, adapter_id, answer = std::move(answer)] {
    state_->core.delete_adapter(session_id, adapter_id, answer);
  });
}

void Engine::join(std::uint32_t session_id, JoinJob join, Answer answer) {
  state_->inbox.post([this, session_id, join = std::move(join), answer = std::move(answer)] {
    state_->core.join(session_id, join, answer);
  });
}

void Engine::shut_down(std::function<void()> done) {
  state_->inbox.post([this, done = std::move(done)] { state_->core.shut_down(done); });
}

void Engine::stop() {
  state_->inbox.post([this] { state_->stopped = true; });
}

}  // namespace kt::coproc
