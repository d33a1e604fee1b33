// What monitors see: the engine's side of the status page. Worker 0 only; every store is a relaxed atomic.
#pragma once
#include <cstdint>
#include <deque>
#include <string>
#include <vector>

#include "coproc/experts/worker_pool.h"
#include "shm/protocol.h"
#include "shm/status_page.h"

namespace kt::coproc {

struct Job;

// A session's counters. "Waiting" is the time in which it had a request in flight.
struct RankAccount {
  shm::RankRow* row = nullptr;
  std::uint32_t in_flight = 0;
  std::uint64_t waiting_since_ns = 0;  // Valid while in_flight > 0.
  std::uint64_t waited_ns = 0;         // Before waiting_since_ns.
  std::deque<std::uint64_t> samples;   // Waited until each of Accounting's samples.
};

struct MemoryBytes {
  std::uint64_t adapters = 0, gradients = 0, optimizer = 0, activations = 0, arenas = 0;
};

class Accounting {
 public:
  Accounting(shm::StatusPage& page, std::uint32_t num_moe_layers, const WorkerPool& pool);

  // A free row for a new session; false: all kNumRankRowsMax are taken. `account` must stay where it is until closed.
  bool open_rank(RankAccount& account, std::uint64_t now_ns);
  void describe_rank(const RankAccount& account, std::uint32_t session_id, std::uint32_t pid, std::uint32_t rank,
                     const std::string& job_id);
  void close_rank(RankAccount& account);
  void reject_session();

  // Writes a job's row, taking a free one first if it has none and there is one.
  void publish_job(Job& job);
  void close_job(Job& job);

  void received(RankAccount& account, std::uint64_t now_ns);
  // num_tokens counts for FORWARD and BACKWARD that succeeded.
  void answered(RankAccount& account, shm::Verb verb, std::uint32_t num_tokens, bool ok, std::uint64_t received_ns,
                std::uint64_t now_ns);
  void show_state(const RankAccount& account, shm::Verb head);  // kNone: idle.
  void count_batch(std::uint64_t num_tokens);
  void count_step();
  void set_memory(const MemoryBytes& bytes);

  // Samples counters about ten times a second and publishes rates over the last second. True: it did.
  bool tick(std::uint64_t now_ns);
  // True while rates or waiting shares are not yet, or not any more, what they are at rest: tick must go on.
  bool needs_ticks() const { return !at_rest_; }

 private:
  struct Sample {
    std::uint64_t at_ns, forward_tokens, backward_tokens, batch_tokens, batches, busy_ns;
  };
  void take_sample(std::uint64_t now_ns);
  void publish_rates();

  shm::StatusPage& page_;
  const double num_moe_layers_;
  const WorkerPool& pool_;
  std::vector<RankAccount*> ranks_;
  std::uint64_t batch_tokens_ = 0;
  std::deque<Sample> samples_;  // Oldest first; the first is about a second older than the last.
  bool at_rest_ = true;
};

}  // namespace kt::coproc
