#include "coproc/daemon/daemon.h"

#include <pthread.h>
#include <signal.h>
#include <spdlog/spdlog.h>
#include <sys/random.h>
#include <sys/resource.h>

#include <algorithm>
#include <array>
#include <chrono>
#include <optional>
#include <thread>

#include "coproc/daemon/prepare.h"
#include "coproc/daemon/runtime_socket.h"
#include "coproc/daemon/server.h"
#include "coproc/daemon/stall_detector.h"
#include "coproc/daemon/weight_loading.h"
#include "coproc/machine/memory_room.h"
#include "shm/doorbell.h"
#include "shm/text.h"

namespace kt::coproc {
namespace {

using nlohmann::json;

constexpr std::size_t kHelloReplyBytesMax = shm::kPacketBytesMax - 64;  // The session's number is added to it.
constexpr std::uint32_t kLoaderThreadsMin = 2;                          // One reads while the other packs.
constexpr std::uint32_t kLoaderThreadsMax = 16;

// 128 random bits, in hexadecimal: tells a restarted daemon from the one before.
Result<std::string> make_daemon_id() {
  std::array<unsigned char, 16> bytes{};
  if (::getrandom(bytes.data(), bytes.size(), 0) != static_cast<ssize_t>(bytes.size())) {
    return os_error("getrandom", "daemon_id", "try again");
  }
  std::string id;
  for (const unsigned char byte : bytes) {
    id += "0123456789abcdef"[byte >> 4];
    id += "0123456789abcdef"[byte & 15];
  }
  return id;
}

// Every thread inherits this: signals are the control thread's to read.
void block_signals() {
  sigset_t signals;
  sigemptyset(&signals);
  sigaddset(&signals, SIGTERM);
  sigaddset(&signals, SIGINT);
  ::pthread_sigmask(SIG_BLOCK, &signals, nullptr);
  ::signal(SIGPIPE, SIG_IGN);
  ::signal(SIGXFSZ, SIG_IGN);  // A cache longer than ulimit -f is an error like a full disk.
}

// A session has four descriptors here: socket, pidfd, segment, doorbell.
void raise_descriptor_limit() {
  rlimit limit{};
  if (::getrlimit(RLIMIT_NOFILE, &limit) != 0) return;
  limit.rlim_cur = limit.rlim_max;
  ::setrlimit(RLIMIT_NOFILE, &limit);  // With the old limit fewer sessions fit: no reason not to start.
}

// What hello answers every session, without its number.
Result<ServerIdentity> make_identity(const Prepared& prepared, const std::string& daemon_id) {
  const shm::ModelCard& card = prepared.card;
  ServerIdentity identity;
  identity.fingerprint = card.fingerprint;
  identity.model_path = card.path;
  identity.hello_reply = {{"ok", true},
                          {"daemon_id", daemon_id},
                          {"daemon_pid", ::getpid()},
                          {"element_bytes", prepared.dims.element_bytes},
                          {"model", shm::to_json(card)},
                          {"limits",
                           {{"batch_tokens_max", prepared.engine.batch_tokens_max},
                            {"activation_bytes_max", prepared.engine.activation_bytes_max},
                            {"arena_bytes", shm::kArenaBytesMax}}},
                          {"deterministic", prepared.engine.deterministic}};
  const std::size_t bytes = identity.hello_reply.dump(-1, ' ', false, json::error_handler_t::replace).size();
  if (bytes > kHelloReplyBytesMax) {
    return Error{ErrorCode::kBadModel,
                 "cannot describe the model of " + prepared.checkpoint.config().path + " to its clients",
                 "with its path and " + std::to_string(card.moe_layers.size()) + " MoE layers that takes " +
                     std::to_string(bytes) + " of " + std::to_string(kHelloReplyBytesMax) + " bytes",
                 "move the checkpoint to a shorter path"};
  }
  return identity;
}

void fill_status(shm::StatusPage& page, const Prepared& prepared, const std::string& daemon_id,
                 std::uint64_t started_ns) {
  const auto set = [](auto& field, std::string_view text) { shm::set_text(field, sizeof field, text); };
  set(page.version, KT_VERSION);
  set(page.daemon_id, daemon_id);
  set(page.kernels, prepared.table->name);
  shm::set_model(page, prepared.card);
  page.pid = static_cast<std::uint32_t>(::getpid());
  page.numa_nodes = static_cast<std::uint32_t>(prepared.workers.pools.size());
  page.worker_threads = prepared.workers.num_workers();
  page.started_ns = started_ns;
  page.load_bytes_total.store(prepared.checkpoint.expert_bytes(), std::memory_order_relaxed);
  page.state.store(shm::DaemonState::kLoading, std::memory_order_relaxed);
}

// The threads: control (the caller of run), loader until the weights are there and in their cache, then worker 0 with
// the pool's others.
class Daemon {
 public:
  Daemon(const RunOptions& options, Prepared& prepared, RuntimeSocket& socket, shm::StatusPageOwner& status,
         std::uint64_t started_ns)
      : options_(options), prepared_(prepared), socket_(socket), status_(status), started_ns_(started_ns) {}

  Status run(ServerIdentity identity) {
    Server::Hooks hooks{[this] { tick(); }, [this] { stop(); }};
    KT_TRY(server_, Server::create(socket_, status_, std::move(identity), std::move(hooks)));
    loader_ = std::thread([this] { load(); });
    const bool in_time = server_->run();
    socket_.remove();
    if (!in_time) {
      // Only process exit ends a thread that does not come back. Adapters live until then: nothing is written anywhere.
      spdlog::warn("what was running did not end in time: leaving it");
      std::_Exit(0);
    }
    progress_.cancel.store(true);  // The loader may be writing its cache.
    if (loader_.joinable()) loader_.join();
    if (engine_thread_.joinable()) {
      engine_->stop();
      engine_thread_.join();
    }
    if (error_) return std::move(*error_);
    spdlog::info("stopped");
    return ok_status();
  }

 private:
  double seconds_since_start() const { return static_cast<double>(shm::now_ns() - started_ns_) * 1e-9; }

  // The loader's thread.
  void load() {
    ::pthread_setname_np(::pthread_self(), "kt-loader");
    const auto num_threads = std::clamp(prepared_.workers.num_workers(), kLoaderThreadsMin, kLoaderThreadsMax);
    WeightLoading loading(prepared_, options_, progress_);
    Status status = loading.load(num_threads);
    const bool ok = status.ok();
    server_->post([this, status = std::move(status)] { loaded(status); });
    if (ok) loading.write_cache();
  }

  // From here on: the control thread.
  void loaded(const Status& status) {
    show_progress();
    if (server_->shutting_down()) return server_->finish();
    if (!status.ok()) {
      error_ = status.error();
      return server_->finish();
    }
    shm::StatusPage& page = status_.page();
    pool_ = std::make_unique<WorkerPool>(prepared_.workers.pools);
    engine_ =
        std::make_unique<Engine>(prepared_.dims, *prepared_.table, *prepared_.weights, *pool_, page, prepared_.engine);
    server_->serve(*engine_);
    engine_thread_ = std::thread([this] {
      ::pthread_setname_np(::pthread_self(), "kt-worker-0");
      engine_->run();
    });
    spdlog::info("serving {} on unix:{} (ready in {:.1f} s)", prepared_.checkpoint.config().path, socket_.path(),
                 seconds_since_start());
  }

  void stop() {
    if (engine_ == nullptr) {
      progress_.cancel.store(true);  // loaded() finishes.
    } else {
      engine_->shut_down([this] { server_->post([this] { server_->finish(); }); });
    }
  }

  void tick() {
    if (engine_ == nullptr) return show_progress();
    if (server_->shutting_down()) return;
    shm::StatusPage& page = status_.page();
    // A long batch finishes no request for a while, but its tasks end all the time.
    const std::uint64_t progress = engine_progress(page) + pool_->busy_ns();
    const bool stalled = stall_detector_.update(shm::now_ns(), work_in_flight(page, options_.deterministic), progress);
    if (stalled != stalled_) {
      spdlog::warn("{}", stalled ? "stalled: requests are in flight and nothing moves" : "no longer stalled");
      stalled_ = stalled;
      page.state.store(stalled ? shm::DaemonState::kStalled : shm::DaemonState::kServing, std::memory_order_relaxed);
    }
  }

  void show_progress() {
    shm::StatusPage& page = status_.page();
    // A cache has other bytes than the checkpoint.
    if (const std::uint64_t total = progress_.bytes_total.load(); total != 0) {
      page.load_bytes_total.store(total, std::memory_order_relaxed);
    }
    page.load_bytes_done.store(progress_.bytes_done.load(), std::memory_order_relaxed);
    page.load_seconds.store(seconds_since_start(), std::memory_order_relaxed);
  }

  const RunOptions& options_;
  Prepared& prepared_;
  RuntimeSocket& socket_;
  shm::StatusPageOwner& status_;
  const std::uint64_t started_ns_;

  LoadProgress progress_;
  StallDetector stall_detector_;
  bool stalled_ = false;
  std::optional<Error> error_;
  // In the order of dependence: the engine posts to the server and computes on the pool.
  std::unique_ptr<Server> server_;
  std::unique_ptr<WorkerPool> pool_;
  std::unique_ptr<Engine> engine_;
  std::thread loader_;
  std::thread engine_thread_;
};

}  // namespace

Status run_daemon(const RunOptions& options) {
  const std::uint64_t started_ns = shm::now_ns();
  block_signals();
  raise_descriptor_limit();
  KT_TRY(Prepared prepared, prepare(options));
  KT_TRY(const std::string daemon_id, make_daemon_id());
  KT_TRY(ServerIdentity identity, make_identity(prepared, daemon_id));
  KT_TRY(RuntimeSocket socket, RuntimeSocket::open(options.socket_path));
  KT_TRY(shm::StatusPageOwner status, shm::StatusPageOwner::create());
  fill_status(status.page(), prepared, daemon_id, started_ns);

  spdlog::info("kt-coproc {} pid {}: {} ({}, {} MoE layers of {} experts)", KT_VERSION, ::getpid(),
               prepared.checkpoint.config().path, prepared.checkpoint.config().architecture,
               prepared.dims.moe_layers.size(), prepared.dims.num_experts);
  spdlog::info("{}", prepared.workers.summary);
  if (!prepared.workers.warning.empty()) spdlog::warn("{}", prepared.workers.warning);
  spdlog::info("kernels: {}; weights: {} in {}; activations: up to {}", prepared.table->name,
               bytes_text(prepared.weights->bytes()), options.weight_format,
               bytes_text(prepared.engine.activation_bytes_max));
  Daemon daemon(options, prepared, socket, status, started_ns);
  return daemon.run(std::move(identity));
}

}  // namespace kt::coproc
