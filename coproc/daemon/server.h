// The control thread: the listening socket, the control connections, the deaths of their processes, signals.
//
// A rank's control connection is its session's life line: the session ends when the connection does, with bye, by the
// process' death, or for a malformed packet. Everything here is cold; requests for experts never pass through.
//
// Invariants
//   Only the control thread (the caller of run) touches connections. Other threads post() to it.
//   It never waits for a peer: sockets do not block, a peer that does not read its replies is dropped.
//   A connection has at most one command with the engine (`busy`); its next packets wait in the socket.
#pragma once
#include <chrono>
#include <cstdint>
#include <functional>
#include <map>
#include <memory>
#include <nlohmann/json.hpp>
#include <string>

#include "coproc/daemon/background_thread.h"
#include "coproc/daemon/mailbox.h"
#include "coproc/daemon/runtime_socket.h"
#include "coproc/engine/engine.h"
#include "shm/base/result.h"
#include "shm/base/unique_fd.h"
#include "shm/control.h"
#include "shm/status_page.h"

namespace kt::coproc {

inline constexpr std::size_t kConnectionsMax = 512;
inline constexpr std::size_t kSessionsMax = shm::kNumRankRowsMax;

// What a hello is compared with and answered from.
struct ServerIdentity {
  std::string fingerprint;
  std::string model_path;
  // The hello reply without what differs by session: daemon_id, model, limits, …
  nlohmann::json hello_reply;
};

class Server {
 public:
  struct Hooks {
    std::function<void()> on_tick;  // Four times a second.
    std::function<void()> on_stop;  // Once: no new sessions from here on. The owner ends what runs, then finish().
  };

  // Watches SIGTERM, and SIGINT unless it is ignored: the caller has blocked both in every thread.
  static Result<std::unique_ptr<Server>> create(RuntimeSocket& socket, shm::StatusPageOwner& status,
                                                ServerIdentity identity, Hooks hooks);
  ~Server();

  // Any thread: runs `work` on the control thread.
  void post(UniqueFunction<void()> work) { mailbox_->post(std::move(work)); }

  // Control thread. Loading is over: sessions may attach. The engine outlives run().
  void serve(Engine& engine);
  // Control thread. run() returns.
  void finish() { finished_ = true; }
  bool shutting_down() const { return draining_ || stopping_; }

  // Until finish(), or until stopping took too long. False: it took too long, and threads may still be at work.
  bool run();

 private:
  using Clock = std::chrono::steady_clock;
  using Json = nlohmann::json;
  struct Connection;

  Server(RuntimeSocket& socket, shm::StatusPageOwner& status, ServerIdentity identity, Hooks hooks);
  Status open_descriptors();
  Status watch(int fd, std::uint64_t token);

  void dispatch(std::uint64_t token, std::uint32_t events);
  void accept_connections();
  void add_connection(UniqueFd socket);
  void tick();
  void request_stop(bool drain, const std::string& who);
  void begin_stop();

  // Connections (connections.cpp). A function that may end the connection says so by returning false.
  Connection* find(std::uint64_t connection_id);
  void on_connection_event(Connection& connection, bool process_ended, std::uint32_t events);
  void update_interest(const Connection& connection);
  bool send(Connection& connection, const Json& body, const std::vector<int>& descriptors = {});
  void refuse_malformed(Connection& connection, const Error& error);
  void lose(Connection& connection, const std::string& how);
  bool said_bye(Connection& connection);
  void close(Connection& connection);
  void end_session(Connection& connection, SessionEnd why, const std::string& how);
  void session_ended(std::uint32_t session_id, const Error& error);
  std::size_t num_sessions() const;

  // Packets (server_packets.cpp).
  void on_packet(Connection& connection, const shm::Packet& packet);
  void on_hello(Connection& connection, const Json& body);
  Status check_hello(const Connection& connection, const struct HelloRequest& hello) const;
  void on_segment(std::uint64_t connection_id, Result<shm::Segment> segment);
  void on_opened(std::uint64_t connection_id, const Status& status);
  void on_adapter_create(Connection& connection, const Json& body);
  void on_adapter_delete(Connection& connection, const Json& body);
  void on_join(Connection& connection, const Json& body);
  void on_bye(Connection& connection, const Json& body);
  void on_status(Connection& connection, const Json& body);
  void on_stop(Connection& connection, const Json& body);
  void reject(Connection& connection, const Error& error);
  bool require_session(Connection& connection);
  bool require_sound(Connection& connection, const Status& checked);  // False: the connection was told.
  OnDone answer_to(Connection& connection);
  // From worker 0's thread: the engine's answer to the connection's command.
  void post_answer(std::uint64_t connection_id, Json body);

  RuntimeSocket& socket_;
  shm::StatusPageOwner& status_;
  const ServerIdentity identity_;
  const Hooks hooks_;
  Engine* engine_ = nullptr;  // Null while loading.

  UniqueFd epoll_, signals_, timer_;
  std::unique_ptr<Mailbox> mailbox_;
  std::map<std::uint64_t, std::unique_ptr<Connection>> connections_;
  std::uint64_t next_connection_id_;
  std::uint32_t next_session_id_ = 1;
  bool accepting_ = true;  // False: out of descriptors, until the next tick.
  bool draining_ = false;  // Stops when the last session has left.
  bool stopping_ = false;
  bool finished_ = false;
  Clock::time_point stop_deadline_;
  BackgroundThread opener_;  // Creates segments. Last: it posts to the mailbox.
};

}  // namespace kt::coproc
