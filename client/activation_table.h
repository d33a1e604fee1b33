// The activations the daemon keeps for this session, and those to be released.
//
//   forward  ──insert──►  live  ──release()──►  released  ──take_released()──►  RELEASE requests
//                          └──backward without KEEP: erase
//
// A split forward keeps one activation per chunk in the daemon, under ids of its own; the caller knows the one logical
// id. release() moves a map node: it never allocates, so it may run in destructors. No lock is held across anything
// that waits.
#pragma once
#include <cstdint>
#include <map>
#include <mutex>
#include <optional>
#include <vector>

namespace kt::client {

struct ActivationChunk {
  std::uint64_t act_id = 0;  // On the wire.
  std::uint32_t num_tokens = 0;
};

struct LiveActivation {
  std::uint32_t layer = 0;
  std::uint32_t num_tokens = 0;
  std::vector<ActivationChunk> chunks;  // In token order.
};

class ActivationTable {
 public:
  using Map = std::map<std::uint64_t, LiveActivation>;  // By logical act_id.

  void insert(std::uint64_t act_id, LiveActivation activation);
  std::optional<LiveActivation> find(std::uint64_t act_id) const;
  // The daemon consumed the first `num_chunks` chunks; the activation goes with its last one.
  void consume(std::uint64_t act_id, std::size_t num_chunks);

  // Unknown and already released ids are ignored: the forward failed, or a backward consumed it.
  void release(std::uint64_t act_id) noexcept;

  // All that wait for their RELEASE; and back again what could not be sent.
  Map take_released() noexcept;
  void give_back(Map released) noexcept;

 private:
  mutable std::mutex mutex_;
  Map live_;
  Map released_;
};

}  // namespace kt::client
