// A session: one rank process, seen from the daemon. It owns the ring end, the requests in flight and the activations.
//
//   slot → DaemonRing → queue (in ring order) → answered at the front, one after the other
#pragma once
#include <cstdint>
#include <deque>
#include <memory>
#include <string>
#include <vector>

#include "coproc/engine/accounting.h"
#include "coproc/engine/activation_store.h"
#include "coproc/engine/commands.h"
#include "shm/ring.h"

namespace kt::coproc {

struct Job;
struct JobFailure;

// A request received and not yet answered. What it needs from the arena besides floats is copied once, when it becomes
// the head of its queue: so a session holds at most one private copy.
struct Pending {
  std::uint64_t sequence = 0;
  shm::Request request;  // The private, validated copy.
  std::uint64_t received_ns = 0;
  std::uint64_t arrival = 0;                // Order of receipt over all sessions.
  std::uint64_t head_ns = 0;                // When it became the head; 0: not yet. Deadlines count from here.
  std::vector<std::int32_t> ids;            // FORWARD: [T, top_k], 0…E.
  std::unique_ptr<shm::StepHeader> header;  // STEP: groups from num_groups on are zero.
  std::vector<std::uint8_t> group_of;       // STEP, NORM: [num_layers][kNumAdapterTensors].
};

// The latest request of a rank other than RELEASE, for the messages its peers get.
struct LastRequest {
  const char* name = "hello";
  bool has_layer = false;
  std::uint32_t layer = 0;
  std::uint64_t step = 0;
  std::uint64_t at_ns = 0;
};

struct Session {
  explicit Session(OpenSession&& open)
      : id(open.session_id),
        pid(open.pid),
        name(std::move(open.name)),
        segment(std::move(open.segment)),
        doorbell(std::move(open.doorbell)),
        ring(segment) {}

  // Answers the front of the queue and removes it. error: nullptr if there is none.
  void answer_head(Accounting& accounting, const shm::Reply& reply, const Error* error);
  // The same with what the members of a job are told once it failed or a member has left.
  void refuse_head(Accounting& accounting, const JobFailure& failure);
  // The session ends: its requests take no effect, whatever their order.
  void refuse_all(Accounting& accounting, const Error& reason);
  void note_request(const shm::Request& request, std::uint64_t now_ns);
  void note_command(const char* command, std::uint64_t now_ns);

  const std::uint32_t id;
  const std::uint32_t pid;
  const std::string name;
  const shm::Segment segment;
  const UniqueFd doorbell;
  shm::DaemonRing ring;  // Refers to `segment`: a session never moves.

  Job* job = nullptr;  // The registry sets the job and the rank.
  std::uint32_t rank = 0;
  std::deque<Pending> queue;
  ActivationStore activations;
  LastRequest last;
  RankAccount account;
};

}  // namespace kt::coproc
