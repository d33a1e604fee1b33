// The last-level caches of this machine.
#pragma once
#include <cstdint>
#include <string>

namespace kt::coproc {

// All of them together: a machine has one per socket or per group of cores. 32 MiB where the system does not say.
// root: "" for this machine; a test passes a directory with sys/ below it.
std::uint64_t last_level_cache_bytes(const std::string& root = "");

}  // namespace kt::coproc
