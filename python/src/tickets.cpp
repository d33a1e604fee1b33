#include "python/src/tickets.h"

#include <ATen/Functions.h>
#include <ATen/ops/from_blob.h>

#include <mutex>
#include <unordered_set>

#include "python/src/errors.h"
#include "python/src/sessions.h"

namespace kt::python {
namespace {

struct Ticket {
  std::int64_t act_id = 0;  // The tensor's data.
  std::int64_t session = 0;
  bool consumed = false;
};

// Which addresses are tickets: a tensor that a caller made up is refused, not followed. Never destroyed.
struct Live {
  std::mutex mutex;
  std::unordered_set<const void*> tickets;
};
Live& live() {
  static auto* const kLive = new Live;
  return *kLive;
}

void drop(void* data) {
  const auto* ticket = static_cast<Ticket*>(data);
  {
    const std::lock_guard lock(live().mutex);
    live().tickets.erase(data);
  }
  if (!ticket->consumed) {
    if (const auto open = find_session_or_null(ticket->session)) {
      open->session->release(static_cast<std::uint64_t>(ticket->act_id));
    }
  }
  delete ticket;
}

Ticket* find(const at::Tensor& ticket) {
  if (!ticket.device().is_cpu() || ticket.scalar_type() != at::kLong || ticket.numel() != 1) return nullptr;
  void* data = ticket.data_ptr();
  const std::lock_guard lock(live().mutex);
  return live().tickets.contains(data) ? static_cast<Ticket*>(data) : nullptr;
}

}  // namespace

at::Tensor make_ticket(std::int64_t session, std::uint64_t act_id) {
  auto* ticket = new Ticket{static_cast<std::int64_t>(act_id), session, false};
  {
    const std::lock_guard lock(live().mutex);
    live().tickets.insert(ticket);
  }
  return at::from_blob(ticket, {1}, drop, at::TensorOptions().dtype(at::kLong));
}

at::Tensor empty_ticket() { return at::zeros({1}, at::TensorOptions().dtype(at::kLong)); }

std::uint64_t ticket_act_id(const at::Tensor& tensor, std::int64_t session) {
  const Ticket* ticket = find(tensor);
  if (ticket == nullptr || ticket->session != session) {
    raise({ErrorCode::kInvalidArgument, "kt_coproc::experts: this is not a ticket of this session",
           "a ticket is the second result of an earlier call on session " + std::to_string(session),
           "pass that tensor itself, not a copy of it"});
  }
  return static_cast<std::uint64_t>(ticket->act_id);
}

void mark_consumed(const at::Tensor& tensor) {
  if (Ticket* ticket = find(tensor)) ticket->consumed = true;
}

}  // namespace kt::python
