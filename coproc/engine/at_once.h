// Requests that involve nobody else and run at once when they reach the head of their queue: FETCH, RELEASE, READ,
// WRITE.
#pragma once
#include "coproc/engine/session.h"
#include "coproc/experts/dims.h"
#include "shm/base/result.h"

namespace kt::coproc {

bool runs_at_once(shm::Verb verb);
// kInvalidArgument: a protocol error.
Status run_at_once(Session& session, const shm::Request& request, const ExpertDims& dims);

}  // namespace kt::coproc
