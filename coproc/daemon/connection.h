// One control connection, as the server keeps it. Only server's own files include this.
#pragma once
#include <optional>
#include <string>

#include "coproc/daemon/server.h"

namespace kt::coproc {

struct Server::Connection {
  std::uint64_t id = 0;
  UniqueFd socket;
  UniqueFd pidfd;         // Invalid where the kernel has none to give.
  std::uint32_t pid = 0;  // For display only: it may be 0, or another namespace's.
  Clock::time_point opened;
  std::optional<Error> refusal;  // The answer to whatever it asks first. Answered only then: a reply that arrives with
                                 // the end of the connection, while the peer still sends, may be lost.

  bool has_spoken = false;
  bool busy = false;              // A command is with the engine (server.h).
  bool throttled = false;         // Sent too many packets: not heard until the next tick.
  std::uint32_t num_packets = 0;  // Since the last tick.

  std::uint32_t session_id = 0;  // 0: none.
  bool is_open = false;          // The engine knows the session.
  std::string name;              // KT_COPROC_JOB.
  UniqueFd segment_fd;           // Between the session's opening and the reply to hello.
  UniqueFd doorbell_fd;

  std::string who() const {
    std::string text = "pid " + (pid != 0 ? std::to_string(pid) : std::string("unknown"));
    return name.empty() ? text : text + ", job '" + name + "'";
  }
};

}  // namespace kt::coproc
