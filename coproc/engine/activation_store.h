// The live activations of one session, and the bytes they hold.
#pragma once
#include <cstddef>
#include <cstdint>
#include <unordered_map>
#include <utility>

#include "coproc/experts/expert_compute.h"

namespace kt::coproc {

class ActivationStore {
 public:
  // nullptr: no such activation is live.
  const SavedActivation* find(std::uint64_t act_id) const {
    const auto found = live_.find(act_id);
    return found == live_.end() ? nullptr : &found->second;
  }
  SavedActivation* find(std::uint64_t act_id) {
    return const_cast<SavedActivation*>(std::as_const(*this).find(act_id));
  }
  // act_id is not live. The activation's vectors keep their sizes from here on, and it stays where it is.
  SavedActivation& add(std::uint64_t act_id, SavedActivation activation) {
    bytes_ += activation.bytes();
    return live_.emplace(act_id, std::move(activation)).first->second;
  }
  // Idempotent.
  void release(std::uint64_t act_id) {
    const auto found = live_.find(act_id);
    if (found != live_.end()) erase(found);
  }
  void release_adapter(std::uint32_t adapter_id) {
    for (auto it = live_.begin(); it != live_.end();) it = it->second.adapter_id == adapter_id ? erase(it) : ++it;
  }
  void clear() {
    live_.clear();
    bytes_ = 0;
  }
  std::size_t size() const { return live_.size(); }
  std::uint64_t bytes() const { return bytes_; }

 private:
  using Map = std::unordered_map<std::uint64_t, SavedActivation>;
  Map::iterator erase(Map::iterator at) {
    bytes_ -= at->second.bytes();
    return live_.erase(at);
  }

  Map live_;  // By act_id.
  std::uint64_t bytes_ = 0;
};

}  // namespace kt::coproc
