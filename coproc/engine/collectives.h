// Collectives of a job: run once when they are the next request of every member, or fail for all of them.
#pragma once
#include <cstdint>
#include <string>

#include "coproc/engine/adapter_commands.h"
#include "coproc/engine/agreement.h"
#include "coproc/engine/batches.h"
#include "coproc/engine/heads.h"
#include "coproc/engine/registry.h"

namespace kt::coproc {

class Collectives {
 public:
  Collectives(Registry& registry, const Heads& heads, Batches& batches, AdapterCommands& commands,
              Accounting& accounting, WorkerPool& pool)
      : registry_(registry),
        heads_(heads),
        batches_(batches),
        commands_(commands),
        accounting_(accounting),
        pool_(pool) {}

  // Runs or fails what every job's members wait for. True: it did something.
  bool run(std::uint64_t now_ns);
  std::uint64_t due_ns() const;  // When the next one that waits times out; UINT64_MAX: none waits.

 private:
  bool run_job(Job& job, std::uint64_t now_ns);
  void run_ring(Job& job);
  void run_in_rank_order(Job& job);
  Status apply(Job& job, const Pending& lowest, shm::Reply& reply);
  void differ_in_call(Job& job);
  void time_out(Job& job, std::uint64_t now_ns, std::uint64_t since_ns);
  void disagree(Job& job, const std::string& collective, const Disagreement& disagreement);
  // Since when the session's head waits in a collective; UINT64_MAX: it does not.
  std::uint64_t ring_since_ns(const Session& session) const;
  // The same of its head or its adapter command.
  std::uint64_t since_ns(const Session& session) const;
  const char* name(const Session& session) const;  // Of what it waits in.

  Registry& registry_;
  const Heads& heads_;
  Batches& batches_;
  AdapterCommands& commands_;
  Accounting& accounting_;
  WorkerPool& pool_;
};

}  // namespace kt::coproc
