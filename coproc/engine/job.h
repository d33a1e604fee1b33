// A job: the sessions that train one set of adapters together, and the unit of failure.
//
// A session starts as a job of one; join() merges jobs. A job lives until its last session is gone.
#pragma once
#include <cstdint>
#include <map>
#include <memory>
#include <optional>
#include <string>
#include <vector>

#include "coproc/experts/adapter.h"
#include "shm/base/result.h"
#include "shm/status_page.h"

namespace kt::coproc {

struct Session;

struct Member {
  std::uint32_t rank = 0;
  Session* session = nullptr;  // nullptr: died or left.
};

// What every member is told once a job has failed; rank, layer and step are the dead rank's (0 for other failures).
struct JobFailure {
  Error error;
  std::uint32_t rank = 0;
  std::uint32_t layer = 0;
  std::uint64_t step = 0;
};

struct Job {
  std::uint64_t key = 0;  // Unique in this daemon; the order of creation.
  std::string id;         // For people: two jobs may have the same.
  std::string name;
  std::uint32_t world_size = 1;
  std::vector<Member> members;  // Ascending by rank.
  bool joined = false;          // False: the job of one a session starts with.
  std::map<std::uint32_t, std::unique_ptr<Adapter>> adapters;
  std::uint64_t step = 0;  // STEPs since join.
  std::uint64_t collective_timeout_ns = 0;
  std::optional<JobFailure> failure;    // Engaged: FAILED.
  std::optional<JobFailure> departure;  // A member said bye: what collectives are answered with from then on.
  shm::JobRow* row = nullptr;           // nullptr: all rows of the status page are taken.

  Adapter* find_adapter(std::uint32_t adapter_id) const;
  bool has_sessions() const;
  std::vector<Session*> sessions() const;    // Those still there, ascending by rank.
  std::vector<std::uint32_t> ranks() const;  // All members', also of those who left.
};

// Where two jobs' adapters differ, as "adapter 1: r of gate_up is 8 in layer 3 for rank 0, 4 for rank 1"; empty: equal.
std::string adapters_difference(const Job& job_a, std::uint32_t rank_a, const Job& job_b, std::uint32_t rank_b,
                                std::uint32_t num_layers);

}  // namespace kt::coproc
