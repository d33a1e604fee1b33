// What the tests of Session against a FakeDaemon share: connecting, and one experts call with its expected results.
#pragma once
#include <algorithm>
#include <cstdint>
#include <cstring>
#include <memory>
#include <random>
#include <span>
#include <utility>
#include <vector>

#include "client/session.h"
#include "tests/client/client_test.h"
#include "tests/client/fake_daemon.h"

namespace kt::client::testing {

inline std::unique_ptr<Session> connect(const FakeDaemon& daemon, std::uint64_t arena_bytes = shm::kArenaBytesMin) {
  ConnectOptions options;
  options.address = daemon.address();
  options.arena_bytes = arena_bytes;
  auto session = Session::connect(options);
  EXPECT_TRUE(session.ok()) << session.error().text();
  return std::move(session).value();
}

// The tensors of one experts call, and what the fake daemon makes of them.
struct Call {
  Call(const FakeModel& model, std::uint32_t tokens, unsigned seed)
      : num_tokens(tokens), hidden(model.hidden_size), top_k(model.top_k) {
    std::mt19937 random(seed);
    std::normal_distribution<float> normal;
    const auto fill = [&](std::vector<float>& values, std::size_t count) {
      values.resize(count);
      for (float& value : values) value = normal(random);
    };
    fill(x, tokens * hidden);
    fill(dy, tokens * hidden);
    fill(weights, tokens * top_k);
    ids.resize(tokens * top_k);
    for (std::int32_t& id : ids) id = static_cast<std::int32_t>(random() % model.num_experts);
    y.resize(x.size());
    dx.resize(x.size());
    dw.resize(weights.size());
  }
  Status forward(Session& session, std::uint64_t act_id, std::uint8_t flags = 0) {
    return each_piece(session.claim(ForwardCall{1, 1, act_id, flags, num_tokens}));
  }
  Status fetch(Session& session, std::uint64_t act_id) {
    return each_piece(session.claim(FetchCall{act_id, num_tokens}));
  }
  Status backward(Session& session, std::uint64_t act_id, std::uint8_t flags = 0) {
    return each_piece(session.claim(BackwardCall{act_id, flags, num_tokens}));
  }
  void expect_forward() const {
    for (std::size_t i = 0; i < x.size(); ++i) {
      float sum = 0;
      for (std::size_t j = i / hidden * top_k; j < (i / hidden + 1) * top_k; ++j) {
        sum += weights[j] * static_cast<float>(ids[j] + 1);
      }
      ASSERT_EQ(y[i], x[i] + sum) << "element " << i;
    }
  }
  void expect_backward() const {
    for (std::size_t i = 0; i < dx.size(); ++i) ASSERT_EQ(dx[i], 2 * dy[i]) << "element " << i;
    for (std::size_t i = 0; i < dw.size(); ++i) {
      ASSERT_EQ(dw[i], dy[i / top_k * hidden] + static_cast<float>(ids[i])) << "element " << i;
    }
  }

  // The inputs of the claim's piece, from this call's tensors; and its outputs into them.
  void write(Claim& claim) const {
    const std::vector<float>& rows = claim.ids().empty() ? dy : x;
    copy(rows.data() + claim.first_token() * hidden, claim.input());
    copy(ids.data() + claim.first_token() * top_k, claim.ids());
    copy(weights.data() + claim.first_token() * top_k, claim.routing_weights());
  }
  void read(const Claim& claim) {
    std::vector<float>& rows = claim.grad_weights().empty() ? y : dx;
    std::memcpy(rows.data() + claim.first_token() * hidden, claim.output().data(), claim.output().size_bytes());
    std::memcpy(dw.data() + claim.first_token() * top_k, claim.grad_weights().data(),
                claim.grad_weights().size_bytes());
  }

  std::uint32_t num_tokens;
  std::size_t hidden, top_k;
  std::vector<float> x, y, dy, dx, weights, dw;
  std::vector<std::int32_t> ids;

 private:
  template <class T>
  static void copy(const void* from, std::span<T> to) {
    std::memcpy(to.data(), from, to.size_bytes());
  }
  // Outputs are read also when a piece failed: they are NaN then.
  Status each_piece(Result<Claim> claimed) {
    KT_TRY(Claim claim, std::move(claimed));
    do {
      write(claim);
      const Status status = claim.submit();
      read(claim);
      if (!status.ok()) return status;
    } while (claim.next());
    return ok_status();
  }
};

inline std::size_t count_verb(const FakeDaemon& daemon, shm::Verb verb) {
  const auto requests = daemon.requests();
  return static_cast<std::size_t>(
      std::count_if(requests.begin(), requests.end(), [verb](const auto& request) { return request.verb == verb; }));
}

}  // namespace kt::client::testing
