#include "client/fork_guard.h"

#include <pthread.h>
#include <unistd.h>

#include <algorithm>
#include <mutex>
#include <vector>

#include "shm/base/result.h"

namespace kt::client {
namespace {

struct Registry {
  std::mutex mutex;
  std::vector<int> sockets;
};

// Never destroyed: a fork may come while the process exits.
Registry& registry() {
  static Registry& instance = *new Registry;
  return instance;
}

// The lock is taken before the fork and released on both sides, so the child finds the list whole.
void before_fork() { registry().mutex.lock(); }
void after_fork_in_parent() { registry().mutex.unlock(); }
void after_fork_in_child() {
  for (const int socket : registry().sockets) ::close(socket);
  registry().sockets.clear();
  registry().mutex.unlock();
}

}  // namespace

ForkGuard::ForkGuard(int socket) : socket_(socket) {
  static const int installed = ::pthread_atfork(before_fork, after_fork_in_parent, after_fork_in_child);
  KT_CHECK(installed == 0);
  const std::lock_guard lock(registry().mutex);
  registry().sockets.push_back(socket_);
}

ForkGuard::~ForkGuard() {
  const std::lock_guard lock(registry().mutex);
  auto& sockets = registry().sockets;
  sockets.erase(std::remove(sockets.begin(), sockets.end(), socket_), sockets.end());
}

}  // namespace kt::client
