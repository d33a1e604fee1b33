// A Session's collectives: they run when every member of the job asks for the same.
#include <algorithm>
#include <utility>

#include "client/session_state.h"

namespace kt::client {
namespace {

using shm::Request;
using shm::Verb;

Status check_group_of(std::span<const std::uint8_t> group_of, std::uint32_t num_layers) {
  const std::size_t expected = std::size_t{num_layers} * shm::kNumAdapterTensors;
  if (group_of.size() == expected) return ok_status();
  return invalid("group_of has the wrong size",
                 std::to_string(group_of.size()) + " bytes instead of " + std::to_string(num_layers) + " layers x " +
                     std::to_string(shm::kNumAdapterTensors),
                 "pass one byte per layer and adapter tensor");
}

Request collective(Verb verb, std::uint32_t adapter_id) {
  Request request;
  request.verb = verb;
  request.adapter_id = adapter_id;
  return request;
}

}  // namespace

Status Session::barrier(std::uint32_t adapter_id) {
  KT_TRY_STATUS(state_->run(collective(Verb::kBarrier, adapter_id), std::nullopt, 0, {}));
  return ok_status();
}

Status Session::discard(std::uint32_t adapter_id) {
  KT_TRY_STATUS(state_->run(collective(Verb::kDiscard, adapter_id), std::nullopt, 0, {}));
  return ok_status();
}

Result<double> Session::squared_norm(std::uint32_t adapter_id, std::span<const std::uint8_t> group_of) {
  KT_TRY_STATUS(state_->check_usable());
  const std::uint32_t num_layers = state_->connection.model.num_layers;
  KT_TRY_STATUS(check_group_of(group_of, num_layers));
  const shm::NormPayload payload(num_layers);
  KT_TRY(const shm::Reply reply, state_->run(collective(Verb::kNorm, adapter_id), std::nullopt, payload.bytes,
                                             {{payload.group_of, group_of.data()}}));
  return reply.value;
}

Status Session::step(std::uint32_t adapter_id, double scale, std::span<const shm::StepGroup> groups,
                     std::span<const std::uint8_t> group_of) {
  KT_TRY_STATUS(state_->check_usable());
  const std::uint32_t num_layers = state_->connection.model.num_layers;
  KT_TRY_STATUS(check_group_of(group_of, num_layers));
  if (groups.size() > shm::kNumGroupsMax) {
    return Error{ErrorCode::kUnsupported, "a step has too many groups of hyperparameters",
                 std::to_string(groups.size()) + ", at most " + std::to_string(shm::kNumGroupsMax) + " fit",
                 "merge parameter groups of the optimizer that hold expert adapters"};
  }
  const auto unknown = [&](std::uint8_t group) { return group != shm::kFrozen && group >= groups.size(); };
  if (std::any_of(group_of.begin(), group_of.end(), unknown)) {
    return invalid("group_of names a group that was not passed", std::to_string(groups.size()) + " groups were passed",
                   "use the indices of `groups`, or 255 for what is frozen");
  }
  shm::StepHeader header{};
  header.scale = scale;
  header.num_groups = groups.size();
  std::copy(groups.begin(), groups.end(), std::begin(header.groups));
  Request request = collective(Verb::kStep, adapter_id);
  request.step = state_->steps.load();
  const shm::StepPayload payload(num_layers);
  KT_TRY_STATUS(state_->run(request, std::nullopt, payload.bytes,
                            {{payload.header, &header}, {payload.group_of, group_of.data()}}));
  state_->steps.fetch_add(1);
  return ok_status();
}

}  // namespace kt::client
