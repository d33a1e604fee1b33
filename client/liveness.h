// Whether the daemon still serves this session, and what every call says once it does not.
#pragma once
#include <atomic>
#include <cstdint>
#include <mutex>
#include <optional>
#include <string>

#include "shm/base/result.h"
#include "shm/protocol.h"

namespace kt::client {

// Why a session is over. kClosed: the daemon lives and ended this session, after a request it could not accept.
enum class End : std::uint8_t { kNone = 0, kDied = 1, kShutDown = 2, kClosed = 3 };

class Liveness {
 public:
  Liveness(std::uint32_t daemon_pid, std::string model_path)
      : daemon_pid_(daemon_pid), model_path_(std::move(model_path)) {}

  End end() const { return end_.load(std::memory_order_acquire); }
  // For ever; the first call wins.
  void set_end(End end);

  // What the messages name: the last request that was sent, and the last one that was refused as malformed.
  void note_request(shm::Verb verb, std::optional<std::uint32_t> layer, std::uint64_t step);
  void note_refusal(const Error& error);
  bool has_refusal() const;

  // What a call returns when the session is over for this reason (not kNone).
  Error error(End end) const;

 private:
  struct LastRequest {
    shm::Verb verb = shm::Verb::kNone;
    std::optional<std::uint32_t> layer;
    std::uint64_t step = 0;
  };
  std::string last_request_text() const;

  const std::uint32_t daemon_pid_;
  const std::string model_path_;
  std::atomic<End> end_ = End::kNone;
  mutable std::mutex mutex_;
  LastRequest last_request_;
  std::optional<Error> refusal_;
};

}  // namespace kt::client
