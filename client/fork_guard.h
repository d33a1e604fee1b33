// Keeps forked children (data loader workers) from holding a session's socket open: the daemon learns of this process'
// death by the hang-up, which comes only when the last copy of the socket is closed.
#pragma once

namespace kt::client {

// While it lives, a child made by fork() closes its copy of `socket` first of all.
class ForkGuard {
 public:
  explicit ForkGuard(int socket);
  ForkGuard(const ForkGuard&) = delete;
  ForkGuard& operator=(const ForkGuard&) = delete;
  ~ForkGuard();

 private:
  const int socket_;
};

}  // namespace kt::client
