// The control packets a rank may send, taken out of JSON and checked. shm/control.h is their specification.
//
// Only the shape is checked here: a value of the wrong type or outside its field is malformed and ends the connection.
// What the values mean, the engine checks: a request that cannot be granted is answered with an error.
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

// Each: kInvalidArgument when malformed. Texts are one line of valid UTF-8.
Result<HelloRequest> parse_hello(const nlohmann::json& body);
Result<CreateAdapter> parse_adapter_create(const nlohmann::json& body);
Result<std::uint32_t> parse_adapter_delete(const nlohmann::json& body);  // The adapter.
Result<JoinJob> parse_join(const nlohmann::json& body);
Result<bool> parse_stop(const nlohmann::json& body);  // drain

}  // namespace kt::coproc
