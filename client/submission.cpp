#include "client/submission.h"

#include <algorithm>
#include <chrono>
#include <cstring>

#include "shm/doorbell.h"

namespace kt::client {
namespace {

// A reply that comes within one context switch is caught spinning. Longer spinning would take the core from the
// daemon's workers on small machines, which is where the reply is made.
constexpr std::uint64_t kSpinNs = 5'000;
// Between looks at liveness. The watchdog wakes sleepers anyway; this bounds a wait if it could not.
constexpr std::uint64_t kWaitNs = 100'000'000;

std::size_t slot_of(std::uint64_t sequence) { return (sequence - 1) % shm::kNumSlots; }

}  // namespace

void poison(std::span<const OutputPart> outputs) {
  for (const OutputPart& output : outputs) {
    if (output.bytes != 0) std::memset(output.data, 0xFF, output.bytes);
  }
}

Submission::Submission(const shm::Segment& segment, int doorbell, Liveness& liveness)
    : segment_(segment), doorbell_(doorbell), liveness_(liveness), ring_(segment) {}

Status Submission::check_open() const {
  if (const End end = liveness_.end(); end != End::kNone) return liveness_.error(end);
  // Requests in flight still complete, so a shutdown is not yet the end of the session: it only takes no new ones.
  if (segment_.header().state.load(std::memory_order_acquire) == shm::SessionState::kShuttingDown) {
    return liveness_.error(End::kShutDown);
  }
  return ok_status();
}

Result<std::uint64_t> Submission::claim(std::unique_lock<std::mutex>& lock, const shm::Request& request) {
  for (;;) {
    KT_TRY_STATUS(check_open());
    reap_posted();
    if (const auto sequence = ring_.try_submit(request)) return *sequence;
    wait_for_slot(lock);
  }
}

Result<std::uint64_t> Submission::submit(const shm::Request& request, std::span<const OutputPart> outputs) {
  KT_CHECK(outputs.size() <= kNumOutputsMax);
  std::unique_lock lock(mutex_);
  KT_TRY(const std::uint64_t sequence, claim(lock, request));
  Outstanding& outstanding = outstanding_[slot_of(sequence)];
  outstanding = {};
  outstanding.sequence = sequence;
  std::copy(outputs.begin(), outputs.end(), outstanding.outputs.begin());
  outstanding.num_outputs = outputs.size();
  lock.unlock();
  shm::ring_if_sleeping(segment_, doorbell_);
  return sequence;
}

Result<shm::Reply> Submission::finish(std::uint64_t sequence) {
  while (!ring_.wait_done(sequence, kSpinNs, kWaitNs) && liveness_.end() == End::kNone) {
  }
  std::unique_lock lock(mutex_);
  Outstanding& outstanding = outstanding_[slot_of(sequence)];
  const auto reply = ring_.try_reply(sequence);
  if (!reply || outstanding.poisoned) {
    // The slot stays taken: nothing is submitted any more. close() may not have come to it yet.
    poison(outstanding.parts());
    outstanding = {};
    return liveness_.error(liveness_.end());
  }
  const std::string message = ring_.message(sequence, *reply);
  ring_.consume(sequence);
  outstanding = {};
  lock.unlock();
  slot_freed_.notify_all();
  if (reply->code == static_cast<std::uint32_t>(ErrorCode::kOk)) return *reply;
  Error error = shm::error_from_reply(*reply, message);
  if (error.code == ErrorCode::kInvalidArgument) liveness_.note_refusal(error);
  return error;
}

Status Submission::post(const shm::Request& request) {
  std::unique_lock lock(mutex_);
  KT_TRY(const std::uint64_t sequence, claim(lock, request));
  posted_.push_back(sequence);
  lock.unlock();
  shm::ring_if_sleeping(segment_, doorbell_);
  return ok_status();
}

bool Submission::try_post(const shm::Request& request) {
  {
    const std::lock_guard lock(mutex_);
    if (!check_open().ok()) return false;
    reap_posted();
    const auto sequence = ring_.try_submit(request);
    if (!sequence) return false;
    posted_.push_back(*sequence);
  }
  shm::ring_if_sleeping(segment_, doorbell_);
  return true;
}

void Submission::reap_posted() {
  while (!posted_.empty()) {
    const std::uint64_t sequence = posted_.front();
    const auto reply = ring_.try_reply(sequence);
    if (!reply) return;
    const Error error = shm::error_from_reply(*reply, ring_.message(sequence, *reply));
    if (error.code == ErrorCode::kInvalidArgument) liveness_.note_refusal(error);
    ring_.consume(sequence);
    posted_.pop_front();
  }
}

void Submission::wait_for_slot(std::unique_lock<std::mutex>& lock) {
  if (posted_.empty()) {
    slot_freed_.wait_for(lock, std::chrono::nanoseconds(kWaitNs));
    return;
  }
  // Nobody else waits for a posted request's reply. Another thread may reap it meanwhile; then this wait ends by its
  // timeout at the latest, and the caller looks again.
  const std::uint64_t oldest = posted_.front();
  lock.unlock();
  ring_.wait_done(oldest, kSpinNs, kWaitNs);
  lock.lock();
}

void Submission::close() {
  {
    const std::lock_guard lock(mutex_);
    for (Outstanding& outstanding : outstanding_) {
      // An answered request, whose waiter has not come yet, keeps its result.
      if (outstanding.sequence == 0 || ring_.try_reply(outstanding.sequence)) continue;
      poison(outstanding.parts());
      outstanding.poisoned = true;
    }
  }
  ring_.wake_all_waiters();
  slot_freed_.notify_all();
}

}  // namespace kt::client
