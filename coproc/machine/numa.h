// NUMA: which workers compute which experts, and where memory lies.
#pragma once
#include <cstddef>
#include <string>
#include <vector>

#include "shm/base/result.h"

namespace kt::coproc {

// The value of --numa.
struct NumaChoice {
  enum class Mode {
    kAuto,      // A pool of workers for every NUMA node that has some.
    kOff,       // One pool, memory wherever it is touched first.
    kDeclared,  // A pool for each list of CPUs.
  };
  Mode mode = Mode::kAuto;
  std::vector<std::vector<int>> pools;  // The CPUs of kDeclared: one worker each.
};

// "auto", "off", or lists of CPUs with ';' between pools and ',' and '-' as in taskset: "0-55;56-111". kUsage with why
// and fix for anything else, empty pools and CPUs named twice.
Result<NumaChoice> parse_numa(const std::string& text);

// The NUMA node of a CPU; 0 where the system does not say.
int node_of_cpu(int cpu);

// Prefers pages of that node for memory not touched yet; -1 and systems without NUMA: no effect.
void bind_memory(void* data, std::size_t bytes, int node);

}  // namespace kt::coproc
