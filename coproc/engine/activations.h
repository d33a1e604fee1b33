// What requests may do with activations: use a live one, or keep a new one within the budget.
#pragma once
#include "coproc/engine/registry.h"
#include "coproc/engine/session.h"
#include "coproc/experts/dims.h"
#include "shm/base/result.h"

namespace kt::coproc {

// The live activation that a FETCH or BACKWARD names. kNotFound: there is none. kInvalidArgument, a protocol error:
// its forward had another num_tokens.
Result<const SavedActivation*> find_activation(const Session& session, const shm::Request& request);

class Activations {
 public:
  // bytes_max: of all jobs together, shared equally.
  Activations(const ExpertDims& dims, const Registry& registry, std::uint64_t bytes_max)
      : dims_(dims), registry_(registry), bytes_max_(bytes_max) {}

  // Copies what the backward of a FORWARD needs, as much of it as the budget allows; the ids move out of the request.
  // kActivationLimit with numbers when not even the input may be kept.
  Result<SavedActivation*> keep(Session& session, Pending& head) const;

 private:
  const ExpertDims& dims_;
  const Registry& registry_;
  const std::uint64_t bytes_max_;
};

}  // namespace kt::coproc
