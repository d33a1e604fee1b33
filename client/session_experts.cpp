// A Session's requests for the experts of one layer, split along tokens where they exceed the arena.
#include <unistd.h>

#include <algorithm>
#include <utility>

#include "client/session_state.h"

namespace kt::client {
namespace {

using shm::Request;
using shm::Verb;

// The chunks of a call, as even as can be: [0, num_tokens) in ceil(num_tokens / tokens_max) parts. No tokens: one
// part, since the daemon must hear of them too: STEP moves the layers that had a backward, also one without tokens.
std::vector<std::uint32_t> split_tokens(std::uint32_t num_tokens, std::uint32_t tokens_max) {
  const std::uint64_t num_chunks = std::max<std::uint64_t>(1, ceil_div(num_tokens, tokens_max));
  std::vector<std::uint32_t> chunks;
  for (std::uint64_t i = 0; i < num_chunks; ++i) {
    const std::uint64_t begin = num_tokens * i / num_chunks;
    const std::uint64_t end = num_tokens * (i + 1) / num_chunks;
    chunks.push_back(static_cast<std::uint32_t>(end - begin));
  }
  return chunks;
}

Status check_layer(const ModelInfo& model, std::uint32_t layer) {
  const auto& layers = model.moe_layers;
  if (std::find(layers.begin(), layers.end(), layer) != layers.end()) return ok_status();
  return invalid("layer " + std::to_string(layer) + " has no routed experts",
                 "the daemon's model has them in " + std::to_string(layers.size()) + " of its " +
                     std::to_string(model.num_layers) + " layers",
                 "name a layer of its moe_layers");
}

// FORWARD's act_id and flags.
Status check_keeping(const ActivationTable& activations, std::uint64_t act_id, std::uint8_t flags) {
  if ((flags & ~shm::kKeepY) != 0 || (flags != 0 && act_id == 0)) {
    return invalid("forward got flags " + std::to_string(flags) + " with activation " + std::to_string(act_id),
                   "it takes KEEP_Y only, and only with an activation", "use new_act_id() for what is kept");
  }
  if (act_id == 0 || !activations.find(act_id)) return ok_status();
  return invalid("activation " + std::to_string(act_id) + " is in use", "an earlier forward kept it",
                 "take a new_act_id() for every forward");
}

// Checks ids and maps those beyond the last expert (transformers' expert-parallel sentinel) to num_experts. Returns
// `ids` itself where nothing needs mapping, else `storage`.
Result<const std::int32_t*> ids_on_the_wire(const std::int32_t* ids, std::size_t count, std::uint32_t num_experts,
                                            std::vector<std::int32_t>& storage) {
  const auto last = static_cast<std::int32_t>(num_experts);
  bool needs_mapping = false;
  for (std::size_t i = 0; i < count; ++i) {
    if (ids[i] < 0) {
      return invalid("an expert id is negative",
                     "id " + std::to_string(i) + " of the call is " + std::to_string(ids[i]),
                     "pass ids from 0; an id of num_experts or more contributes nothing");
    }
    needs_mapping |= ids[i] > last;
  }
  if (!needs_mapping) return ids;
  storage.assign(ids, ids + count);
  for (std::int32_t& id : storage) id = std::min(id, last);
  return static_cast<const std::int32_t*>(storage.data());
}

const std::byte* offset_by(const void* base, std::uint64_t bytes) {
  return bytes == 0 ? static_cast<const std::byte*>(base) : static_cast<const std::byte*>(base) + bytes;
}
std::byte* offset_by(void* base, std::uint64_t bytes) {
  return bytes == 0 ? static_cast<std::byte*>(base) : static_cast<std::byte*>(base) + bytes;
}

}  // namespace

std::uint64_t Session::new_act_id() { return state_->next_act_id.fetch_add(1, std::memory_order_relaxed); }

// NOLINTNEXTLINE(readability-function-size): nine parameters, as one experts call has.
Status Session::forward(std::uint32_t layer, std::uint32_t adapter_id, std::uint64_t act_id, std::uint8_t flags,
                        std::uint32_t num_tokens, const void* x, const std::int32_t* ids, const float* weights,
                        void* y) {
  KT_TRY_STATUS(state_->check_usable());
  KT_TRY_STATUS(check_layer(state_->connection.model, layer));
  KT_TRY_STATUS(check_keeping(state_->activations, act_id, flags));
  const ModelInfo& model = state_->connection.model;
  std::vector<std::int32_t> mapped;
  KT_TRY(const std::int32_t* const wire_ids,
         ids_on_the_wire(ids, std::size_t{num_tokens} * model.top_k, model.num_experts, mapped));

  const std::vector<std::uint32_t> chunks = split_tokens(num_tokens, state_->chunk_tokens_max);
  const std::uint64_t row_bytes = std::uint64_t{model.hidden_size} * model.element_bytes;
  const std::uint64_t route_bytes = std::uint64_t{model.top_k} * 4;
  LiveActivation activation{layer, num_tokens, {}};
  std::uint64_t begin = 0;
  Status status = ok_status();
  for (const std::uint32_t chunk_tokens : chunks) {
    Request request;
    request.verb = Verb::kForward;
    request.flags = flags;
    request.layer = static_cast<std::uint16_t>(layer);
    request.adapter_id = adapter_id;
    request.act_id = act_id == 0 || chunks.size() == 1 ? act_id : new_act_id();
    request.num_tokens = chunk_tokens;
    const shm::ForwardPayload payload(state_->payload_shape(), chunk_tokens);
    const auto reply = state_->run(request, layer, payload.bytes,
                                   {{payload.x, offset_by(x, begin * row_bytes)},
                                    {payload.ids, offset_by(wire_ids, begin * route_bytes)},
                                    {payload.weights, offset_by(weights, begin * route_bytes)}},
                                   {{payload.y, offset_by(y, begin * row_bytes)}});
    if (!reply.ok()) {
      status = reply.error();
      break;
    }
    if (act_id != 0) activation.chunks.push_back({request.act_id, chunk_tokens});
    begin += chunk_tokens;
  }
  if (activation.chunks.empty()) return status;
  state_->activations.insert(act_id, std::move(activation));
  if (!status.ok()) state_->activations.release(act_id);  // What the earlier chunks kept.
  return status;
}

namespace {

// The activation a FETCH or BACKWARD names; an error when it is not there or has another number of tokens.
Result<LiveActivation> find_activation(const ActivationTable& table, std::uint64_t act_id, std::uint32_t num_tokens) {
  auto activation = table.find(act_id);
  if (!activation) {
    return Error{ErrorCode::kNotFound, "activation " + std::to_string(act_id) + " does not exist",
                 "a backward consumed it, it was released, or its forward failed",
                 "keep it with KEEP (torch: retain_graph=True) when it is needed again"};
  }
  if (activation->num_tokens != num_tokens) {
    return invalid(
        "activation " + std::to_string(act_id) + " has another number of tokens",
        "it was made with " + std::to_string(activation->num_tokens) + ", the call has " + std::to_string(num_tokens),
        "pass as many tokens as to its forward");
  }
  return *std::move(activation);
}

}  // namespace

Status Session::fetch(std::uint64_t act_id, std::uint32_t num_tokens, void* y) {
  KT_TRY_STATUS(state_->check_usable());
  KT_TRY(const LiveActivation activation, find_activation(state_->activations, act_id, num_tokens));
  const ModelInfo& model = state_->connection.model;
  std::uint64_t offset = 0;
  for (const ActivationChunk& chunk : activation.chunks) {
    Request request;
    request.verb = Verb::kFetch;
    request.act_id = chunk.act_id;
    request.num_tokens = chunk.num_tokens;
    const shm::FetchPayload payload(state_->payload_shape(), chunk.num_tokens);
    KT_TRY_STATUS(state_->run(request, activation.layer, payload.bytes, {}, {{payload.y, offset_by(y, offset)}}));
    offset += std::uint64_t{chunk.num_tokens} * model.hidden_size * model.element_bytes;
  }
  return ok_status();
}

Status Session::backward(std::uint64_t act_id, std::uint8_t flags, std::uint32_t num_tokens, const void* dy, void* dx,
                         float* dw) {
  KT_TRY_STATUS(state_->check_usable());
  if ((flags & ~(shm::kKeep | shm::kAccumulate)) != 0) {
    return invalid("backward got flags " + std::to_string(flags), "it takes KEEP and ACCUMULATE only",
                   "leave the other bits out");
  }
  KT_TRY(const LiveActivation activation, find_activation(state_->activations, act_id, num_tokens));
  const ModelInfo& model = state_->connection.model;
  const std::uint64_t row_bytes = std::uint64_t{model.hidden_size} * model.element_bytes;
  std::uint64_t begin = 0;
  std::size_t num_done = 0;
  Status status = ok_status();
  for (const ActivationChunk& chunk : activation.chunks) {
    Request request;
    request.verb = Verb::kBackward;
    request.flags = flags;
    request.act_id = chunk.act_id;
    request.num_tokens = chunk.num_tokens;
    const shm::BackwardPayload payload(state_->payload_shape(), chunk.num_tokens);
    const auto reply =
        state_->run(request, activation.layer, payload.bytes, {{payload.dy, offset_by(dy, begin * row_bytes)}},
                    {{payload.dx, offset_by(dx, begin * row_bytes)},
                     {payload.dw, offset_by(static_cast<void*>(dw), begin * model.top_k * 4)}});
    if (!reply.ok()) {
      status = reply.error();
      break;
    }
    begin += chunk.num_tokens;
    ++num_done;
  }
  if ((flags & shm::kKeep) == 0 && num_done != 0) state_->activations.consume(act_id, num_done);
  return status;
}

void Session::release(std::uint64_t act_id) {
  if (::getpid() == state_->owner_pid) state_->activations.release(act_id);
}

}  // namespace kt::client
