#include "coproc/daemon/peer.h"

#include <fcntl.h>
#include <sys/socket.h>
#include <sys/syscall.h>

namespace kt::coproc {
namespace {

#ifdef SO_PEERPIDFD
constexpr int kSoPeerPidfd = SO_PEERPIDFD;
#else
constexpr int kSoPeerPidfd = 77;  // Linux 6.5, asm-generic/socket.h
#endif

}  // namespace

UniqueFd peer_pidfd(int socket, pid_t pid) {
  int fd = -1;
  socklen_t bytes = sizeof fd;
  if (::getsockopt(socket, SOL_SOCKET, kSoPeerPidfd, &fd, &bytes) == 0) {
    ::fcntl(fd, F_SETFD, FD_CLOEXEC);
    return UniqueFd(fd);
  }
  return pid > 0 ? UniqueFd(static_cast<int>(::syscall(SYS_pidfd_open, pid, 0))) : UniqueFd();
}

}  // namespace kt::coproc
