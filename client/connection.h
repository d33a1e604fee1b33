// What connect() gets from the daemon: socket, segment, status page, doorbell, and the facts of its model.
#pragma once
#include <cstdint>

#include "client/session.h"
#include "shm/base/result.h"
#include "shm/base/unique_fd.h"
#include "shm/segment.h"
#include "shm/status_page.h"

namespace kt::client {

struct Connection {
  UniqueFd socket;
  UniqueFd pidfd;  // Of the daemon; invalid where its pid is not visible (another pid namespace).
  shm::Segment segment;
  shm::StatusPageView status;
  UniqueFd doorbell;
  ModelInfo model;
  std::uint32_t batch_tokens_max = 0;  // A request may have no more tokens.
};

// Says hello and checks the answer. Waits for it 10 s at most.
Result<Connection> open_connection(const ConnectOptions& options);

}  // namespace kt::client
