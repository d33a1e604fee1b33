// The control packets a rank may send, taken out of JSON and checked. shm/control.h is their specification.
//
// A value of the wrong type or outside its field is malformed: parse_… fails and the connection ends. Values that make
// no sense by themselves are refused by check(): they are answered with an error, and the session goes on. What fits
// the engine's state, the engine says.
#pragma once
#include <cstdint>
#include <nlohmann/json.hpp>
#include <string>

#include "coproc/engine/commands.h"
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
Result<CreateAdapter> parse_adapter_create(const nlohmann::json& body);  // Layers ascending.
Result<DeleteAdapter> parse_adapter_delete(const nlohmann::json& body);
Result<JoinJob> parse_join(const nlohmann::json& body);
Result<bool> parse_stop(const nlohmann::json& body);  // drain

// Each: kInvalidArgument with the value that makes no sense.
Status check(const CreateAdapter& create);
Status check(const DeleteAdapter& remove);
Status check(const JoinJob& join);

}  // namespace kt::coproc
