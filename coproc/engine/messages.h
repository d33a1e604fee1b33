// Words for messages: who, which request, when. Every error names rank, layer, step, field and values where it has
// them.
#pragma once
#include <cstdint>
#include <string>

#include "coproc/engine/job.h"
#include "coproc/engine/session.h"

namespace kt::coproc {

const char* adapter_tensor_name(shm::AdapterTensor tensor);  // "gate_a", …
const char* command_name(const AdapterCommand& command);     // "adapter_create", "adapter_delete"

// "rank 1 (pid 123) of job 'abc'"
std::string describe(const Session& session);
// "FORWARD of layer 3 with adapter 1 in step 5": what the rank asked for, the layer from its activation if it has one.
std::string describe(const Session& session, const shm::Request& request);
// "FORWARD of layer 3 in step 5, 1.2 s ago"
std::string describe(const LastRequest& last, std::uint64_t now_ns);

// A malformed request: ends the session (kInvalidArgument).
Error protocol_error(const Session& session, const shm::Request& request, std::string why);
Error unknown_adapter(const Session& session, const shm::Request& request);
Error unknown_activation(const Session& session, const shm::Request& request);
Error stale_activation(const Session& session, const shm::Request& request, const SavedActivation& activation);
// A session's end, for its peers. reason: what it was told when it broke the protocol.
Error rank_gone(const Session& session, SessionEnd why, const Error& reason, std::uint64_t now_ns);
Error shutting_down_error();

}  // namespace kt::coproc
