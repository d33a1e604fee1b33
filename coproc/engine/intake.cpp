#include "coproc/engine/intake.h"

#include "coproc/engine/messages.h"
#include "coproc/engine/validate.h"
#include "shm/doorbell.h"

namespace kt::coproc {

// At most a ring's worth at a time: a client whose requests are answered at once (shutdown) could go on for ever.
bool Intake::receive(Session& session) {
  for (std::uint32_t i = 0; i < shm::kNumSlots; ++i) {
    const std::uint64_t expected = session.ring.expected_sequence();
    const auto received = session.ring.try_receive();
    if (!received) return i > 0;
    if (!accept(session, *received, expected)) break;
  }
  return true;
}

// False: the session is gone.
bool Intake::accept(Session& session, const shm::ReceivedRequest& received, std::uint64_t expected) {
  const std::uint64_t now = shm::now_ns();
  if (received.sequence != expected) {
    registry_.break_session(session, protocol_error(session, received.request,
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
    registry_.break_session(session, protocol_error(session, received.request, *std::move(fault)));
    return false;
  }
  session.note_request(received.request, now);
  if (registry_.shutting_down()) {
    // The only answer that is given out of order: the request takes no effect.
    const Error error = shutting_down_error();
    session.ring.reply(received.sequence, shm::Reply{}, &error);
    session.queue.pop_back();
    accounting_.answered(session.account, received.request.verb, 0, false, now, now);
  }
  return true;
}

}  // namespace kt::coproc
