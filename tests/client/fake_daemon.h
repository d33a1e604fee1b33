// A daemon small enough to see through: one session, one thread, arithmetic that tells every token apart.
//
//   FORWARD   y[t,h] = x[t,h] + Σ_j weights[t,j] · (ids[t,j] + 1)      FETCH  the kept y
//   BACKWARD  dx[t,h] = 2 · dy[t,h];  dw[t,j] = dy[t,0] + ids[t,j]     READ, WRITE  one float per element
// Elements are f32. Collectives answer at once; NORM with the number of group_of bytes that are not kFrozen.
#pragma once
#include <atomic>
#include <condition_variable>
#include <cstdint>
#include <deque>
#include <map>
#include <mutex>
#include <nlohmann/json.hpp>
#include <optional>
#include <string>
#include <thread>
#include <vector>

#include "shm/doorbell.h"
#include "shm/payload.h"
#include "shm/ring.h"
#include "shm/segment.h"
#include "shm/status_page.h"
#include "tests/support/temp_dir.h"

namespace kt::client::testing {

struct FakeModel {
  std::uint32_t num_layers = 4, num_experts = 8, top_k = 2, hidden_size = 32, intermediate_size = 16;
  std::uint32_t batch_tokens_max = 16384;
};

class FakeDaemon {
 public:
  // Listens at once. Accepts every adapter; adapter_r is the r of those it is asked about.
  explicit FakeDaemon(FakeModel model = {}, std::uint32_t adapter_r = 4);
  ~FakeDaemon();

  std::string address() const { return "unix:" + socket_path_; }
  // The next control answers, instead of the usual ones: a refusal, a strange hello.
  void answer_next(nlohmann::json answer);
  void hang_up_at_hello() { hang_up_at_hello_ = true; }  // Instead of an answer.
  nlohmann::json hello() const;                          // As it was received.

  // Requests in the order they came.
  std::vector<shm::Request> requests() const;
  std::size_t num_live_activations() const;

  // While held, requests are received and stay unanswered.
  void hold(bool held);
  // Answers one request that is not a RELEASE with this error: the next one, after `num_others` others.
  void refuse_next(Error error, std::uint32_t num_others = 0);
  void shut_down() { segment_->header().state.store(shm::SessionState::kShuttingDown); }
  void hang_up();  // Closes the session's socket.
  bool client_left() const { return client_left_.load(); }

 private:
  struct Kept {
    std::vector<std::int32_t> ids;
    std::vector<float> y;
    std::uint32_t num_tokens = 0;
  };

  void serve();
  void answer_control();
  void take_requests();
  void answer(const shm::ReceivedRequest& received);
  std::optional<Error> perform(const shm::Request& request, shm::Reply& reply);
  std::optional<Error> forward(const shm::Request& request);
  std::optional<Error> backward(const shm::Request& request);
  void read_or_write(const shm::Request& request);
  float* floats(const shm::Request& request, const shm::Part& part) const;
  shm::PayloadShape shape() const { return {model_.hidden_size, model_.top_k, 4}; }
  nlohmann::json hello_reply() const;

  const FakeModel model_;
  const std::uint32_t adapter_r_;
  kt::testing::TempDir directory_;
  const std::string socket_path_;
  UniqueFd listener_, socket_, doorbell_, wake_;
  std::optional<shm::Segment> segment_;
  std::optional<shm::StatusPageOwner> status_;
  std::optional<shm::DaemonRing> ring_;

  mutable std::mutex mutex_;  // The following, between the test and the thread.
  std::vector<shm::Request> requests_;
  std::deque<nlohmann::json> next_answers_;
  nlohmann::json hello_;
  std::optional<Error> refuse_next_;
  std::uint32_t num_before_refusal_ = 0;
  std::map<std::uint64_t, Kept> activations_;
  bool held_ = false;
  bool hang_up_ = false;
  bool stop_ = false;

  std::deque<shm::ReceivedRequest> unanswered_;         // The thread's own.
  std::map<std::uint32_t, std::vector<float>> values_;  // The thread's: the last tensor written, by expert.
  std::atomic<bool> hang_up_at_hello_ = false;
  std::atomic<bool> client_left_ = false;
  std::thread thread_;
};

}  // namespace kt::client::testing
