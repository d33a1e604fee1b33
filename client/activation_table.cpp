#include "client/activation_table.h"

#include <utility>

#include "shm/base/result.h"

namespace kt::client {

void ActivationTable::insert(std::uint64_t act_id, LiveActivation activation) {
  const std::lock_guard lock(mutex_);
  const bool is_new = live_.emplace(act_id, std::move(activation)).second;
  KT_CHECK(is_new);
}

std::optional<LiveActivation> ActivationTable::find(std::uint64_t act_id) const {
  const std::lock_guard lock(mutex_);
  const auto found = live_.find(act_id);
  if (found == live_.end()) return std::nullopt;
  return found->second;
}

void ActivationTable::consume(std::uint64_t act_id, std::size_t num_chunks) {
  const std::lock_guard lock(mutex_);
  const auto found = live_.find(act_id);
  if (found == live_.end()) return;
  auto& chunks = found->second.chunks;
  KT_CHECK(num_chunks <= chunks.size());
  chunks.erase(chunks.begin(), chunks.begin() + static_cast<std::ptrdiff_t>(num_chunks));
  if (chunks.empty()) live_.erase(found);
}

void ActivationTable::release(std::uint64_t act_id) noexcept {
  const std::lock_guard lock(mutex_);
  auto node = live_.extract(act_id);
  if (node) released_.insert(std::move(node));
}

ActivationTable::Map ActivationTable::take_released() noexcept {
  const std::lock_guard lock(mutex_);
  return std::exchange(released_, {});
}

void ActivationTable::give_back(Map released) noexcept {
  const std::lock_guard lock(mutex_);
  released_.merge(released);
}

}  // namespace kt::client
