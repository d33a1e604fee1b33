// The control packets, one function each (declared in server.h).
#include <fcntl.h>
#include <spdlog/spdlog.h>

#include "coproc/daemon/connection.h"
#include "coproc/daemon/control_requests.h"
#include "coproc/machine/memory_room.h"
#include "shm/doorbell.h"

namespace kt::coproc {
namespace {

Error malformed(std::string why) {
  return Error{ErrorCode::kInvalidArgument, "a control packet that makes no sense here", std::move(why),
               "run client and daemon of the same kt-coproc release"};
}

std::string daemon_name(const shm::StatusPage& page) { return "the daemon (pid " + std::to_string(page.pid) + ")"; }

Error loading_error(const shm::StatusPage& page) {
  const double done = static_cast<double>(page.load_bytes_done.load(std::memory_order_relaxed));
  const std::uint64_t total = page.load_bytes_total.load(std::memory_order_relaxed);
  const int percent = total == 0 ? 0 : static_cast<int>(100 * done / static_cast<double>(total));
  return Error{ErrorCode::kLoading, daemon_name(page) + " is still loading its weights",
               std::to_string(percent) + " % of " + bytes_text(total) + " are loaded", "kt-coproc wait --ready"};
}

Error shutdown_error(const shm::StatusPage& page) {
  return Error{ErrorCode::kCoprocDied, daemon_name(page) + " is shutting down",
               "it was asked to stop and takes no new sessions", "start one: kt-coproc run --model DIR"};
}

Result<UniqueFd> duplicate(int fd) {
  UniqueFd copy(::fcntl(fd, F_DUPFD_CLOEXEC, 0));
  if (!copy.valid()) return os_error("fcntl(F_DUPFD_CLOEXEC)", "session", "raise the limit on open files: ulimit -n");
  return copy;
}

}  // namespace

void Server::on_packet(Connection& connection, const shm::Packet& packet) {
  using Handler = void (Server::*)(Connection&, const Json&);
  static constexpr std::pair<std::string_view, Handler> kHandlers[] = {
      {"hello", &Server::on_hello},
      {"adapter_create", &Server::on_adapter_create},
      {"adapter_delete", &Server::on_adapter_delete},
      {"join", &Server::on_join},
      {"bye", &Server::on_bye},
      {"status", &Server::on_status},
      {"stop", &Server::on_stop},
  };
  if (connection.refusal) {
    const Error refusal = *connection.refusal;
    status_.page().totals.sessions_rejected.fetch_add(1, std::memory_order_relaxed);
    if (send(connection, shm::error_reply(refusal))) close(connection);
    return;
  }
  if (!packet.descriptors.empty()) return refuse_malformed(connection, malformed("descriptors came with it"));
  const auto op = packet.body.find("op");
  if (op == packet.body.end() || !op->is_string()) return refuse_malformed(connection, malformed("it has no \"op\""));
  const std::string name = op->get<std::string>();
  for (const auto& [known, handler] : kHandlers) {
    if (name == known) return (this->*handler)(connection, packet.body);
  }
  refuse_malformed(connection, malformed("its \"op\" is unknown"));
}

// An error in answer to a hello: that process gets no session.
void Server::reject(Connection& connection, const Error& error) {
  status_.page().totals.sessions_rejected.fetch_add(1, std::memory_order_relaxed);
  send(connection, shm::error_reply(error));
}

Status Server::check_hello(const Connection& connection, const HelloRequest& hello) const {
  const shm::StatusPage& page = status_.page();
  if (hello.protocol != shm::kProtocolVersion) {
    return Error{ErrorCode::kVersionMismatch, daemon_name(page) + " speaks another protocol version",
                 "daemon " + std::to_string(shm::kProtocolVersion) + ", this process " + std::to_string(hello.protocol),
                 "run client and daemon of the same kt-coproc release"};
  }
  if (shutting_down()) return shutdown_error(page);
  if (!hello.fingerprint.empty() && hello.fingerprint != identity_.fingerprint) {
    return Error{ErrorCode::kModelMismatch, "the daemon serves another model than this process loads",
                 "daemon: " + identity_.model_path + ", fingerprint " + identity_.fingerprint.substr(0, 16) +
                     "…; this process: fingerprint " + hello.fingerprint.substr(0, 16) + "…",
                 "start a daemon for that model, or set KT_COPROC_OTHER_MODELS=plain to run it without"};
  }
  if (engine_ == nullptr) return loading_error(page);
  if (hello.arena_bytes < shm::kArenaBytesMin || hello.arena_bytes > shm::kArenaBytesMax) {
    return Error{ErrorCode::kInvalidArgument, "an arena of " + std::to_string(hello.arena_bytes) + " bytes",
                 "it may have " + std::to_string(shm::kArenaBytesMin) + " to " + std::to_string(shm::kArenaBytesMax),
                 "ask for a size in that range"};
  }
  if (num_sessions() >= kSessionsMax) {
    return Error{ErrorCode::kNoResources, "the daemon takes no more sessions",
                 std::to_string(kSessionsMax) + " are attached", "end processes that hold one"};
  }
  return require_memory(read_memory_room(read_cgroup_limits()), hello.arena_bytes, "the arena of " + connection.who());
}

void Server::on_hello(Connection& connection, const Json& body) {
  if (connection.session_id != 0) return refuse_malformed(connection, malformed("it has a session already"));
  auto hello = parse_hello(body);
  if (!hello.ok()) return refuse_malformed(connection, hello.error());
  connection.name = hello.value().name;
  if (const Status status = check_hello(connection, hello.value()); !status.ok()) {
    spdlog::info("refused a session ({}): {}", connection.who(), status.error().what);
    return reject(connection, status.error());
  }
  connection.session_id = next_session_id_++;
  connection.busy = true;
  update_interest(connection);
  const auto create = [this, connection_id = connection.id, session_id = connection.session_id,
                       arena_bytes = hello.value().arena_bytes] {
    post([this, connection_id, segment = shm::Segment::create(session_id, arena_bytes)]() mutable {
      on_segment(connection_id, std::move(segment));
    });
  };
  opener_.post(create);
}

void Server::on_segment(std::uint64_t connection_id, Result<shm::Segment> segment) {
  Connection* const connection = find(connection_id);
  if (connection == nullptr) return;  // It went away meanwhile.
  const auto refuse = [&](const Error& error) {
    connection->session_id = 0;
    connection->busy = false;
    update_interest(*connection);
    spdlog::warn("refused a session ({}): {}: {}", connection->who(), error.what, error.why);
    reject(*connection, error);
  };
  if (shutting_down()) return refuse(shutdown_error(status_.page()));
  if (!segment.ok()) return refuse(segment.error());
  auto doorbell = shm::create_doorbell();
  if (!doorbell.ok()) return refuse(doorbell.error());
  auto segment_fd = duplicate(segment.value().fd());
  if (!segment_fd.ok()) return refuse(segment_fd.error());
  auto doorbell_fd = duplicate(doorbell.value().get());
  if (!doorbell_fd.ok()) return refuse(doorbell_fd.error());
  connection->segment_fd = std::move(segment_fd).value();
  connection->doorbell_fd = std::move(doorbell_fd).value();

  spdlog::info("session {} attached ({}; arena {}, {} pages)", connection->session_id, connection->who(),
               bytes_text(segment.value().arena_bytes()), segment.value().page_bytes() > 4096 ? "2 MiB" : "4 KiB");
  connection->is_open = true;
  OpenSession open{connection->session_id, connection->pid, connection->name, std::move(segment).value(),
                   std::move(doorbell).value()};
  engine_->open_session(std::move(open), [this, connection_id](Status status) {
    post([this, connection_id, status = std::move(status)] { on_opened(connection_id, status); });
  });
}

void Server::on_opened(std::uint64_t connection_id, const Status& status) {
  Connection* const connection = find(connection_id);
  if (connection == nullptr) return;
  const UniqueFd segment_fd = std::move(connection->segment_fd);
  const UniqueFd doorbell_fd = std::move(connection->doorbell_fd);
  connection->busy = false;
  update_interest(*connection);
  if (!status.ok()) {
    connection->session_id = 0;  // The engine counted it as rejected.
    connection->is_open = false;
    send(*connection, shm::error_reply(status.error()));
    return;
  }
  Json reply = identity_.hello_reply;
  reply["session_id"] = connection->session_id;
  send(*connection, reply, {segment_fd.get(), status_.fd(), doorbell_fd.get()});
}

bool Server::require_session(Connection& connection) {
  if (connection.session_id != 0) return true;
  refuse_malformed(connection, malformed("it needs a session: hello comes first"));
  return false;
}

bool Server::require_sound(Connection& connection, const Status& checked) {
  if (!checked.ok()) send(connection, shm::error_reply(checked.error()));
  return checked.ok();
}

void Server::post_answer(std::uint64_t connection_id, Json body) {
  post([this, connection_id, body = std::move(body)] {
    Connection* const waiting = find(connection_id);
    if (waiting == nullptr) return;
    waiting->busy = false;
    update_interest(*waiting);
    send(*waiting, body);
  });
}

OnDone Server::answer_to(Connection& connection) {
  connection.busy = true;
  update_interest(connection);
  return [this, connection_id = connection.id](const Status& status) {
    post_answer(connection_id, status.ok() ? Json{{"ok", true}} : shm::error_reply(status.error()));
  };
}

void Server::on_adapter_create(Connection& connection, const Json& body) {
  if (!require_session(connection)) return;
  auto create = parse_adapter_create(body);
  if (!create.ok()) return refuse_malformed(connection, create.error());
  if (!require_sound(connection, check(create.value()))) return;
  engine_->create_adapter(connection.session_id, std::move(create).value(), answer_to(connection));
}

void Server::on_adapter_delete(Connection& connection, const Json& body) {
  if (!require_session(connection)) return;
  const auto remove = parse_adapter_delete(body);
  if (!remove.ok()) return refuse_malformed(connection, remove.error());
  if (!require_sound(connection, check(remove.value()))) return;
  engine_->delete_adapter(connection.session_id, remove.value().adapter_id, answer_to(connection));
}

void Server::on_join(Connection& connection, const Json& body) {
  if (!require_session(connection)) return;
  auto join = parse_join(body);
  if (!join.ok()) return refuse_malformed(connection, join.error());
  if (!require_sound(connection, check(join.value()))) return;
  connection.busy = true;
  update_interest(connection);
  engine_->join(connection.session_id, std::move(join).value(),
                [this, connection_id = connection.id](const Result<JoinAnswer>& joined) {
                  post_answer(connection_id, joined.ok() ? Json{{"ok", true}, {"step", joined.value().step}}
                                                         : shm::error_reply(joined.error()));
                });
}

void Server::on_bye(Connection& connection, const Json&) {
  if (connection.session_id == 0) {
    if (send(connection, Json{{"ok", true}})) close(connection);
    return;
  }
  connection.busy = true;
  update_interest(connection);
  spdlog::info("session {} left ({})", connection.session_id, connection.who());
  const std::uint32_t session_id = std::exchange(connection.session_id, 0);
  engine_->end_session(session_id, SessionEnd::kBye, [this, connection_id = connection.id] {
    post([this, connection_id] {
      Connection* const leaving = find(connection_id);
      if (leaving != nullptr && send(*leaving, Json{{"ok", true}})) close(*leaving);
    });
  });
}

void Server::on_status(Connection& connection, const Json&) {
  send(connection, Json{{"ok", true}, {"pid", status_.page().pid}}, {status_.fd()});
}

void Server::on_stop(Connection& connection, const Json& body) {
  const auto drain = parse_stop(body);
  if (!drain.ok()) return refuse_malformed(connection, drain.error());
  const std::string who = (drain.value() ? "stop --drain (" : "stop (") + connection.who() + ")";
  if (send(connection, Json{{"ok", true}, {"pid", status_.page().pid}})) request_stop(drain.value(), who);
}

}  // namespace kt::coproc
