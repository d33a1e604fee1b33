#include "coproc/engine/batches.h"

#include <cstring>

#include "coproc/engine/validate.h"
#include "shm/doorbell.h"

namespace kt::coproc {

using shm::now_ns;
using shm::Verb;

Batch Batches::gather(Job& job) const {
  Batch batch;
  if (job.failure) return batch;
  batch.job = &job;
  std::vector<Session*> ready;
  Session* oldest = nullptr;
  for (Session* session : job.sessions()) {
    if (Heads::key(*session).verb == Verb::kNone) continue;
    if (heads_.is_collective(*session) || !Heads::check(*session).ok()) continue;
    ready.push_back(session);
    if (oldest == nullptr || session->queue.front().arrival < oldest->queue.front().arrival) oldest = session;
  }
  if (oldest == nullptr) return batch;
  batch.key = Heads::key(*oldest);
  batch.num_tokens = oldest->queue.front().request.num_tokens;
  for (Session* session : ready) {
    const std::uint64_t num_tokens = session->queue.front().request.num_tokens;
    if (session != oldest) {
      if (!(Heads::key(*session) == batch.key)) continue;
      if (batch.num_tokens + num_tokens > tokens_max_) continue;
      batch.num_tokens += num_tokens;
    }
    batch.sessions.push_back(session);
  }
  return batch;
}

bool Batches::run_next() {
  std::vector<Batch> ready;
  std::vector<FairShare::Claim> claims;
  for (const auto& [key, job] : registry_.jobs()) {
    Batch batch = gather(*job);
    if (batch.sessions.empty()) continue;
    claims.push_back({key, cost_of(batch).batch_ns(batch.num_tokens)});
    ready.push_back(std::move(batch));
  }
  if (ready.empty()) return false;
  run(std::move(ready[fair_share_.pick(claims)]));
  return true;
}

void Batches::run(Batch batch) {
  const std::uint64_t start_ns = now_ns();
  if (batch.key.verb == Verb::kForward) {
    run_forward(batch);
  } else {
    run_backward(batch);
  }
  if (batch.sessions.empty()) return;  // Every forward of it was refused.
  cost_of(batch).observe(batch.num_tokens, now_ns() - start_ns);
  accounting_.count_batch(batch.num_tokens);
  for (Session* session : batch.sessions) session->answer_head(accounting_, shm::Reply{}, nullptr);
}

void Batches::run_forward(Batch& batch) {
  Adapter* const adapter = batch.job->find_adapter(batch.key.adapter_id);
  const bool adapted = adapter != nullptr && adapter->spec(batch.key.layer) != nullptr;
  std::vector<Session*> accepted;
  std::vector<SavedActivation*> kept;  // nullptr: nothing is kept.
  std::vector<ForwardItem> items;
  for (Session* session : batch.sessions) {
    Pending& head = session->queue.front();
    const shm::Request& request = head.request;
    SavedActivation* activation = nullptr;
    if (request.act_id != 0) {
      const Result<SavedActivation*> result = activations_.keep(*session, head);
      if (!result.ok()) {
        batch.num_tokens -= request.num_tokens;
        session->answer_head(accounting_, shm::Reply{}, &result.error());
        continue;
      }
      activation = result.value();
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
    kept.push_back(activation);
    accepted.push_back(session);
  }
  batch.sessions = std::move(accepted);
  if (items.empty()) return;
  compute_.forward(batch.key.layer, adapted ? adapter : nullptr, items);
  for (std::size_t i = 0; i < items.size(); ++i) {
    if (kept[i] != nullptr && !kept[i]->y.empty()) std::memcpy(kept[i]->y.data(), items[i].y, kept[i]->y.size());
  }
}

void Batches::run_backward(const Batch& batch) {
  Adapter* const adapter = batch.job->find_adapter(batch.key.adapter_id);
  const bool adapted = adapter != nullptr && adapter->spec(batch.key.layer) != nullptr;
  std::vector<BackwardItem> items;
  for (const Session* session : batch.sessions) {
    const shm::Request& request = session->queue.front().request;
    const shm::BackwardPayload payload(payload_shape(dims_), request.num_tokens);
    std::byte* const base = session->segment.arena() + request.payload_offset;
    BackwardItem item;
    item.dy = base + payload.dy.offset;
    item.act = session->activations.find(request.act_id);
    item.dx = base + payload.dx.offset;
    item.dw = reinterpret_cast<float*>(base + payload.dw.offset);
    items.push_back(item);
  }
  const bool accumulate = adapted && batch.key.accumulate;
  compute_.backward(batch.key.layer, adapted ? adapter : nullptr, items, accumulate);
  for (Session* session : batch.sessions) {
    const shm::Request& request = session->queue.front().request;
    if ((request.flags & shm::kKeep) == 0) session->activations.release(request.act_id);
  }
}

}  // namespace kt::coproc
