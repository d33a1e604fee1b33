#include "client/claim.h"

#include <unistd.h>

#include <algorithm>
#include <array>
#include <utility>
#include <vector>

#include "client/session_state.h"

namespace kt::client {
namespace {

using shm::Part;
using shm::Request;
using shm::Verb;

// Where the tensors of a piece lie in its block.
struct Layout {
  Part input, ids, routing_weights, output, grad_weights;
  std::uint64_t bytes = 0;
};

Layout layout_of(Verb verb, const shm::PayloadShape& shape, std::uint32_t num_tokens) {
  if (verb == Verb::kForward) {
    const shm::ForwardPayload payload(shape, num_tokens);
    return {payload.x, payload.ids, payload.weights, payload.y, {}, payload.bytes};
  }
  if (verb == Verb::kBackward) {
    const shm::BackwardPayload payload(shape, num_tokens);
    return {payload.dy, {}, {}, payload.dx, payload.dw, payload.bytes};
  }
  const shm::FetchPayload payload(shape, num_tokens);
  return {{}, {}, {}, payload.y, {}, payload.bytes};
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

// Ids beyond the last expert (transformers' expert-parallel sentinel) become num_experts, in place.
Status map_ids(std::span<std::int32_t> ids, const ModelInfo& model, std::uint32_t first_token) {
  const auto sentinel = static_cast<std::int32_t>(model.num_experts);
  for (std::size_t i = 0; i < ids.size(); ++i) {
    if (ids[i] < 0) {
      return invalid("an expert id is negative",
                     "ids[" + std::to_string(first_token + i / model.top_k) + ", " + std::to_string(i % model.top_k) +
                         "] is " + std::to_string(ids[i]) + ", the layer has experts 0 to " +
                         std::to_string(model.num_experts - 1),
                     "look at the router; an id of num_experts or more contributes nothing");
    }
    ids[i] = std::min(ids[i], sentinel);
  }
  return ok_status();
}

}  // namespace

struct Claim::Impl {
  enum class Stage : std::uint8_t { kOpen, kSucceeded, kFailed };

  // The pieces of a call, as even as can be: [0, num_tokens) in ceil(num_tokens / tokens_max) parts. No tokens: one
  // part, since the daemon must hear of them too: STEP moves the layers that had a backward, also one without tokens.
  static std::vector<ActivationChunk> split(Session::State& session, std::uint64_t act_id, std::uint32_t num_tokens) {
    const std::uint64_t num_pieces = std::max<std::uint64_t>(1, ceil_div(num_tokens, session.chunk_tokens_max));
    std::vector<ActivationChunk> pieces;
    for (std::uint64_t i = 0; i < num_pieces; ++i) {
      const std::uint64_t begin = num_tokens * i / num_pieces;
      const std::uint64_t end = num_tokens * (i + 1) / num_pieces;
      const bool own_id = act_id != 0 && num_pieces > 1;
      pieces.push_back({own_id ? session.next_act_id.fetch_add(1) : act_id, static_cast<std::uint32_t>(end - begin)});
    }
    return pieces;
  }

  // Waits for the room of the largest piece. `request`: what all pieces have in common.
  static Result<Claim> make(Session::State& session, const Request& request, std::uint64_t act_id,
                            LiveActivation call) {
    std::uint32_t tokens_max = 0;
    std::uint32_t first_token = call.num_tokens;  // A backward that failed half-way goes on with what it left.
    for (const ActivationChunk& piece : call.chunks) {
      tokens_max = std::max(tokens_max, piece.num_tokens);
      first_token -= piece.num_tokens;
    }
    auto block = session.arena.wait_allocate(layout_of(request.verb, session.payload_shape(), tokens_max).bytes);
    if (!block) return session.liveness.error(session.liveness.end());
    auto impl = std::unique_ptr<Impl>(new Impl{session, request, act_id, std::move(call), *std::move(block)});
    impl->request.payload_offset = impl->block.offset();
    impl->layout = layout_of(request.verb, session.payload_shape(), impl->piece().num_tokens);
    impl->first_token = first_token;
    return Claim(std::move(impl));
  }

  const ActivationChunk& piece() const { return call.chunks[piece_idx]; }

  template <class T>
  std::span<T> span(const Part& part) const {
    return {reinterpret_cast<T*>(block.data() + part.offset), part.bytes / sizeof(T)};
  }

  std::array<OutputPart, kNumOutputsMax> outputs() const {
    return {{{block.data() + layout.output.offset, layout.output.bytes},
             {block.data() + layout.grad_weights.offset, layout.grad_weights.bytes}}};
  }

  Status send() {
    KT_TRY_STATUS(session.check_usable());
    if (request.verb == Verb::kForward) {
      KT_TRY_STATUS(check_keeping(session.activations, act_id, request.flags));
      KT_TRY_STATUS(map_ids(span<std::int32_t>(layout.ids), session.connection.model, first_token));
    }
    request.act_id = piece().act_id;
    request.num_tokens = piece().num_tokens;
    KT_TRY_STATUS(session.exchange(request, call.layer, outputs()));
    if (request.verb == Verb::kForward && act_id != 0) {
      ++num_kept;
      if (num_kept == call.chunks.size()) {
        session.activations.insert(act_id, call);
        num_kept = 0;  // The caller's from now on.
      }
    }
    if (request.verb == Verb::kBackward && (request.flags & shm::kKeep) == 0) session.activations.consume(act_id, 1);
    return ok_status();
  }

  // What the pieces of an unfinished forward kept. Under an id of its own: the caller's may be in use meanwhile.
  void release_kept() {
    if (num_kept == 0) return;
    call.chunks.resize(num_kept);
    const std::uint64_t id = session.next_act_id.fetch_add(1);
    session.activations.insert(id, std::move(call));
    session.activations.release(id);
  }

  Session::State& session;
  Request request;
  const std::uint64_t act_id;  // The caller's.
  LiveActivation call;         // The layer, and the pieces.
  ArenaBlock block;
  Layout layout{};  // Of the piece.
  Stage stage = Stage::kOpen;
  std::size_t piece_idx = 0;
  std::uint32_t first_token = 0;
  std::size_t num_kept = 0;  // Activations in the daemon that the caller does not know of.
};

Claim::Claim(std::unique_ptr<Impl> impl) : impl_(std::move(impl)) {}
Claim::Claim(Claim&& other) noexcept = default;

Claim::~Claim() {
  if (impl_ == nullptr) return;
  if (::getpid() != impl_->session.owner_pid) {
    // A forked child shares the arena with its parent, whose block this is: leave everything be.
    static_cast<void>(impl_.release());
    return;
  }
  impl_->release_kept();
}

std::uint32_t Claim::first_token() const { return impl_->first_token; }
std::uint32_t Claim::num_tokens() const { return impl_->piece().num_tokens; }
std::span<std::byte> Claim::input() { return impl_->span<std::byte>(impl_->layout.input); }
std::span<std::int32_t> Claim::ids() { return impl_->span<std::int32_t>(impl_->layout.ids); }
std::span<float> Claim::routing_weights() { return impl_->span<float>(impl_->layout.routing_weights); }
std::span<const std::byte> Claim::output() const { return impl_->span<const std::byte>(impl_->layout.output); }
std::span<const float> Claim::grad_weights() const { return impl_->span<const float>(impl_->layout.grad_weights); }

Status Claim::submit() {
  if (::getpid() != impl_->session.owner_pid) return impl_->session.check_usable();
  if (impl_->stage != Impl::Stage::kOpen) {
    return invalid("a claim was submitted twice", "its piece has an answer already",
                   "go on with next(), or make another claim");
  }
  Status sent = impl_->send();
  impl_->stage = sent.ok() ? Impl::Stage::kSucceeded : Impl::Stage::kFailed;
  if (!sent.ok()) poison(impl_->outputs());
  return sent;
}

bool Claim::next() {
  if (impl_->stage != Impl::Stage::kSucceeded || impl_->piece_idx + 1 == impl_->call.chunks.size()) return false;
  impl_->first_token += num_tokens();
  ++impl_->piece_idx;
  impl_->layout = layout_of(impl_->request.verb, impl_->session.payload_shape(), num_tokens());
  impl_->stage = Impl::Stage::kOpen;
  return true;
}

std::uint64_t Session::new_act_id() { return state_->next_act_id.fetch_add(1, std::memory_order_relaxed); }

Result<Claim> Session::claim(const ForwardCall& call) {
  KT_TRY_STATUS(state_->check_usable());
  KT_TRY_STATUS(check_layer(state_->connection.model, call.layer));
  KT_TRY_STATUS(check_keeping(state_->activations, call.act_id, call.flags));
  Request request;
  request.verb = Verb::kForward;
  request.flags = call.flags;
  request.layer = static_cast<std::uint16_t>(call.layer);
  request.adapter_id = call.adapter_id;
  return Claim::Impl::make(*state_, request, call.act_id,
                           {call.layer, call.num_tokens, Claim::Impl::split(*state_, call.act_id, call.num_tokens)});
}

Result<Claim> Session::claim(const BackwardCall& call) {
  KT_TRY_STATUS(state_->check_usable());
  if ((call.flags & ~(shm::kKeep | shm::kAccumulate)) != 0) {
    return invalid("backward got flags " + std::to_string(call.flags), "it takes KEEP and ACCUMULATE only",
                   "leave the other bits out");
  }
  KT_TRY(LiveActivation activation, find_activation(state_->activations, call.act_id, call.num_tokens));
  Request request;
  request.verb = Verb::kBackward;
  request.flags = call.flags;
  return Claim::Impl::make(*state_, request, call.act_id, std::move(activation));
}

Result<Claim> Session::claim(const FetchCall& call) {
  KT_TRY_STATUS(state_->check_usable());
  KT_TRY(LiveActivation activation, find_activation(state_->activations, call.act_id, call.num_tokens));
  Request request;
  request.verb = Verb::kFetch;
  return Claim::Impl::make(*state_, request, call.act_id, std::move(activation));
}

void Session::release(std::uint64_t act_id) {
  if (::getpid() == state_->owner_pid) state_->activations.release(act_id);
}

}  // namespace kt::client
