#include "client/liveness.h"

namespace kt::client {

void Liveness::set_end(End end) {
  End expected = End::kNone;
  end_.compare_exchange_strong(expected, end, std::memory_order_acq_rel);
}

void Liveness::note_request(shm::Verb verb, std::optional<std::uint32_t> layer, std::uint64_t step) {
  const std::lock_guard lock(mutex_);
  last_request_ = {verb, layer, step};
}

void Liveness::note_refusal(const Error& error) {
  const std::lock_guard lock(mutex_);
  refusal_ = error;
}

bool Liveness::has_refusal() const {
  const std::lock_guard lock(mutex_);
  return refusal_.has_value();
}

std::string Liveness::last_request_text() const {
  if (last_request_.verb == shm::Verb::kNone) return "no request was sent yet";
  std::string text = std::string("the last request was ") + shm::verb_name(last_request_.verb);
  if (last_request_.layer) text += " of layer " + std::to_string(*last_request_.layer);
  return text + " at step " + std::to_string(last_request_.step);
}

Error Liveness::error(End end) const {
  const std::lock_guard lock(mutex_);
  const std::string daemon = "the co-process (pid " + std::to_string(daemon_pid_) + ")";
  if (end == End::kClosed) {
    const std::string why = refusal_ ? refusal_->what + ": " + refusal_->why : "it gave no reason on the ring";
    return Error{ErrorCode::kInvalidArgument, daemon + " lives, but ended this session",
                 why + "; " + last_request_text(), "connect again; if it comes again, see the daemon's log"};
  }
  const std::string restart =
      "start it again with `kt-coproc run --model " + model_path_ + "`, then resume from the last checkpoint";
  if (end == End::kShutDown) {
    return Error{ErrorCode::kCoprocDied, daemon + " was shut down", "it was asked to stop; " + last_request_text(),
                 restart};
  }
  return Error{ErrorCode::kCoprocDied, daemon + " died", "its process has ended; " + last_request_text(), restart};
}

}  // namespace kt::client
