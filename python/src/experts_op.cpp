// One call of a layer's experts as a torch op: hidden states out to the daemon and back, with gradients.
//
//   experts            autograd: decides whether an activation is kept, and what its backward asks for
//   └ below autograd   converts into the arena (client::Claim), waits for the answer, converts out of it
//   experts_backward   the same for gradients
#include "python/src/experts_op.h"

#include <ATen/ATen.h>
#include <ATen/core/LegacyTypeDispatch.h>
#include <torch/csrc/autograd/custom_function.h>
#include <torch/csrc/autograd/functions/accumulate_grad.h>
#include <torch/csrc/autograd/graph_task.h>
#include <torch/library.h>

#include <algorithm>
#include <limits>
#include <span>
#include <tuple>
#include <type_traits>
#include <vector>

#include "python/src/errors.h"
#include "python/src/sessions.h"
#include "python/src/tickets.h"
#include "shm/protocol.h"

namespace kt::python {
namespace {

using at::Tensor;
using std::optional;

// Elements of the arena as a tensor.
template <class T>
Tensor arena_tensor(std::span<T> elements, at::IntArrayRef shape, at::ScalarType dtype) {
  // The data of a const span is only read: callers copy out of it.
  auto* const data = const_cast<std::remove_const_t<T>*>(elements.data());
  return at::from_blob(data, shape, at::TensorOptions().dtype(dtype).device(at::kCPU));
}

// x or grad_output of the claim's piece, and y or grad_input: element[num_tokens, hidden_size].
template <class T>
Tensor arena_rows(std::span<T> bytes, const client::Claim& claim, const client::ModelInfo& model) {
  return arena_tensor(bytes, {claim.num_tokens(), model.hidden_size},
                      model.element_bytes == 2 ? at::kBFloat16 : at::kFloat);
}

// The claim's tokens of a tensor of the whole call.
Tensor piece_of(const Tensor& tensor, const client::Claim& claim) {
  return tensor.detach().narrow(0, claim.first_token(), claim.num_tokens());
}

// Sends a call piece by piece. write(claim) and read(claim) convert into the arena and out of it, without the GIL.
template <class Call, class Write, class Read>
void exchange(client::Session& session, const Call& call, const Write& write, const Read& read) {
  check(without_gil([&]() -> Status {
    KT_TRY(client::Claim claim, session.claim(call));
    do {
      write(claim);
      KT_TRY_STATUS(claim.submit());
      read(claim);
    } while (claim.next());
    return ok_status();
  }));
}

Error shape_error(const std::string& what, const Tensor& got, const std::string& expected) {
  std::string shape;
  for (const auto size : got.sizes()) shape += (shape.empty() ? "" : ", ") + std::to_string(size);
  return {ErrorCode::kInvalidArgument, "kt_coproc::experts: " + what + " has the wrong shape",
          "got [" + shape + "], expected " + expected, "check the config against the daemon's model: kt-coproc status"};
}

// ids[T, k] of any integer type -> i32[T, top_k]. What i32 cannot hold becomes its largest or smallest number, and
// columns beyond k the largest: the client knows which ids mean nothing and which are wrong.
void write_ids(const Tensor& ids, std::span<std::int32_t> to, std::size_t top_k) {
  using Limits = std::numeric_limits<std::int32_t>;
  const Tensor wide = ids.to(at::TensorOptions().dtype(at::kLong).device(at::kCPU)).contiguous();
  const auto k = static_cast<std::size_t>(wide.size(1));
  const auto* from = wide.const_data_ptr<std::int64_t>();
  for (std::size_t i = 0; i < to.size(); i += top_k, from += k) {
    for (std::size_t j = 0; j < top_k; ++j) {
      const std::int64_t id = j < k ? from[j] : Limits::max();
      to[i + j] = static_cast<std::int32_t>(std::clamp<std::int64_t>(id, Limits::min(), Limits::max()));
    }
  }
}

// weights[T, k] -> f32[T, top_k], zeros beyond k.
void write_weights(const Tensor& weights, std::span<float> to, std::int64_t top_k) {
  const auto k = weights.size(1);
  const Tensor rows = arena_tensor(to, {weights.size(0), top_k}, at::kFloat);
  rows.narrow(1, 0, k).copy_(weights);
  if (k < top_k) rows.narrow(1, k, top_k - k).zero_();
}

void check_shapes(const client::ModelInfo& model, const Tensor& hidden, const Tensor& ids, const Tensor& weights) {
  const std::string tokens = hidden.dim() == 2 ? std::to_string(hidden.size(0)) : "T";
  if (hidden.dim() != 2 || hidden.size(1) != static_cast<std::int64_t>(model.hidden_size)) {
    raise(shape_error("hidden_states", hidden, "[T, " + std::to_string(model.hidden_size) + "]"));
  }
  const std::string routes = "[" + tokens + ", at most " + std::to_string(model.top_k) + "]";
  if (ids.dim() != 2 || ids.size(0) != hidden.size(0) || ids.size(1) > static_cast<std::int64_t>(model.top_k)) {
    raise(shape_error("topk_ids", ids, routes));
  }
  if (weights.sizes() != ids.sizes()) raise(shape_error("topk_weights", weights, "that of topk_ids"));
}

std::tuple<Tensor, Tensor> experts(const Tensor& hidden, const Tensor& ids, const Tensor& weights,
                                   const optional<Tensor>& /*anchor*/, const optional<Tensor>& ticket,
                                   std::int64_t session, std::int64_t layer, std::int64_t adapter, std::int64_t mode) {
  const auto open = find_session(session);
  const client::ModelInfo& model = open->session->model();
  check_shapes(model, hidden, ids, weights);
  const auto num_tokens = static_cast<std::uint32_t>(hidden.size(0));
  Tensor y = at::empty(hidden.sizes(), hidden.options());
  const auto read = [&](const client::Claim& claim) {
    piece_of(y, claim).copy_(arena_rows(claim.output(), claim, model));
  };
  if (mode == kReplay) {
    const Tensor kept = ticket.value_or(Tensor());
    const std::uint64_t act_id = kept.defined() ? ticket_act_id(kept, session) : 0;
    if (act_id == 0) {
      raise({ErrorCode::kInvalidArgument, "kt_coproc::experts: nothing to replay", "mode REPLAY came without a ticket",
             "pass the ticket of the recorded call"});
    }
    const auto nothing = [](client::Claim&) {};
    exchange(*open->session, client::FetchCall{act_id, num_tokens}, nothing, read);
    return {y, kept};
  }
  const std::uint64_t act_id = mode == kAuto ? 0 : open->session->new_act_id();
  const std::uint8_t flags = mode == kRecord ? shm::kKeepY : 0;
  const auto write = [&](client::Claim& claim) {
    arena_rows(claim.input(), claim, model).copy_(piece_of(hidden, claim));
    write_ids(piece_of(ids, claim), claim.ids(), model.top_k);
    write_weights(piece_of(weights, claim), claim.routing_weights(), model.top_k);
  };
  const client::ForwardCall call{static_cast<std::uint32_t>(layer), static_cast<std::uint32_t>(adapter), act_id, flags,
                                 num_tokens};
  exchange(*open->session, call, write, read);
  return {y, act_id == 0 ? empty_ticket() : make_ticket(session, act_id)};
}

std::tuple<Tensor, Tensor> experts_meta(const Tensor& hidden, const Tensor& /*ids*/, const Tensor& /*weights*/,
                                        const optional<Tensor>& /*anchor*/, const optional<Tensor>& /*ticket*/,
                                        std::int64_t /*session*/, std::int64_t /*layer*/, std::int64_t /*adapter*/,
                                        std::int64_t /*mode*/) {
  return {at::empty_like(hidden, hidden.options(), at::MemoryFormat::Contiguous),
          at::empty({1}, hidden.options().dtype(at::kLong))};
}

// grad_output[T, H] -> grad_input[T, H] of its dtype, grad_topk_weights f32[T, k].
std::tuple<Tensor, Tensor> experts_backward(const Tensor& grad_output, const Tensor& ticket, std::int64_t session,
                                            std::int64_t k, std::int64_t adapter, std::int64_t flags) {
  const auto open = find_session(session);
  const client::ModelInfo& model = open->session->model();
  const std::uint64_t act_id = ticket_act_id(ticket, session);
  const auto num_tokens = grad_output.size(0);
  Tensor dx = at::empty(grad_output.sizes(), grad_output.options());
  Tensor dw = at::empty({num_tokens, k}, grad_output.options().dtype(at::kFloat));
  const auto wire_flags = static_cast<std::uint8_t>(flags);
  // Noted before it is sent: a backward that fails half-way may have added to the sum, and zero_grad must discard it.
  if ((wire_flags & shm::kAccumulate) != 0) open->note_accumulated(static_cast<std::uint32_t>(adapter));
  const auto write = [&](client::Claim& claim) {
    arena_rows(claim.input(), claim, model).copy_(piece_of(grad_output, claim));
  };
  const auto read = [&](const client::Claim& claim) {
    piece_of(dx, claim).copy_(arena_rows(claim.output(), claim, model));
    const Tensor all = arena_tensor(claim.grad_weights(), {claim.num_tokens(), model.top_k}, at::kFloat);
    piece_of(dw, claim).copy_(all.narrow(1, 0, k));
  };
  exchange(*open->session, client::BackwardCall{act_id, wire_flags, static_cast<std::uint32_t>(num_tokens)}, write,
           read);
  if ((wire_flags & shm::kKeep) == 0) mark_consumed(ticket);
  return {dx, dw};
}

std::tuple<Tensor, Tensor> experts_backward_meta(const Tensor& grad_output, const Tensor& /*ticket*/,
                                                 std::int64_t /*session*/, std::int64_t k, std::int64_t /*adapter*/,
                                                 std::int64_t /*flags*/) {
  return {at::empty_like(grad_output, grad_output.options(), at::MemoryFormat::Contiguous),
          at::empty({grad_output.size(0), k}, grad_output.options().dtype(at::kFloat))};
}

// True under .backward(): the engine will run this leaf's AccumulateGrad node. False under autograd.grad() and
// backward(inputs=…) that do not ask for it. torch._C._will_engine_execute_node has the same rule.
bool accumulates(torch::autograd::Node* node) {
  if (node == nullptr) return false;
  const auto* nodes = torch::autograd::get_current_graph_task_nodes_in_graph();
  if (nodes == nullptr || !nodes->contains(node)) return false;
  const auto* exec_info = torch::autograd::get_current_graph_task_exec_info();
  if (exec_info == nullptr || exec_info->empty()) return true;
  const auto it = exec_info->find(node);
  return it != exec_info->end() && it->second.should_execute() && !it->second.captures_;
}

auto experts_handle() {
  static const auto kHandle =
      c10::Dispatcher::singleton().findSchemaOrThrow("kt_coproc::experts", "").typed<decltype(experts)>();
  return kHandle;
}
auto backward_handle() {
  static const auto kHandle = c10::Dispatcher::singleton()
                                  .findSchemaOrThrow("kt_coproc::experts_backward", "")
                                  .typed<decltype(experts_backward)>();
  return kHandle;
}

class ExpertsFunction : public torch::autograd::Function<ExpertsFunction> {
 public:
  static torch::autograd::variable_list forward(torch::autograd::AutogradContext* ctx, const Tensor& hidden,
                                                const Tensor& ids, const Tensor& weights,
                                                const optional<Tensor>& anchor, const optional<Tensor>& ticket,
                                                std::int64_t session, std::int64_t layer, std::int64_t adapter,
                                                std::int64_t mode) {
    const at::AutoDispatchBelowADInplaceOrView below_autograd;
    auto [y, owned] = experts_handle().call(hidden, ids, weights, anchor, ticket, session, layer, adapter, mode);
    // In saved_data, not saved with save_for_backward: hooks on saved tensors (non-reentrant checkpointing) then have
    // no reason to run the experts again.
    ctx->saved_data["ticket"] = owned;
    ctx->saved_data["session"] = session;
    ctx->saved_data["adapter"] = adapter;
    ctx->saved_data["k"] = ids.size(1);
    ctx->saved_data["weights_dtype"] = weights.scalar_type();
    torch::autograd::Node* anchor_node = nullptr;
    if (anchor.has_value() && anchor->defined() && anchor->requires_grad()) {
      // Kept alive by this node's own edge to it.
      anchor_node = torch::autograd::impl::gradient_edge(*anchor).function.get();
      ctx->saved_data["anchor"] = at::zeros({}, anchor->options());
    }
    ctx->saved_data["anchor_node"] = reinterpret_cast<std::int64_t>(anchor_node);
    ctx->mark_non_differentiable({owned});
    return {y, owned};
  }

  static torch::autograd::variable_list backward(torch::autograd::AutogradContext* ctx,
                                                 const torch::autograd::variable_list& grads) {
    auto& saved = ctx->saved_data;
    const std::int64_t adapter = saved["adapter"].toInt();
    auto* anchor_node = reinterpret_cast<torch::autograd::Node*>(saved["anchor_node"].toInt());
    std::int64_t flags = 0;
    if (adapter > 0 && accumulates(anchor_node)) flags |= shm::kAccumulate;
    if (torch::autograd::get_current_graph_task_keep_graph()) flags |= shm::kKeep;
    auto [dx, dw] = backward_handle().call(grads[0], saved["ticket"].toTensor(), saved["session"].toInt(),
                                           saved["k"].toInt(), adapter, flags);
    Tensor anchor_grad = saved.count("anchor") != 0 ? saved["anchor"].toTensor() : Tensor();
    return {dx,       Tensor(), dw.to(saved["weights_dtype"].toScalarType()), anchor_grad, Tensor(), Tensor(), Tensor(),
            Tensor(), Tensor()};
  }
};

std::tuple<Tensor, Tensor> experts_autograd(const Tensor& hidden, const Tensor& ids, const Tensor& weights,
                                            const optional<Tensor>& anchor, const optional<Tensor>& ticket,
                                            std::int64_t session, std::int64_t layer, std::int64_t adapter,
                                            std::int64_t mode) {
  const bool anchored = anchor.has_value() && anchor->defined() && anchor->requires_grad();
  const bool needed = at::GradMode::is_enabled() && (hidden.requires_grad() || weights.requires_grad() || anchored);
  const std::int64_t inner = mode == kAuto && needed ? static_cast<std::int64_t>(kKeep) : mode;
  if (!needed) {
    const at::AutoDispatchBelowADInplaceOrView below_autograd;
    return experts_handle().call(hidden, ids, weights, anchor, ticket, session, layer, adapter, inner);
  }
  auto results = ExpertsFunction::apply(hidden, ids, weights, anchor, ticket, session, layer, adapter, inner);
  return {results[0], results[1]};
}

}  // namespace

TORCH_LIBRARY(kt_coproc, library) {
  library.def(
      "experts(Tensor hidden, Tensor topk_ids, Tensor topk_weights, Tensor? anchor, Tensor? ticket, int session, "
      "int layer, int adapter, int mode) -> (Tensor, Tensor)");
  library.def(
      "experts_backward(Tensor grad_output, Tensor ticket, int session, int k, int adapter, int flags) "
      "-> (Tensor, Tensor)");
}
TORCH_LIBRARY_IMPL(kt_coproc, CompositeExplicitAutograd, library) {
  library.impl("experts", experts);
  library.impl("experts_backward", experts_backward);
}
TORCH_LIBRARY_IMPL(kt_coproc, Meta, library) {
  library.impl("experts", experts_meta);
  library.impl("experts_backward", experts_backward_meta);
}
TORCH_LIBRARY_IMPL(kt_coproc, Autograd, library) { library.impl("experts", experts_autograd); }

}  // namespace kt::python
