// The control packets a rank may send, taken out of JSON and checked. shm/control.h is their specification.
//
// Two kinds of refusal: a value of the wrong type or outside its field is malformed and ends the connection; a
// well-formed request that cannot be granted is answered with an error.
#pragma once
#include <cstdint>
#include <nlohmann/json.hpp>
#include <string>

#include "coproc/engine/engine.h"
#include "shm/base/result.h"

namespace kt::coproc {

struct HelloRequest {
  std::uint64_t protocol = 0;
  std::uint64_t arena_bytes = 0;
  std::string fingerprint;  // "": any model.
  std::string name;         // One line of valid UTF-8, at most 63 bytes.
};

// Each: kInvalidArgument when malformed.
Result<HelloRequest> parse_hello(const nlohmann::json& body);
Result<CreateAdapter> parse_adapter_create(const nlohmann::json& body);
Result<std::uint32_t> parse_adapter_delete(const nlohmann::json& body);  // The adapter.
Result<JoinJob> parse_join(const nlohmann::json& body);
Result<bool> parse_stop(const nlohmann::json& body);  // drain

// kInvalidArgument: layers or ranks that make no sense. What depends on sessions and jobs, the engine checks.
Status check_adapter_create(const CreateAdapter& create, std::uint32_t num_layers);
Status check_join(const JoinJob& join);

}  // namespace kt::coproc
