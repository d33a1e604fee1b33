// The two ends of a session's ring. Positions are private to each end: request i lies in slot (i - 1) % kNumSlots
// (protocol.h, W1 and W2). Both ends refer to a Segment that must outlive them and stay where it is.
#pragma once
#include <atomic>
#include <cstdint>
#include <optional>
#include <string>

#include "shm/base/result.h"
#include "shm/protocol.h"
#include "shm/segment.h"

namespace kt::shm {

// One request as the daemon sees it: a private copy.
struct ReceivedRequest {
  std::uint64_t sequence = 0;
  Request request;
};

// The rank's end. try_submit and consume are called under the owner's mutex; try_reply, message, wait_done and
// wake_all_waiters by any thread at any time: they touch the slot of a request that was submitted and not consumed.
class RankRing {
 public:
  // Reads the position from the slots: attach never assumes 0. A request found unanswered keeps its slot until it is
  // consumed, like one of our own.
  explicit RankRing(const Segment& segment);
  RankRing(const RankRing&) = delete;
  RankRing& operator=(const RankRing&) = delete;

  // Publishes a request and returns its sequence, or nullopt when the slot it needs still holds an unconsumed reply
  // (256 in flight): the caller waits for the oldest one. Does not ring the doorbell.
  std::optional<std::uint64_t> try_submit(const Request& request);

  // The reply of `sequence`, or nullopt while it is not done. Does not free the slot.
  std::optional<Reply> try_reply(std::uint64_t sequence) const;
  std::string message(std::uint64_t sequence, const Reply& reply) const;
  // Frees the slot of `sequence`; its reply and message have been read. Any order.
  void consume(std::uint64_t sequence);

  // Sleeps on the slot's futex until it is done, `timeout_ns` passed (2^64 - 1: no limit) or wake_all_waiters was
  // called; spins `spin_ns` first. True: done. Several threads may wait for one request. A wait that another thread
  // overtakes by consuming the request ends by its timeout at the latest.
  bool wait_done(std::uint64_t sequence, std::uint64_t spin_ns, std::uint64_t timeout_ns) const;
  // Releases every waiter of this process without a reply (the watchdog's: the daemon died): waiters, also later
  // ones, return at once, false unless their request is done. Returns when nobody sleeps any more. For ever.
  void wake_all_waiters() const;

 private:
  const Segment& segment_;
  std::uint64_t next_sequence_ = 1;
  bool slot_busy_[kNumSlots] = {};
  mutable std::atomic<bool> released_ = false;
  mutable std::atomic<std::uint32_t> num_sleepers_ = 0;
};

// The daemon's end, used by one thread at a time. Never has more than kNumSlots requests received and unanswered: a
// rank that publishes into the slot of an unanswered request is not heard before the answer.
class DaemonRing {
 public:
  // Reads the position from the slots: the oldest unanswered request is next.
  explicit DaemonRing(const Segment& segment);
  DaemonRing(const DaemonRing&) = delete;
  DaemonRing& operator=(const DaemonRing&) = delete;

  // The next published request, copied; nullopt when there is none (its slot holds an older sequence, or its former
  // request is unanswered). A newer sequence than the expected one is hostile: it is returned with an empty request
  // (Verb::kNone), the position stays, and the caller ends the session. So:
  //     const std::uint64_t expected = ring.expected_sequence();
  //     if (auto received = ring.try_receive(); received && received->sequence != expected) …end the session…
  // A hostile request has no reply().
  std::optional<ReceivedRequest> try_receive();
  std::uint64_t expected_sequence() const { return next_sequence_; }
  // True when try_receive would return something (seq_cst load: S1).
  bool has_request() const;

  // Answers a received request, once: writes the reply, then done_seq, and wakes a sleeping waiter. With an error,
  // its code and its text go out (message: what, why and fix, each ended by '\n', the longest cut first to fit
  // kMessageBytes). A sequence that is not received and unanswered is our bug.
  void reply(std::uint64_t sequence, Reply reply, const Error* error = nullptr);

 private:
  const Segment& segment_;
  std::uint64_t next_sequence_ = 1;
  std::uint64_t unanswered_[kNumSlots] = {};  // The sequence received and not answered, by slot; else 0.
};

// The error a reply and its message carry: the inverse of DaemonRing::reply. Never has an empty line.
Error error_from_reply(const Reply& reply, const std::string& message);

}  // namespace kt::shm
