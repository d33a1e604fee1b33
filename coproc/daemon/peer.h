// Who is at the other end of a Unix socket.
#pragma once
#include <sys/types.h>

#include "shm/base/unique_fd.h"

namespace kt::coproc {

// A descriptor that becomes readable when that process ends; invalid where the kernel has none to give. `pid` is the
// peer's as SO_PEERCRED states it: 0 for a process of another pid namespace.
UniqueFd peer_pidfd(int socket, pid_t pid);

}  // namespace kt::coproc
