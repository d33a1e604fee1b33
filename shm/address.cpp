// Where a daemon's socket is, and connecting to it (declared in control.h).
#include <sys/socket.h>
#include <sys/stat.h>
#include <sys/time.h>
#include <sys/un.h>
#include <unistd.h>

#include <array>
#include <cerrno>
#include <cstdlib>
#include <cstring>

#include "shm/control.h"

namespace kt::shm {
namespace {

// sun_path holds 108 bytes with the terminating NUL.
constexpr std::size_t kSocketPathBytesMax = sizeof(sockaddr_un::sun_path) - 1;
static_assert(kSocketPathBytesMax == 107);
constexpr const char* kSocketName = "/kt-coproc/kt.sock";
constexpr const char* kStartFix = "start one: kt-coproc run --model DIR";
// Only a daemon whose queue of new connections is full makes connect() wait.
constexpr timeval kConnectTimeout = {5, 0};

Result<std::string> checked_length(std::string path) {
  if (path.size() <= kSocketPathBytesMax) return path;
  return Error{ErrorCode::kUsage, "the socket path is too long: " + path,
               "it has " + std::to_string(path.size()) + " bytes, a Unix socket's path at most " +
                   std::to_string(kSocketPathBytesMax),
               "choose a shorter one: KT_COPROC=unix:/path, --socket PATH, or a shorter XDG_RUNTIME_DIR"};
}

Result<std::string> search_socket_path() {
  std::string first;
  if (const char* const runtime = std::getenv("XDG_RUNTIME_DIR"); runtime != nullptr && runtime[0] == '/') {
    KT_TRY(first, checked_length(std::string(runtime) + kSocketName));
    if (::access(first.c_str(), F_OK) == 0) return first;
  }
  std::string system = std::string("/run") + kSocketName;
  if (first.empty() || ::access(system.c_str(), F_OK) == 0) return system;
  return first;
}

Error no_daemon(const std::string& path, std::string why) {
  return Error{ErrorCode::kNotFound, "no kt-coproc daemon at " + path, std::move(why), kStartFix};
}

Error connect_error(const std::string& path) {
  switch (errno) {
    case ENOENT:
    case ENOTDIR:
      return no_daemon(path, "there is no such socket");
    case ECONNREFUSED:
      return no_daemon(path, "nobody listens on it: it was left by a daemon that was killed");
    case EPROTOTYPE:
      return no_daemon(path, "it is the socket of another program");
    case EACCES:
    case EPERM:
      return Error{ErrorCode::kPermission, "connecting to " + path + " is not allowed",
                   "it belongs to another user, or a directory on its path is closed to us",
                   "start a daemon of your own: kt-coproc run --model DIR"};
    case EAGAIN:
      return Error{ErrorCode::kTimeout, "the daemon at " + path + " does not answer",
                   "it accepted no connection for " + std::to_string(kConnectTimeout.tv_sec) + " s",
                   "see its log, or restart it"};
    default:
      return os_error("connect", path, kStartFix);
  }
}

// Whoever can write the directory or the socket could have put another daemon in our daemon's place.
Status check_not_writable_by_others(const std::string& path) {
  struct stat status {};
  if (::stat(path.c_str(), &status) != 0) return connect_error(path);
  if ((status.st_mode & (S_IWGRP | S_IWOTH)) == 0) return ok_status();
  std::array<char, 8> mode{};
  std::snprintf(mode.data(), mode.size(), "%04o", status.st_mode & 07777u);
  // A directory with the sticky bit, like /tmp, is meant to be shared: to close it would be bad advice.
  const bool shared = S_ISDIR(status.st_mode) && (status.st_mode & S_ISVTX) != 0;
  return Error{ErrorCode::kPermission, path + " is writable by other users",
               std::string("its mode is ") + mode.data() + ", owner uid " + std::to_string(status.st_uid),
               shared ? "use a socket in a directory of your own: kt-coproc run --socket $XDG_RUNTIME_DIR/kt.sock"
                      : "take the others' write permission away: chmod go-w " + path};
}

Status check_peer(int socket, const std::string& path) {
  ucred peer{};
  socklen_t bytes = sizeof peer;
  if (::getsockopt(socket, SOL_SOCKET, SO_PEERCRED, &peer, &bytes) != 0) {
    return os_error("getsockopt(SO_PEERCRED)", path, kStartFix);
  }
  if (peer.uid == ::geteuid() || peer.uid == 0) return ok_status();
  return Error{ErrorCode::kPermission, "the daemon at " + path + " is not yours",
               "it runs as uid " + std::to_string(peer.uid) + ", this process as uid " + std::to_string(::geteuid()),
               "start a daemon of your own: kt-coproc run --model DIR"};
}

}  // namespace

Result<std::string> resolve_socket_path(const std::string& spec) {
  if (spec.empty() || spec == "auto") return search_socket_path();
  const std::string scheme = "unix:";
  if (spec.rfind(scheme + "/", 0) == 0 && spec.find('\0') == std::string::npos) {
    return checked_length(spec.substr(scheme.size()));
  }
  return Error{ErrorCode::kUsage, "the address \"" + spec + "\" is not valid",
               "KT_COPROC and --socket take auto, or unix: with an absolute path",
               "set KT_COPROC=auto, KT_COPROC=unix:/path/kt.sock, or KT_COPROC=off"};
}

Result<UniqueFd> connect_daemon(const std::string& socket_path) {
  KT_TRY(const std::string path, checked_length(socket_path));
  KT_TRY_STATUS(check_not_writable_by_others(path));
  const std::size_t slash = path.rfind('/');
  KT_TRY_STATUS(check_not_writable_by_others(slash == 0                   ? "/"
                                             : slash == std::string::npos ? "."
                                                                          : path.substr(0, slash)));

  UniqueFd socket(::socket(AF_UNIX, SOCK_SEQPACKET | SOCK_CLOEXEC, 0));
  if (!socket.valid()) return os_error("socket", path, "raise the limit on open files: ulimit -n");
  ::setsockopt(socket.get(), SOL_SOCKET, SO_SNDTIMEO, &kConnectTimeout, sizeof kConnectTimeout);
  sockaddr_un address{};
  address.sun_family = AF_UNIX;
  std::memcpy(address.sun_path, path.data(), path.size());
  int connected = 0;
  do {
    connected = ::connect(socket.get(), reinterpret_cast<const sockaddr*>(&address), sizeof address);
  } while (connected != 0 && errno == EINTR);
  if (connected != 0) return connect_error(path);
  KT_TRY_STATUS(check_peer(socket.get(), path));
  return socket;
}

}  // namespace kt::shm
