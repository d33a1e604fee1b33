// From a slot of a ring to a validated request in its session's queue.
#pragma once
#include <cstdint>

#include "coproc/engine/registry.h"
#include "coproc/experts/dims.h"
#include "shm/ring.h"

namespace kt::coproc {

class Intake {
 public:
  Intake(const ExpertDims& dims, Registry& registry, Accounting& accounting)
      : dims_(dims), registry_(registry), accounting_(accounting) {}

  // Takes what the session's ring holds, at most a ring's worth. Ends a session that sends what no correct client
  // library sends; answers with an error while the daemon shuts down. True: there was something.
  bool receive(Session& session);

 private:
  bool accept(Session& session, const shm::ReceivedRequest& received, std::uint64_t expected);

  const ExpertDims& dims_;
  Registry& registry_;
  Accounting& accounting_;
  std::uint64_t num_arrivals_ = 0;
};

}  // namespace kt::coproc
