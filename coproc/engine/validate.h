// From a request's private copy to one that can be run: every check that needs only the copy and fixed sizes.
//
// A fault is a protocol error: bytes that no correct client library sends. What depends on the state of the job (an
// unknown adapter, a used activation) is checked where the request runs and is survivable.
#pragma once
#include <cstdint>
#include <optional>
#include <string>
#include <vector>

#include "coproc/experts/adapter.h"
#include "coproc/experts/dims.h"
#include "shm/payload.h"
#include "shm/protocol.h"
#include "shm/segment.h"

namespace kt::coproc {

// Why a request is malformed, with the field and its value; nullopt: it is not.
using Fault = std::optional<std::string>;

shm::PayloadShape payload_shape(const ExpertDims& dims);

// Verb, flags, enums, layer, expert range, act_id, and that the payload lies aligned inside the arena (READ, WRITE:
// see check_tensor).
Fault check_request(const shm::Request& request, const ExpertDims& dims, std::uint64_t arena_bytes);
// READ, WRITE: the payload of a tensor of this shape lies inside the arena.
Fault check_tensor(const shm::Request& request, const shm::TensorShape& shape, std::uint64_t arena_bytes);

// FORWARD: copies [T, top_k] ids and checks that each is 0…E.
Fault copy_ids(const shm::Segment& segment, const shm::Request& request, const ExpertDims& dims,
               std::vector<std::int32_t>& ids);
// STEP: copies header and group_of, checks num_groups, decoupled and group numbers, zeroes the unused groups.
Fault copy_step(const shm::Segment& segment, const shm::Request& request, const ExpertDims& dims,
                shm::StepHeader& header, std::vector<std::uint8_t>& group_of);
// NORM: copies group_of.
void copy_norm(const shm::Segment& segment, const shm::Request& request, const ExpertDims& dims,
               std::vector<std::uint8_t>& group_of);

}  // namespace kt::coproc
