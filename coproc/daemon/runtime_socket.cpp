#include "coproc/daemon/runtime_socket.h"

#include <fcntl.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <sys/un.h>

#include <array>
#include <boost/interprocess/exceptions.hpp>
#include <cerrno>
#include <cstring>

namespace kt::coproc {
namespace {

namespace bip = boost::interprocess;

constexpr int kBacklog = 128;
constexpr const char* kDirectoryFix = "give --socket a path in a directory of your own, or set XDG_RUNTIME_DIR";

Error unsafe(std::string what, std::string why, std::string fix) {
  return Error{ErrorCode::kPermission, std::move(what), std::move(why), std::move(fix)};
}

// Whoever can write the directory could put another socket in ours' place.
Status prepare_directory(const std::string& directory) {
  if (::mkdir(directory.c_str(), 0700) != 0 && errno != EEXIST) return os_error("mkdir", directory, kDirectoryFix);
  const UniqueFd fd(::open(directory.c_str(), O_RDONLY | O_DIRECTORY | O_CLOEXEC));
  struct stat status {};
  if (!fd.valid() || ::fstat(fd.get(), &status) != 0) return os_error("open", directory, kDirectoryFix);
  if (status.st_uid != ::geteuid()) {
    return unsafe("the socket's directory " + directory + " is not ours",
                  "it belongs to uid " + std::to_string(status.st_uid) + ", this process runs as uid " +
                      std::to_string(::geteuid()),
                  kDirectoryFix);
  }
  if ((status.st_mode & 077) != 0) {
    std::array<char, 8> mode{};
    std::snprintf(mode.data(), mode.size(), "%04o", status.st_mode & 07777u);
    // A directory with the sticky bit, like /tmp, is meant to be shared.
    const bool shared = (status.st_mode & S_ISVTX) != 0;
    return unsafe("the socket's directory " + directory + " is open to other users",
                  std::string("its mode is ") + mode.data() + ", it has to be 0700",
                  shared ? kDirectoryFix : "chmod 700 " + directory);
  }
  return ok_status();
}

// The process that holds the lock; 0 when the kernel does not tell (another pid namespace).
int lock_holder(const std::string& lock_path) {
  const UniqueFd fd(::open(lock_path.c_str(), O_RDWR | O_CLOEXEC));
  struct flock request {};
  request.l_type = F_WRLCK;
  request.l_whence = SEEK_SET;
  if (!fd.valid() || ::fcntl(fd.get(), F_GETLK, &request) != 0 || request.l_type == F_UNLCK) return 0;
  return request.l_pid > 0 ? request.l_pid : 0;
}

Result<bip::file_lock> take_lock(const std::string& path) {
  const std::string lock_path = path + ".lock";
  {
    const UniqueFd created(::open(lock_path.c_str(), O_RDWR | O_CREAT | O_CLOEXEC | O_NOFOLLOW, 0600));
    if (!created.valid()) return os_error("open", lock_path, kDirectoryFix);
  }
  try {
    bip::file_lock lock(lock_path.c_str());
    if (lock.try_lock()) return lock;
  } catch (const bip::interprocess_exception& failure) {
    return Error{ErrorCode::kOs, "locking " + lock_path + " failed", failure.what(), kDirectoryFix};
  }
  const int pid = lock_holder(lock_path);
  return Error{ErrorCode::kAlreadyRunning, "a daemon is already running on " + path,
               (pid != 0 ? "process " + std::to_string(pid) : std::string("another process")) + " holds " + lock_path,
               "use it (kt-coproc status --socket " + path + "), stop it (kt-coproc stop --socket " + path +
                   "), or give --socket another path"};
}

// Only called with the lock held: nobody listens on what is there.
Status remove_stale(const std::string& path) {
  struct stat status {};
  if (::lstat(path.c_str(), &status) != 0) {
    return errno == ENOENT ? ok_status() : Status(os_error("lstat", path, kDirectoryFix));
  }
  if (!S_ISSOCK(status.st_mode)) {
    return unsafe(path + " is in the way", "it is not a socket, so it is not ours to remove",
                  "remove it, or give --socket another path");
  }
  if (::unlink(path.c_str()) != 0) return os_error("unlink", path, kDirectoryFix);
  return ok_status();
}

Result<UniqueFd> listen_on(const std::string& path) {
  UniqueFd fd(::socket(AF_UNIX, SOCK_SEQPACKET | SOCK_CLOEXEC | SOCK_NONBLOCK, 0));
  if (!fd.valid()) return os_error("socket", path, "raise the limit on open files: ulimit -n");
  sockaddr_un address{};
  address.sun_family = AF_UNIX;
  KT_CHECK(path.size() < sizeof address.sun_path);
  std::memcpy(address.sun_path, path.data(), path.size());
  if (::bind(fd.get(), reinterpret_cast<const sockaddr*>(&address), sizeof address) != 0) {
    return os_error("bind", path, kDirectoryFix);
  }
  // Nobody else can reach the directory, so the moment before this is safe.
  if (::chmod(path.c_str(), 0600) != 0) return os_error("chmod", path, kDirectoryFix);
  if (::listen(fd.get(), kBacklog) != 0) return os_error("listen", path, kDirectoryFix);
  return fd;
}

}  // namespace

Result<RuntimeSocket> RuntimeSocket::open(const std::string& path) {
  const std::size_t slash = path.rfind('/');
  KT_CHECK(slash != std::string::npos);
  KT_TRY_STATUS(prepare_directory(slash == 0 ? "/" : path.substr(0, slash)));
  RuntimeSocket socket;
  KT_TRY(socket.lock_, take_lock(path));
  KT_TRY_STATUS(remove_stale(path));
  socket.path_ = path;
  auto listening = listen_on(path);
  if (!listening.ok()) {
    ::unlink(path.c_str());  // bind may have made it.
    return std::move(listening).error();
  }
  socket.socket_ = std::move(listening).value();
  return socket;
}

void RuntimeSocket::remove() {
  if (!socket_.valid()) return;
  socket_.reset();
  ::unlink(path_.c_str());
}

}  // namespace kt::coproc
