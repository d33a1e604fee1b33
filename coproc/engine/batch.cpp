// FORWARD and BACKWARD: which requests run together, and running them (B1, B2, B4).
#include <algorithm>
#include <cstring>
#include <new>

#include "coproc/engine/activation_budget.h"
#include "coproc/engine/core.h"
#include "coproc/engine/messages.h"
#include "shm/doorbell.h"

namespace kt::coproc {

using shm::now_ns;
using shm::Verb;

Core::BatchKey Core::batch_key(const Session& session) const {
  if (session.queue.empty() || session.queue.front().head_ns == 0) return {};
  const shm::Request& request = session.queue.front().request;
  if (request.verb == Verb::kForward) return {request.verb, request.layer, request.adapter_id, false};
  if (request.verb != Verb::kBackward) return {};
  const auto found = session.activations.find(request.act_id);
  if (found == session.activations.end()) return {};
  const Activation& activation = found->second;
  const bool accumulate = (request.flags & shm::kAccumulate) != 0 && activation.adapter_id != 0;
  return {request.verb, activation.layer, activation.adapter_id, accumulate};
}

// In deterministic mode the backwards that add to a shared S are collectives too: they run in rank order.
bool Core::is_collective(const Session& session, const Pending& head) const {
  if (shm::is_collective(head.request.verb)) return true;
  if (!options_.deterministic || session.job->members.size() == 1) return false;
  return batch_key(session).accumulate;
}

// The oldest head and, in order of rank, what fits beside it.
Core::Batch Core::gather(Job& job) const {
  Batch batch;
  if (job.failure) return batch;
  batch.job = &job;
  std::vector<Session*> ready;
  Session* oldest = nullptr;
  for (Session* session : job.sessions()) {
    if (batch_key(*session).verb == Verb::kNone) continue;
    const Pending& head = session->queue.front();
    if (is_collective(*session, head) || !check_head(*session, head).ok()) continue;
    ready.push_back(session);
    if (oldest == nullptr || head.arrival < oldest->queue.front().arrival) oldest = session;
  }
  if (oldest == nullptr) return batch;
  batch.key = batch_key(*oldest);
  batch.num_tokens = oldest->queue.front().request.num_tokens;
  for (Session* session : ready) {
    const std::uint64_t num_tokens = session->queue.front().request.num_tokens;
    if (session != oldest) {
      if (!(batch_key(*session) == batch.key)) continue;
      if (batch.num_tokens + num_tokens > options_.batch_tokens_max) continue;
      batch.num_tokens += num_tokens;
    }
    batch.sessions.push_back(session);
  }
  return batch;
}

bool Core::run_next_batch() {
  std::vector<Batch> ready;
  std::vector<FairShare::Claim> claims;
  for (const auto& [key, job] : jobs_) {
    Batch batch = gather(*job);
    if (batch.sessions.empty()) continue;
    const CostEstimate& cost = batch.key.verb == Verb::kForward ? forward_cost_ : backward_cost_;
    claims.push_back({key, cost.batch_ns(batch.num_tokens)});
    ready.push_back(std::move(batch));
  }
  if (ready.empty()) return false;
  run_batch(ready[fair_share_.pick(claims)]);
  return true;
}

void Core::run_batch(Batch& batch) {
  const std::uint64_t start_ns = now_ns();
  const bool is_forward = batch.key.verb == Verb::kForward;
  if (is_forward) {
    run_forward(batch);
  } else {
    run_backward(batch);
  }
  if (batch.sessions.empty()) return;  // Every forward of it was refused.
  (is_forward ? forward_cost_ : backward_cost_).observe(batch.num_tokens, now_ns() - start_ns);
  accounting_.count_batch(batch.num_tokens);
  for (Session* session : batch.sessions) answer_head(*session, shm::Reply{}, nullptr);
}

void Core::run_forward(Batch& batch) {
  Adapter* const adapter = batch.job->find_adapter(batch.key.adapter_id);
  const bool adapted = adapter != nullptr && adapter->spec(batch.key.layer) != nullptr;
  std::vector<Session*> accepted;
  std::vector<ForwardItem> items;
  for (Session* session : batch.sessions) {
    Pending& head = session->queue.front();
    const shm::Request& request = head.request;
    Activation* activation = nullptr;
    if (request.act_id != 0) {
      Activation kept;
      if (const Status status = keep_activation(*session, head, kept); !status.ok()) {
        batch.num_tokens -= request.num_tokens;
        answer_head(*session, shm::Reply{}, &status.error());
        continue;
      }
      batch.job->activation_bytes += kept.bytes();
      memory_changed_ = true;
      activation = &session->activations.emplace(request.act_id, std::move(kept)).first->second;
    }
    const shm::ForwardPayload payload(payload_shape(dims_), request.num_tokens);
    std::byte* const base = session->segment.arena() + request.payload_offset;
    ForwardItem item;
    // What backward will use is also what forward uses, whatever the client stores there meanwhile.
    item.x = activation != nullptr ? activation->x.data() : base + payload.x.offset;
    item.ids = activation != nullptr ? activation->ids.data() : head.ids.data();
    item.weights = activation != nullptr ? activation->weights.data()
                                         : reinterpret_cast<const float*>(base + payload.weights.offset);
    item.num_tokens = request.num_tokens;
    item.y = base + payload.y.offset;
    if (activation != nullptr && !activation->gate_up.empty()) item.save_gate_up = activation->gate_up.data();
    items.push_back(item);
    accepted.push_back(session);
  }
  batch.sessions = std::move(accepted);
  if (items.empty()) return;
  compute_.forward(batch.key.layer, adapted ? adapter : nullptr, items);
  for (std::size_t i = 0; i < items.size(); ++i) {
    const auto found = batch.sessions[i]->activations.find(batch.sessions[i]->queue.front().request.act_id);
    if (found == batch.sessions[i]->activations.end()) continue;
    std::vector<std::byte>& y = found->second.y;
    if (!y.empty()) std::memcpy(y.data(), items[i].y, y.size());
  }
}

// Copies what backward needs, as much of it as the budget allows; the ids move out of the request.
Status Core::keep_activation(const Session& session, Pending& head, Activation& activation) const {
  const shm::Request& request = head.request;
  const bool keep_y = (request.flags & shm::kKeepY) != 0;
  ActivationBudget budget;
  budget.bytes_max = options_.activation_bytes_max;
  budget.num_jobs = jobs_.size();
  budget.job_bytes = session.job->activation_bytes;
  for (const auto& [key, job] : jobs_) budget.all_bytes += job->activation_bytes;
  const std::uint64_t input_bytes = activation_input_bytes(dims_, request.num_tokens, keep_y);
  const std::uint64_t gate_up_bytes = activation_gate_up_bytes(dims_, request.num_tokens);
  const Keep keep = budget.decide(input_bytes, gate_up_bytes);
  const auto refused = [&](const std::string& why) {
    return Error{ErrorCode::kActivationLimit,
                 describe(session) + ": " + describe(session, request) + " cannot keep its activation", why,
                 "use smaller micro-batches or activation checkpointing, or give the daemon a larger "
                 "activation_bytes_max"};
  };
  if (keep == Keep::kRefused) {
    return refused("its " + std::to_string(request.num_tokens) + " tokens need " + std::to_string(input_bytes) +
                   " bytes even without G and U; the job holds " + std::to_string(budget.job_bytes) + " of the " +
                   std::to_string(budget.share_bytes()) + " bytes that are its share (activation_bytes_max " +
                   std::to_string(budget.bytes_max) + ", " + std::to_string(budget.num_jobs) + " jobs)");
  }
  const shm::ForwardPayload payload(payload_shape(dims_), request.num_tokens);
  const std::byte* const base = session.segment.arena() + request.payload_offset;
  activation.layer = request.layer;
  activation.adapter_id = request.adapter_id;
  activation.step = session.job->step;
  activation.num_tokens = request.num_tokens;
  try {
    activation.x.assign(base + payload.x.offset, base + payload.x.offset + payload.x.bytes);
    const auto* const weights = reinterpret_cast<const float*>(base + payload.weights.offset);
    activation.weights.assign(weights, weights + head.ids.size());
    if (keep == Keep::kAll) activation.gate_up.resize(gate_up_bytes);
    if (keep_y) activation.y.resize(payload.y.bytes);
  } catch (const std::bad_alloc&) {
    return refused("the system has no memory for " + std::to_string(input_bytes + gate_up_bytes) + " bytes");
  }
  activation.ids = std::move(head.ids);
  return ok_status();
}

void Core::run_backward(const Batch& batch) {
  Adapter* const adapter = batch.job->find_adapter(batch.key.adapter_id);
  const bool adapted = adapter != nullptr && adapter->spec(batch.key.layer) != nullptr;
  std::vector<BackwardItem> items;
  for (const Session* session : batch.sessions) {
    const shm::Request& request = session->queue.front().request;
    const shm::BackwardPayload payload(payload_shape(dims_), request.num_tokens);
    std::byte* const base = session->segment.arena() + request.payload_offset;
    BackwardItem item;
    item.dy = base + payload.dy.offset;
    item.act = &session->activations.at(request.act_id);
    item.dx = base + payload.dx.offset;
    item.dw = reinterpret_cast<float*>(base + payload.dw.offset);
    items.push_back(item);
  }
  const bool accumulate = adapted && batch.key.accumulate;
  compute_.backward(batch.key.layer, adapted ? adapter : nullptr, items, accumulate);
  if (accumulate) adapter->mark_touched(batch.key.layer);  // Also when no rank had a token (I7).
  for (Session* session : batch.sessions) {
    const shm::Request& request = session->queue.front().request;
    if ((request.flags & shm::kKeep) == 0) release(*session, request.act_id);
  }
}

}  // namespace kt::coproc
