// A session: one rank process, seen from the daemon. It owns the ring end, the requests in flight and the activations.
//
//   slot → DaemonRing → queue (ring order) → answered at the front, one after the other (O1)
#pragma once
#include <cstdint>
#include <deque>
#include <memory>
#include <optional>
#include <string>
#include <unordered_map>
#include <variant>
#include <vector>

#include "coproc/engine/accounting.h"
#include "coproc/engine/engine.h"
#include "coproc/experts/expert_layer.h"
#include "shm/ring.h"

namespace kt::coproc {

struct Job;

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

struct DeleteAdapter {
  std::uint32_t adapter_id = 0;
};

// A control command that waits for the job's other members.
struct ControlRequest {
  std::variant<JoinJob, CreateAdapter, DeleteAdapter> what;
  Engine::Answer answer;
  std::uint64_t asked_ns = 0;
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
  Session(OpenSession&& open)
      : id(open.session_id),
        pid(open.pid),
        name(std::move(open.name)),
        segment(std::move(open.segment)),
        doorbell(std::move(open.doorbell)),
        ring(segment) {}

  const std::uint32_t id;
  const std::uint32_t pid;
  const std::string name;
  const shm::Segment segment;
  const UniqueFd doorbell;
  shm::DaemonRing ring;  // Refers to `segment`: a session never moves.

  Job* job = nullptr;
  std::uint32_t rank = 0;
  std::deque<Pending> queue;
  std::unordered_map<std::uint64_t, Activation> activations;  // By act_id.
  std::optional<ControlRequest> control;
  LastRequest last;
  RankAccount account;
};

}  // namespace kt::coproc
