#include "coproc/daemon/server.h"

#include <signal.h>
#include <spdlog/spdlog.h>
#include <sys/epoll.h>
#include <sys/signalfd.h>
#include <sys/socket.h>
#include <sys/timerfd.h>

#include <array>
#include <cerrno>
#include <cstring>

#include "coproc/daemon/connection.h"
#include "coproc/daemon/peer.h"

namespace kt::coproc {
namespace {

constexpr auto kTick = std::chrono::milliseconds(250);
constexpr auto kSilenceMax = std::chrono::seconds(30);  // Until a new connection's first packet.
constexpr auto kStoppingMax = std::chrono::seconds(9);  // The contract says 10 s from signal to exit.
constexpr int kAcceptsPerEvent = 32;                    // Then others get their turn.
constexpr const char* kDescriptorsFix = "raise the limit on open files: ulimit -n";

// Tokens of epoll events. A connection has two: 2·id for its socket, 2·id + 1 for its pidfd.
enum Token : std::uint64_t { kListenToken = 0, kSignalToken = 1, kTimerToken = 2, kMailboxToken = 3 };
constexpr std::uint64_t kFirstConnectionId = 2;

Result<UniqueFd> open_signals() {
  sigset_t signals;
  sigemptyset(&signals);
  sigaddset(&signals, SIGTERM);
  // A shell without job control ignores SIGINT for what it starts with `&`: Ctrl-C is then meant for the others.
  struct sigaction interrupt {};
  if (::sigaction(SIGINT, nullptr, &interrupt) == 0 && interrupt.sa_handler != SIG_IGN) sigaddset(&signals, SIGINT);
  UniqueFd fd(::signalfd(-1, &signals, SFD_CLOEXEC | SFD_NONBLOCK));
  if (!fd.valid()) return os_error("signalfd", "control thread", kDescriptorsFix);
  return fd;
}

Result<UniqueFd> open_timer() {
  UniqueFd fd(::timerfd_create(CLOCK_MONOTONIC, TFD_CLOEXEC | TFD_NONBLOCK));
  const timespec period{0, std::chrono::nanoseconds(kTick).count()};
  const itimerspec interval{period, period};
  if (!fd.valid() || ::timerfd_settime(fd.get(), 0, &interval, nullptr) != 0) {
    return os_error("timerfd", "control thread", kDescriptorsFix);
  }
  return fd;
}

}  // namespace

Server::Server(RuntimeSocket& socket, shm::StatusPageOwner& status, ServerIdentity identity, Hooks hooks)
    : socket_(socket),
      status_(status),
      identity_(std::move(identity)),
      hooks_(std::move(hooks)),
      next_connection_id_(kFirstConnectionId) {}

Server::~Server() = default;

Result<std::unique_ptr<Server>> Server::create(RuntimeSocket& socket, shm::StatusPageOwner& status,
                                               ServerIdentity identity, Hooks hooks) {
  std::unique_ptr<Server> server(new Server(socket, status, std::move(identity), std::move(hooks)));
  KT_TRY_STATUS(server->open_descriptors());
  return server;
}

Status Server::open_descriptors() {
  epoll_.reset(::epoll_create1(EPOLL_CLOEXEC));
  if (!epoll_.valid()) return os_error("epoll_create1", "control thread", kDescriptorsFix);
  KT_TRY(signals_, open_signals());
  KT_TRY(timer_, open_timer());
  KT_TRY(mailbox_, Mailbox::create());
  KT_TRY_STATUS(watch(socket_.fd(), kListenToken));
  KT_TRY_STATUS(watch(signals_.get(), kSignalToken));
  KT_TRY_STATUS(watch(timer_.get(), kTimerToken));
  return watch(mailbox_->fd(), kMailboxToken);
}

Status Server::watch(int fd, std::uint64_t token) {
  epoll_event event{};
  event.events = EPOLLIN;
  event.data.u64 = token;
  if (::epoll_ctl(epoll_.get(), EPOLL_CTL_ADD, fd, &event) == 0) return ok_status();
  return os_error("epoll_ctl", "control thread", kDescriptorsFix);
}

void Server::serve(Engine& engine) {
  engine_ = &engine;
  engine.set_on_session_ended([this](std::uint32_t session_id, const Error& error) {
    post([this, session_id, error] { session_ended(session_id, error); });
  });
  if (!shutting_down()) status_.page().state.store(shm::DaemonState::kServing, std::memory_order_relaxed);
}

bool Server::run() {
  std::array<epoll_event, 64> events{};
  while (!finished_) {
    const int num_events = ::epoll_wait(epoll_.get(), events.data(), static_cast<int>(events.size()), -1);
    for (int i = 0; i < num_events && !finished_; ++i) {
      const epoll_event& event = events[static_cast<std::size_t>(i)];
      dispatch(event.data.u64, event.events);
    }
    if (draining_ && !stopping_ && num_sessions() == 0) begin_stop();
    if (stopping_ && !finished_ && Clock::now() >= stop_deadline_) return false;
  }
  return true;
}

void Server::dispatch(std::uint64_t token, std::uint32_t events) {
  switch (token) {
    case kListenToken:
      return accept_connections();
    case kTimerToken:
      return tick();
    case kMailboxToken:
      return mailbox_->run_all();
    case kSignalToken: {
      signalfd_siginfo info{};
      if (::read(signals_.get(), &info, sizeof info) != sizeof info) return;
      return request_stop(/*drain=*/false, info.ssi_signo == SIGINT ? "SIGINT" : "SIGTERM");
    }
    default:
      // An earlier event of this round may have closed it.
      if (Connection* const connection = find(token / 2)) on_connection_event(*connection, token % 2 == 1, events);
  }
}

void Server::accept_connections() {
  for (int i = 0; i < kAcceptsPerEvent; ++i) {
    UniqueFd socket(::accept4(socket_.fd(), nullptr, nullptr, SOCK_CLOEXEC | SOCK_NONBLOCK));
    if (socket.valid()) {
      add_connection(std::move(socket));
      continue;
    }
    if (errno == EAGAIN || errno == EINTR || errno == ECONNABORTED) return;
    // Out of descriptors or memory: the event would come back at once, for ever.
    spdlog::warn("no new control connections for the moment: {}", std::strerror(errno));
    ::epoll_ctl(epoll_.get(), EPOLL_CTL_DEL, socket_.fd(), nullptr);
    accepting_ = false;
    return;
  }
}

void Server::add_connection(UniqueFd socket) {
  if (connections_.size() >= kConnectionsMax) {
    spdlog::warn("refused a control connection: {} are open", kConnectionsMax);
    return;
  }
  auto connection = std::make_unique<Connection>();
  connection->id = next_connection_id_++;
  connection->socket = std::move(socket);
  connection->opened = Clock::now();
  ucred peer{};
  socklen_t bytes = sizeof peer;
  if (::getsockopt(connection->socket.get(), SOL_SOCKET, SO_PEERCRED, &peer, &bytes) != 0) return;
  connection->pid = peer.pid > 0 ? static_cast<std::uint32_t>(peer.pid) : 0;
  if (peer.uid != ::geteuid()) {
    spdlog::warn("refused a connection of uid {}, {}", peer.uid, connection->who());
    connection->refusal =
        Error{ErrorCode::kPermission, "this daemon is not yours",
              "it runs as uid " + std::to_string(::geteuid()) + ", you are uid " + std::to_string(peer.uid),
              "start a daemon of your own: kt-coproc run --model DIR"};
  }
  connection->pidfd = peer_pidfd(connection->socket.get(), peer.pid);
  const bool watched = watch(connection->socket.get(), 2 * connection->id).ok() &&
                       (!connection->pidfd.valid() || watch(connection->pidfd.get(), 2 * connection->id + 1).ok());
  if (watched) connections_.emplace(connection->id, std::move(connection));
}

void Server::tick() {
  std::uint64_t expirations = 0;
  [[maybe_unused]] const ssize_t got = ::read(timer_.get(), &expirations, sizeof expirations);
  if (!accepting_) accepting_ = watch(socket_.fd(), kListenToken).ok();
  for (auto entry = connections_.begin(); entry != connections_.end();) {
    Connection& connection = *(entry++)->second;
    connection.num_packets = 0;
    if (connection.throttled) {
      connection.throttled = false;
      update_interest(connection);
    }
    if (!connection.has_spoken && Clock::now() - connection.opened > kSilenceMax) {
      lose(connection, "it said nothing for " + std::to_string(kSilenceMax.count()) + " s");
    }
  }
  hooks_.on_tick();
}

void Server::request_stop(bool drain, const std::string& who) {
  if (stopping_) return;
  draining_ = true;  // run() stops when no session is left.
  status_.page().state.store(shm::DaemonState::kDraining, std::memory_order_relaxed);
  spdlog::info("{}: shutting down{}, {} sessions attached", who, drain ? " when all have left" : "", num_sessions());
  if (!drain) begin_stop();
}

void Server::begin_stop() {
  stopping_ = true;
  stop_deadline_ = Clock::now() + kStoppingMax;
  hooks_.on_stop();
}

}  // namespace kt::coproc
