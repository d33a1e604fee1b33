// The daemon's place in the file system: a listening socket in a directory of its own, and the lock beside it.
//
//   $XDG_RUNTIME_DIR/kt-coproc/   0700, ours
//       kt.sock                   0600, removed at exit
//       kt.sock.lock              held while the daemon lives; stays, empty
//
// The kernel drops the lock with the process, however it ends: who holds it may remove a socket that was left behind.
#pragma once
#include <boost/interprocess/sync/file_lock.hpp>
#include <string>

#include "shm/base/result.h"
#include "shm/base/unique_fd.h"

namespace kt::coproc {

class RuntimeSocket {
 public:
  // path: absolute, at most 107 bytes. Creates the directory (not its parents). kPermission: the directory is not ours
  // or open to others. kAlreadyRunning: another daemon holds the lock; names its pid.
  static Result<RuntimeSocket> open(const std::string& path);
  RuntimeSocket(RuntimeSocket&&) = default;
  RuntimeSocket& operator=(RuntimeSocket&&) = delete;
  ~RuntimeSocket() { remove(); }

  int fd() const { return socket_.get(); }
  const std::string& path() const { return path_; }
  // Stops listening and removes the socket. The lock is held until this object ends.
  void remove();

 private:
  RuntimeSocket() = default;
  std::string path_;
  boost::interprocess::file_lock lock_;
  UniqueFd socket_;
};

}  // namespace kt::coproc
