// What may happen to the head of each session's queue.
//
// Invariants
//   A session's requests are answered only at the front of its queue: they take effect in ring order. The exceptions
//   take no effect: failures told at a session's end, and refusals while the daemon shuts down.
//   A waiting head (FORWARD, BACKWARD, a collective) is checked again in every round, because its adapter or activation
//   may be gone. A batch takes only heads that pass check() at that moment.
#pragma once
#include <cstdint>

#include "coproc/engine/registry.h"
#include "coproc/experts/dims.h"

namespace kt::coproc {

// What a batch is made of: the same for all its requests.
struct BatchKey {
  shm::Verb verb = shm::Verb::kNone;
  std::uint32_t layer = 0;
  std::uint32_t adapter_id = 0;
  bool accumulate = false;
  friend bool operator==(const BatchKey&, const BatchKey&) = default;
};

class Heads {
 public:
  // deterministic: accumulating BACKWARDs of a joined job are collectives.
  Heads(const ExpertDims& dims, Registry& registry, Accounting& accounting, bool deterministic)
      : dims_(dims), registry_(registry), accounting_(accounting), deterministic_(deterministic) {}

  // Runs and refuses heads until one has to wait for others; may end the session. True: it did something.
  bool advance(Session& session);

  // What depends on the state of the job: the head can run now.
  static Status check(const Session& session);
  // Of the head; verb kNone: it is not for a batch, or not prepared yet.
  static BatchKey key(const Session& session);
  bool is_collective(const Session& session) const;

 private:
  Status prepare(Session& session, Pending& head) const;
  bool settle(Session& session, const Status& status);

  const ExpertDims& dims_;
  Registry& registry_;
  Accounting& accounting_;
  const bool deterministic_;
};

}  // namespace kt::coproc
