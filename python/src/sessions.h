// The sessions of this process, by the integer handle that torch ops carry (schemas know no objects).
#pragma once
#include <cstdint>
#include <memory>
#include <mutex>
#include <set>

#include "client/session.h"

namespace kt::python {

struct OpenSession {
  std::int64_t handle = 0;
  std::unique_ptr<client::Session> session;

  // Adapters with an accumulating BACKWARD since their last STEP or DISCARD: what zero_grad has to discard.
  std::set<std::uint32_t> accumulated() const;
  void note_accumulated(std::uint32_t adapter);
  void forget_accumulated(std::uint32_t adapter);

 private:
  mutable std::mutex mutex_;
  std::set<std::uint32_t> accumulated_;
};

std::shared_ptr<OpenSession> add_session(std::unique_ptr<client::Session> session);
void remove_session(std::int64_t handle);
// Raises when the handle is unknown or closed.
std::shared_ptr<OpenSession> find_session(std::int64_t handle);
// nullptr instead of an exception: for destructors.
std::shared_ptr<OpenSession> find_session_or_null(std::int64_t handle);
// What every use of a closed session raises: kInvalidArgument, through errors.h.
[[noreturn]] void raise_closed();

}  // namespace kt::python
