#include "coproc/engine/engine.h"

#include <algorithm>

#include "coproc/engine/accounting.h"
#include "coproc/engine/activations.h"
#include "coproc/engine/adapter_commands.h"
#include "coproc/engine/batches.h"
#include "coproc/engine/collectives.h"
#include "coproc/engine/command_inbox.h"
#include "coproc/engine/heads.h"
#include "coproc/engine/intake.h"
#include "coproc/engine/joins.h"
#include "coproc/engine/messages.h"
#include "coproc/engine/registry.h"
#include "coproc/engine/sleeper.h"
#include "shm/doorbell.h"

namespace kt::coproc {
namespace {

using shm::now_ns;

// About what a sleep and a wake-up cost together (two processes, both asleep: 43 µs measured): spinning this long costs
// at most as much again as it can save.
constexpr std::uint64_t kSpinNs = 50'000;
constexpr std::uint64_t kTickNs = 200'000'000;  // Often enough for rates to fall to 0 while nothing happens.

}  // namespace

// The owners, wired together. Sessions end only in commands, intake and heads: the others find them all alive.
struct Engine::State {
  State(const ExpertDims& dims, const kernels::KernelTable& table, const ExpertWeights& weights, WorkerPool& pool,
        shm::StatusPage& page, const EngineOptions& options)
      : compute(dims, table, weights, pool),
        accounting(page, static_cast<std::uint32_t>(dims.moe_layers.size()), pool),
        registry(accounting, sleeper, pool, options.collective_timeout_ns),
        intake(dims, registry, accounting),
        heads(dims, registry, accounting, options.deterministic),
        activations(dims, registry, options.activation_bytes_max),
        joins(registry, dims.num_layers, options.collective_timeout_ns),
        adapter_commands(dims, table),
        batches(dims, registry, heads, activations, compute, accounting, options.batch_tokens_max),
        collectives(registry, heads, batches, adapter_commands, accounting, pool) {
    registry.add_listener(joins);
    registry.add_listener(adapter_commands);
    page.bytes_weights.store(weights.bytes(), std::memory_order_relaxed);
    KT_CHECK(sleeper.add(inbox.fd()));
  }

  // Everything that can run without waiting, and one batch. True: look again at once.
  bool round() {
    bool did = registry.any_session([&](Session& session) { return intake.receive(session); });
    did |= registry.any_session([&](Session& session) { return heads.advance(session); });
    const std::uint64_t now = now_ns();
    did |= joins.run(now);
    did |= collectives.run(now);
    did |= batches.run_next();
    if (!did && registry.shutting_down()) did = finish_shutdown();
    // Memory is summed when somebody may read it: ten times a second, and whenever there is nothing else to do.
    if (accounting.tick(now_ns()) || !did) accounting.set_memory(registry.memory());
    return did;
  }

  // True: something came within kSpinNs.
  bool spin() const {
    const std::uint64_t end_ns = now_ns() + kSpinNs;
    do {
      if (has_request() || !inbox.empty()) return true;
      shm::cpu_relax();
    } while (now_ns() < end_ns);
    return false;
  }

  // A rank that publishes after the second look sees `sleeping` and rings; one that published before is seen
  // (shm/doorbell.h).
  void sleep() {
    set_sleeping(true);
    if (!has_request() && inbox.empty()) sleeper.wait(sleep_ns_max(now_ns()));
    set_sleeping(false);
  }

  bool has_request() const {
    return std::any_of(registry.sessions().begin(), registry.sessions().end(),
                       [](const auto& entry) { return entry.second->ring.has_request(); });
  }
  void set_sleeping(bool sleeping) const {
    for (const auto& [session_id, session] : registry.sessions()) shm::set_sleeping(session->segment, sleeping);
  }
  // UINT64_MAX: until something comes.
  std::uint64_t sleep_ns_max(std::uint64_t now) const {
    const std::uint64_t due_ns = std::min(joins.due_ns(), collectives.due_ns());
    const std::uint64_t until_due_ns = due_ns == UINT64_MAX ? UINT64_MAX : due_ns > now ? due_ns - now : 0;
    return std::min(until_due_ns, accounting.needs_ticks() ? kTickNs : UINT64_MAX);
  }

  // The session that sent a command; nullptr: it has ended meanwhile, or was refused and the answer is given.
  template <class Answer>
  Session* sender(std::uint32_t session_id, Answer& answer) {
    Session* const session = registry.find(session_id);
    if (session == nullptr) return nullptr;
    if (registry.shutting_down()) {
      answer(shutting_down_error());
    } else if (session->job->failure) {
      answer(session->job->failure->error);
    } else if (joins.waits(*session) || adapter_commands.waiting(*session) != nullptr) {
      const AdapterCommand* const command = adapter_commands.waiting(*session);
      answer(Error{ErrorCode::kInvalidArgument, describe(*session) + " sent two control commands at once",
                   std::string(command == nullptr ? "join" : command_name(*command)) + " still waits for other ranks",
                   "wait for the first answer"});
    } else {
      return session;
    }
    return nullptr;
  }

  void shut_down(OnEnded done) {
    on_shut_down.push_back(std::move(done));
    if (registry.shutting_down()) return;
    // What is in the rings now counts as received before the shutdown.
    registry.any_session([&](Session& session) { return intake.receive(session); });
    registry.shut_down();
  }

  // Called when nothing can run: what still waits, waits for other ranks, and they will not come any more.
  bool finish_shutdown() {
    const Error error = shutting_down_error();
    const bool did = registry.any_session([&](Session& session) {
      const bool waits = !session.queue.empty();
      if (waits) session.answer_head(accounting, shm::Reply{}, &error);
      return waits | joins.refuse(session, error) | adapter_commands.refuse(session, error);
    });
    if (did) return true;
    std::vector<OnEnded> callbacks;
    callbacks.swap(on_shut_down);
    for (OnEnded& done : callbacks) done();
    return !callbacks.empty();
  }

  CommandInbox inbox;
  Sleeper sleeper;
  ExpertCompute compute;
  Accounting accounting;
  Registry registry;
  Intake intake;
  Heads heads;
  Activations activations;
  Joins joins;
  AdapterCommands adapter_commands;
  Batches batches;
  Collectives collectives;
  std::vector<OnEnded> on_shut_down;
  bool stopped = false;
};

Engine::Engine(const ExpertDims& dims, const kernels::KernelTable& table, const ExpertWeights& weights,
               WorkerPool& pool, shm::StatusPage& page, EngineOptions options)
    : state_(std::make_unique<State>(dims, table, weights, pool, page, options)) {}

Engine::~Engine() = default;

void Engine::set_on_session_ended(std::function<void(std::uint32_t session_id, const Error& error)> callback) {
  state_->registry.on_session_ended = std::move(callback);
}

void Engine::run() {
  State& state = *state_;
  for (;;) {
    bool did = state.inbox.run_all();
    if (state.stopped) return;
    did |= state.round();
    if (!did && !state.spin()) state.sleep();
  }
}

void Engine::open_session(OpenSession session, OnDone answer) {
  state_->inbox.post([this, session = std::move(session), answer = std::move(answer)]() mutable {
    answer(state_->registry.open(std::move(session)));
  });
}

void Engine::end_session(std::uint32_t session_id, SessionEnd why, OnEnded answer) {
  state_->inbox.post([this, session_id, why, answer = std::move(answer)]() mutable {
    state_->registry.end(session_id, why);
    if (answer) answer();
  });
}

void Engine::create_adapter(std::uint32_t session_id, CreateAdapter create, OnDone answer) {
  state_->inbox.post([this, session_id, create = std::move(create), answer = std::move(answer)]() mutable {
    Session* const session = state_->sender(session_id, answer);
    if (session == nullptr) return;
    state_->adapter_commands.ask(*session, std::move(create), std::move(answer), now_ns());
  });
}

void Engine::delete_adapter(std::uint32_t session_id, std::uint32_t adapter_id, OnDone answer) {
  state_->inbox.post([this, session_id, adapter_id, answer = std::move(answer)]() mutable {
    Session* const session = state_->sender(session_id, answer);
    if (session == nullptr) return;
    state_->adapter_commands.ask(*session, DeleteAdapter{adapter_id}, std::move(answer), now_ns());
  });
}

void Engine::join(std::uint32_t session_id, JoinJob join, OnJoined answer) {
  state_->inbox.post([this, session_id, join = std::move(join), answer = std::move(answer)]() mutable {
    Session* const session = state_->sender(session_id, answer);
    if (session == nullptr) return;
    state_->joins.ask(*session, std::move(join), std::move(answer), now_ns());
  });
}

void Engine::shut_down(OnEnded done) {
  state_->inbox.post([this, done = std::move(done)]() mutable { state_->shut_down(std::move(done)); });
}

void Engine::stop() {
  state_->inbox.post([this] { state_->stopped = true; });
}

}  // namespace kt::coproc
