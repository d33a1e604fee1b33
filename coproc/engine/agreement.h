// Whether the members of a job ask for the same collective, and the words for it when they do not.
#pragma once
#include <cstdint>
#include <optional>
#include <span>
#include <string>
#include <vector>

#include "coproc/engine/session.h"

namespace kt::coproc {

// One comparable property of a request. `phrase` completes "rank 0 asks for …", e.g. "STEP with lr 0.001 in group 0".
struct Field {
  std::string name;
  std::string phrase;
};

struct Offer {
  std::uint32_t rank = 0;
  std::vector<Field> fields;  // In order of importance; a field exists at a position if those before it agree.
};

struct Disagreement {
  std::string field;
  std::string why;  // "rank 0 asks for STEP with lr 0.001 in group 0, rank 1 for STEP with lr 0.002 in group 0"
};

// Offers ascending by rank, at least one. The first field in which not all equal the lowest rank's.
std::optional<Disagreement> first_disagreement(std::span<const Offer> offers);

// Heads of all members' queues, ascending by rank: verb, adapter, layer, step, groups, group_of; then scale, of which
// the lowest rank's counts and the others may differ by kScaleTolerance, relative.
struct RankedRequest {
  std::uint32_t rank = 0;
  const Pending* pending = nullptr;
  std::uint32_t adapter_id = 0;  // Of a BACKWARD: its activation's, like the layer.
  std::uint32_t layer = 0;
};
inline constexpr double kScaleTolerance = 1e-5;
std::optional<Disagreement> ring_disagreement(std::span<const RankedRequest> requests);

// Commands of all members, ascending by rank: adapter_create or adapter_delete with all its values.
struct RankedCommand {
  std::uint32_t rank = 0;
  const AdapterCommand* command = nullptr;
};
std::optional<Disagreement> command_disagreement(std::span<const RankedCommand> commands);

}  // namespace kt::coproc
