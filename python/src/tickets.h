// A ticket owns one activation in the daemon. To Python and autograd it is an int64[1] CPU tensor (the act_id, 0 =
// none) whose storage's deleter sends RELEASE, unless a backward consumed the activation. So a dropped graph, a dropped
// checkpoint closure and a dropped variable all free it, and nothing has to be counted twice.
#pragma once
#include <ATen/core/Tensor.h>

#include <cstdint>

namespace kt::python {

at::Tensor make_ticket(std::int64_t session, std::uint64_t act_id);
at::Tensor empty_ticket();
// The act_id; 0 for an empty ticket. Raises kInvalidArgument for a tensor that is not a live ticket of that session.
std::uint64_t ticket_act_id(const at::Tensor& ticket, std::int64_t session);
// The daemon's activation is gone: the deleter sends nothing.
void mark_consumed(const at::Tensor& ticket);

}  // namespace kt::python
