// Control connections: what is read from them, and how they and their sessions end (declared in server.h).
#include <spdlog/spdlog.h>
#include <sys/epoll.h>

#include <algorithm>

#include "coproc/daemon/connection.h"

namespace kt::coproc {
namespace {

constexpr std::uint32_t kPacketsPerTickMax = 64;
constexpr int kPacketsSearchedForBye = 64;
constexpr std::chrono::milliseconds kNoWait{0};

}  // namespace

Server::Connection* Server::find(std::uint64_t connection_id) {
  const auto found = connections_.find(connection_id);
  return found == connections_.end() ? nullptr : found->second.get();
}

void Server::on_connection_event(Connection& connection, bool process_ended, std::uint32_t events) {
  if (process_ended) return lose(connection, "its process ended");
  if (connection.busy || connection.throttled) {
    // Nothing but the end of the connection is heard now.
    if ((events & (EPOLLHUP | EPOLLERR)) != 0) lose(connection, "its connection was closed");
    return;
  }
  auto packet = shm::receive_packet(connection.socket.get(), kNoWait);
  if (!packet.ok()) {
    if (packet.error().code == ErrorCode::kTimeout) return;
    if (packet.error().code == ErrorCode::kInvalidArgument) return refuse_malformed(connection, packet.error());
    return lose(connection, "its connection was closed");
  }
  connection.has_spoken = true;
  if (++connection.num_packets >= kPacketsPerTickMax) {
    connection.throttled = true;
    update_interest(connection);
  }
  on_packet(connection, packet.value());
}

void Server::update_interest(const Connection& connection) {
  epoll_event event{};
  event.events = connection.busy || connection.throttled ? 0u : static_cast<std::uint32_t>(EPOLLIN);
  event.data.u64 = 2 * connection.id;
  ::epoll_ctl(epoll_.get(), EPOLL_CTL_MOD, connection.socket.get(), &event);
}

bool Server::send(Connection& connection, const Json& body, const std::vector<int>& descriptors) {
  const Status sent = shm::send_packet(connection.socket.get(), body, descriptors);
  if (sent.ok()) return true;
  lose(connection, sent.error().what + ": " + sent.error().why);
  return false;
}

void Server::refuse_malformed(Connection& connection, const Error& error) {
  spdlog::warn("closed a control connection ({}): {}: {}", connection.who(), error.what, error.why);
  [[maybe_unused]] const Status sent = shm::send_packet(connection.socket.get(), shm::error_reply(error));
  end_session(connection, SessionEnd::kProtocolError, "sent a malformed control packet");
  close(connection);
}

void Server::lose(Connection& connection, const std::string& how) {
  if (connection.session_id != 0) {
    const bool left = said_bye(connection);
    end_session(connection, left ? SessionEnd::kBye : SessionEnd::kDied, left ? "left" : "died: " + how);
  } else if (!connection.has_spoken) {
    spdlog::debug("closed a control connection ({}): {}", connection.who(), how);
  }
  close(connection);
}

// A process that says bye and ends at once: its death may be seen before its last packet.
bool Server::said_bye(Connection& connection) {
  for (int i = 0; i < kPacketsSearchedForBye; ++i) {
    const auto packet = shm::receive_packet(connection.socket.get(), kNoWait);
    if (!packet.ok()) return false;
    const auto op = packet.value().body.find("op");
    if (op != packet.value().body.end() && *op == "bye") return true;
  }
  return false;
}

void Server::close(Connection& connection) { connections_.erase(connection.id); }

void Server::end_session(Connection& connection, SessionEnd why, const std::string& how) {
  if (connection.session_id == 0) return;
  if (connection.is_open) {
    engine_->end_session(connection.session_id, why, {});
    spdlog::info("session {} {} ({})", connection.session_id, how, connection.who());
  }
  connection.session_id = 0;
}

void Server::session_ended(std::uint32_t session_id, const Error& error) {
  const auto entry = std::find_if(connections_.begin(), connections_.end(),
                                  [&](const auto& candidate) { return candidate.second->session_id == session_id; });
  if (entry == connections_.end()) return;
  Connection& connection = *entry->second;
  spdlog::info("session {} broke the protocol ({}): {}", session_id, connection.who(), error.why);
  connection.session_id = 0;  // The engine has ended it.
  close(connection);
}

std::size_t Server::num_sessions() const {
  return static_cast<std::size_t>(std::count_if(connections_.begin(), connections_.end(),
                                                [](const auto& entry) { return entry.second->session_id != 0; }));
}

}  // namespace kt::coproc
