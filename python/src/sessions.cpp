#include "python/src/sessions.h"

#include <map>

#include "python/src/errors.h"

namespace kt::python {
namespace {

struct Registry {
  std::mutex mutex;
  std::map<std::int64_t, std::shared_ptr<OpenSession>> sessions;
  std::int64_t next_handle = 1;
};
// Never destroyed: tickets of graphs that outlive main() look their session up.
Registry& registry() {
  static auto* const kRegistry = new Registry;
  return *kRegistry;
}

}  // namespace

std::set<std::uint32_t> OpenSession::accumulated() const {
  const std::lock_guard lock(mutex_);
  return accumulated_;
}
void OpenSession::note_accumulated(std::uint32_t adapter) {
  const std::lock_guard lock(mutex_);
  accumulated_.insert(adapter);
}
void OpenSession::forget_accumulated(std::uint32_t adapter) {
  const std::lock_guard lock(mutex_);
  accumulated_.erase(adapter);
}

std::shared_ptr<OpenSession> add_session(std::unique_ptr<client::Session> session) {
  auto open = std::make_shared<OpenSession>();
  open->session = std::move(session);
  const std::lock_guard lock(registry().mutex);
  open->handle = registry().next_handle++;
  registry().sessions.emplace(open->handle, open);
  return open;
}

void remove_session(std::int64_t handle) {
  std::shared_ptr<OpenSession> last;  // Its destructor says bye: outside of the lock.
  const std::lock_guard lock(registry().mutex);
  const auto it = registry().sessions.find(handle);
  if (it == registry().sessions.end()) return;
  last = std::move(it->second);
  registry().sessions.erase(it);
}

std::shared_ptr<OpenSession> find_session_or_null(std::int64_t handle) {
  const std::lock_guard lock(registry().mutex);
  const auto it = registry().sessions.find(handle);
  return it == registry().sessions.end() ? nullptr : it->second;
}

std::shared_ptr<OpenSession> find_session(std::int64_t handle) {
  auto open = find_session_or_null(handle);
  if (!open) raise_closed();
  return open;
}

void raise_closed() {
  raise({ErrorCode::kInvalidArgument, "kt_coproc: the client is closed", "its session in this process has ended",
         "use the client inside its with block, or kt_coproc.connect() again"});
}

}  // namespace kt::python
