#include "coproc/engine/core.h"

#include <algorithm>

#include "coproc/engine/messages.h"
#include "shm/doorbell.h"

namespace kt::coproc {

using shm::now_ns;
using shm::Verb;

Core::Core(const ExpertDims& dims, const kernels::KernelTable& table, const ExpertWeights& weights, WorkerPool& pool,
           shm::StatusPage& page, const EngineOptions& options)
    : dims_(dims),
      table_(table),
      pool_(pool),
      options_(options),
      compute_(dims, table, weights, pool),
      accounting_(page, static_cast<std::uint32_t>(dims.moe_layers.size()), pool) {
  page.bytes_weights.store(weights.bytes(), std::memory_order_relaxed);
}

bool Core::round() {
  bool did = false;
  // A session may end in receive() or advance(): the iterator moves on first.
  for (auto it = sessions_.begin(); it != sessions_.end();) did |= receive(*(it++)->second);
  for (auto it = sessions_.begin(); it != sessions_.end();) did |= advance(*(it++)->second);
  const std::uint64_t now = now_ns();
  did |= run_joins(now);
  for (const auto& [key, job] : jobs_) did |= run_collectives(*job, now);
  did |= run_next_batch();
  if (!did && shutting_down_) did = finish_shutdown();
  if (memory_changed_) refresh_memory();
  accounting_.tick(now_ns());
  return did;
}

bool Core::has_request() const {
  return std::any_of(sessions_.begin(), sessions_.end(),
                     [](const auto& entry) { return entry.second->ring.has_request(); });
}

void Core::set_sleeping(bool sleeping) {
  for (const auto& [session_id, session] : sessions_) shm::set_sleeping(session->segment, sleeping);
}

std::uint64_t Core::sleep_ns_max(std::uint64_t now_ns) const {
  constexpr std::uint64_t kTickNs = 200'000'000;  // Often enough for rates to fall to 0 while nothing happens.
  std::uint64_t sleep_ns = accounting_.needs_ticks() ? kTickNs : UINT64_MAX;
  const auto until = [&](std::uint64_t since_ns, std::uint64_t timeout_ns) {
    const std::uint64_t waited_ns = now_ns > since_ns ? now_ns - since_ns : 0;
    sleep_ns = std::min(sleep_ns, timeout_ns > waited_ns ? timeout_ns - waited_ns : 0);
  };
  for (const auto& [session_id, session] : sessions_) {
    const std::uint64_t since_ns = std::min(ring_wait_ns(*session), control_wait_ns(*session));
    if (since_ns != UINT64_MAX) until(since_ns, session->job->collective_timeout_ns);
    if (!session->control) continue;
    if (const auto* join = std::get_if<JoinJob>(&session->control->what)) {
      until(session->control->asked_ns, join_timeout_ns(*join));
    }
  }
  return sleep_ns;
}

// At most a ring's worth at a time: a client whose requests are answered at once (shutdown) could go on for ever.
bool Core::receive(Session& session) {
  for (std::uint32_t i = 0; i < shm::kNumSlots; ++i) {
    const std::uint64_t expected = session.ring.expected_sequence();
    const auto received = session.ring.try_receive();
    if (!received) return i > 0;
    if (!accept(session, *received, expected)) break;
  }
  return true;
}

// False: the session is gone.
bool Core::accept(Session& session, const shm::ReceivedRequest& received, std::uint64_t expected) {
  const std::uint64_t now = now_ns();
  if (received.sequence != expected) {
    break_session(session, protocol_error(session, received.request,
                                          "sequence is " + std::to_string(received.sequence) +
                                              "; the next request is " + std::to_string(expected)));
    return false;
  }
  accounting_.received(session.account, now);
  Pending pending;
  pending.sequence = received.sequence;
  pending.request = received.request;
  pending.received_ns = now;
  pending.arrival = ++num_arrivals_;
  session.queue.push_back(std::move(pending));
  if (Fault fault = check_request(received.request, dims_, session.segment.arena_bytes())) {
    break_session(session, protocol_error(session, received.request, *std::move(fault)));
    return false;
  }
  note_request(session, received.request, now);
  if (shutting_down_) {
    // The only answer that is given out of order: the request takes no effect (C1).
    const Error error = shutting_down();
    session.ring.reply(received.sequence, shm::Reply{}, &error);
    session.queue.pop_back();
    accounting_.answered(session.account, received.request.verb, 0, false, now, now);
  }
  return true;
}

bool Core::advance(Session& session) {
  bool did = false;
  bool copied = false;
  while (!session.queue.empty()) {
    Pending& head = session.queue.front();
    const Verb verb = head.request.verb;
    accounting_.show_state(session.account, verb);
    if (session.job->failure && verb != Verb::kRead && verb != Verb::kRelease) {
      refuse_head(session, *session.job->failure);
      did = true;
      continue;
    }
    const bool copies = verb == Verb::kFetch || verb == Verb::kRead || verb == Verb::kWrite;
    if (copies || verb == Verb::kRelease) {
      // One copy per round and session: the others' turns come between.
      if (copied) return true;
      copied = copies;
      did = true;
      if (!settle(session, run_alone(session, head))) return true;
      continue;
    }
    Status status = head.head_ns == 0 ? prepare_head(session, head) : ok_status();
    if (status.ok()) status = check_head(session, head);
    if (status.ok() && session.job->departure && is_collective(session, head)) {
      refuse_head(session, *session.job->departure);
      did = true;
      continue;
    }
    if (status.ok()) return did;
    did = true;
    if (!settle(session, status)) return true;
  }
  accounting_.show_state(session.account, Verb::kNone);
  return did;
}

Status Core::prepare_head(Session& session, Pending& head) {
  head.head_ns = now_ns();
  const shm::Request& request = head.request;
  if (request.stream_flag != 0) {
    return Error{ErrorCode::kUnsupported, describe(session) + ": " + describe(session, request) + " uses a stream flag",
                 "stream_flag is " + std::to_string(request.stream_flag) + "; this daemon has no GPU ordering",
                 "synchronise the stream before the request and send stream_flag 0"};
  }
  Fault fault;
  if (request.verb == Verb::kForward) {
    fault = copy_ids(session.segment, request, dims_, head.ids);
  } else if (request.verb == Verb::kNorm) {
    copy_norm(session.segment, request, dims_, head.group_of);
  } else if (request.verb == Verb::kStep) {
    head.header = std::make_unique<shm::StepHeader>();
    fault = copy_step(session.segment, request, dims_, *head.header, head.group_of);
  }
  if (fault) return protocol_error(session, request, *std::move(fault));
  return ok_status();
}

// What depends on the state of the job: checked in every round in which the head waits, and again by gather() (C3).
Status Core::check_head(const Session& session, const Pending& head) const {
  const shm::Request& request = head.request;
  if (request.verb == Verb::kForward) {
    if (request.adapter_id != 0 && session.job->find_adapter(request.adapter_id) == nullptr) {
      return unknown_adapter(session, request);
    }
    if (request.act_id != 0 && session.activations.contains(request.act_id)) {
      return protocol_error(session, request, "act_id is " + std::to_string(request.act_id) + ", which is live");
    }
  } else if (request.verb == Verb::kBackward) {
    const auto found = session.activations.find(request.act_id);
    if (found == session.activations.end()) return unknown_activation(session, request);
    const Activation& activation = found->second;
    if (request.num_tokens != activation.num_tokens) {
      return protocol_error(session, request,
                            "num_tokens is " + std::to_string(request.num_tokens) + "; the forward had " +
                                std::to_string(activation.num_tokens));
    }
    if (activation.adapter_id != 0 && activation.step != session.job->step) {
      return stale_activation(session, request, activation);
    }
  }
  return ok_status();
}

void Core::answer_head(Session& session, shm::Reply reply, const Error* error) {
  Pending head = std::move(session.queue.front());
  session.queue.pop_front();
  session.ring.reply(head.sequence, reply, error);
  accounting_.answered(session.account, head.request.verb, head.request.num_tokens, error == nullptr, head.received_ns,
                       now_ns());
}

bool Core::settle(Session& session, const Status& status) {
  if (status.ok()) {
    answer_head(session, shm::Reply{}, nullptr);
    return true;
  }
  if (status.error().code == ErrorCode::kInvalidArgument) {
    break_session(session, status.error());
    return false;
  }
  answer_head(session, shm::Reply{}, &status.error());
  return true;
}

void Core::refuse_head(Session& session, const JobFailure& failure) {
  shm::Reply reply;
  reply.rank = failure.rank;
  reply.layer = failure.layer;
  reply.step = failure.step;
  answer_head(session, reply, &failure.error);
}

void Core::note_request(Session& session, const shm::Request& request, std::uint64_t now_ns) const {
  if (request.verb == Verb::kRelease) return;
  LastRequest& last = session.last;
  last.name = shm::verb_name(request.verb);
  last.has_layer = !shm::is_collective(request.verb);
  if (last.has_layer) last.layer = request.layer;
  if (request.verb == Verb::kBackward || request.verb == Verb::kFetch) {
    const auto found = session.activations.find(request.act_id);
    if (found != session.activations.end()) last.layer = found->second.layer;
  }
  last.step = session.job->step;
  last.at_ns = now_ns;
}

void Core::refresh_memory() {
  MemoryBytes bytes;
  for (const auto& [key, job] : jobs_) {
    bytes.activations += job->activation_bytes;
    for (const auto& [adapter_id, adapter] : job->adapters) {
      bytes.adapters += adapter->parameter_bytes();
      bytes.gradients += adapter->gradient_bytes();
      bytes.optimizer += adapter->optimizer_bytes();
    }
  }
  for (const auto& [session_id, session] : sessions_) bytes.arenas += session->segment.arena_bytes();
  accounting_.set_memory(bytes);
  memory_changed_ = false;
}

}  // namespace kt::coproc
