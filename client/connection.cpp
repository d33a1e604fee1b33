#include "client/connection.h"

#include <sys/socket.h>
#include <sys/syscall.h>
#include <unistd.h>

#include <chrono>
#include <nlohmann/json.hpp>
#include <utility>

#include "client/watchdog.h"
#include "shm/control.h"

namespace kt::client {
namespace {

using nlohmann::json;

constexpr std::chrono::seconds kHelloTimeout{10};

Error strange_hello(const std::string& why) {
  return Error{ErrorCode::kVersionMismatch, "the daemon's answer to hello is not understood", why,
               "run client and daemon of the same kt-coproc release"};
}

// SO_PEERPIDFD (Linux 6.5) names the process itself, also across pid namespaces; else by the pid, where it has one.
UniqueFd open_peer_pidfd(int socket) {
  constexpr int kSoPeerPidfd = 77;  // glibc 2.36 does not name it.
  int pidfd = -1;
  socklen_t bytes = sizeof pidfd;
  if (::getsockopt(socket, SOL_SOCKET, kSoPeerPidfd, &pidfd, &bytes) == 0) return UniqueFd(pidfd);
  ucred peer{};
  bytes = sizeof peer;
  if (::getsockopt(socket, SOL_SOCKET, SO_PEERCRED, &peer, &bytes) != 0 || peer.pid <= 0) return {};
  return UniqueFd(static_cast<int>(::syscall(SYS_pidfd_open, peer.pid, 0)));
}

// Throws json::exception.
Result<ModelInfo> parse_model(const json& hello) {
  auto card = shm::parse_model_card(hello.at("model"));
  if (!card.ok()) return strange_hello(card.error().why);
  ModelInfo info{std::move(card).value(), hello.at("daemon_id"), hello.at("daemon_pid"), hello.at("element_bytes")};
  if (info.element_bytes == 2 || info.element_bytes == 4) return info;
  return strange_hello("element_bytes is " + std::to_string(info.element_bytes));
}

json hello_of(const ConnectOptions& options) {
  json hello = {
      {"op", "hello"}, {"protocol", shm::kProtocolVersion}, {"pid", ::getpid()}, {"arena_bytes", options.arena_bytes}};
  if (!options.fingerprint.empty()) hello["fingerprint"] = options.fingerprint;
  if (!options.name.empty()) hello["name"] = options.name;
  return hello;
}

Result<shm::Packet> say_hello(int socket, const std::string& path, const ConnectOptions& options) {
  auto answer = shm::call(socket, hello_of(options), kHelloTimeout);
  if (answer.ok() || answer.error().code != ErrorCode::kNotFound || !hung_up(socket)) return answer;
  return Error{ErrorCode::kCoprocDied, "the co-process at " + path + " closed the connection before it said hello",
               "it died or is shutting down", "see its log, then start it again with `kt-coproc run`"};
}

}  // namespace

Result<Connection> open_connection(const ConnectOptions& options) {
  KT_TRY(const std::string path, shm::resolve_socket_path(options.address));
  KT_TRY(UniqueFd socket, shm::connect_daemon(path));
  KT_TRY(shm::Packet answer, say_hello(socket.get(), path, options));
  if (answer.descriptors.size() != 3) {
    return strange_hello("it came with " + std::to_string(answer.descriptors.size()) + " descriptors instead of 3");
  }
  ModelInfo model;
  std::uint32_t batch_tokens_max = 0;
  try {
    KT_TRY(model, parse_model(answer.body));
    answer.body.at("limits").at("batch_tokens_max").get_to(batch_tokens_max);
  } catch (const json::exception& failure) {
    return strange_hello(failure.what());
  }
  if (batch_tokens_max == 0) return strange_hello("batch_tokens_max is 0");

  UniqueFd pidfd = open_peer_pidfd(socket.get());
  KT_TRY(auto segment, shm::Segment::attach(std::move(answer.descriptors[0])));
  KT_TRY(auto status, shm::StatusPageView::attach(std::move(answer.descriptors[1])));
  return Connection{
      std::move(socket), std::move(pidfd), std::move(segment), std::move(status), std::move(answer.descriptors[2]),
      std::move(model),  batch_tokens_max};
}

}  // namespace kt::client
