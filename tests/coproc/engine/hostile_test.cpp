// Clients that break the protocol: the session ends with a typed error, its job fails like a death, and a healthy
// session beside it computes the same bits as ever.
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <random>

#include "tests/coproc/engine/engine_fixture.h"

namespace kt::test {
namespace {

using shm::Request;
using shm::Verb;

bool contains(const std::string& text, const std::string& part) { return text.find(part) != std::string::npos; }

// A request that is well-formed until `change`; payload parts it needs are zeros.
Request well_formed(Verb verb) {
  Request request;
  request.verb = verb;
  request.layer = 1;
  request.adapter_id = kAdapter;
  request.num_tokens = 2;
  request.act_id = verb == Verb::kRead || verb == Verb::kWrite ? 0 : 5;
  request.num_experts = 1;
  return request;
}

struct Attack {
  const char* name;
  Verb verb;
  std::function<void(Request&)> change;
  const char* why;  // Part of the error.
};
void PrintTo(const Attack& attack, std::ostream* out) { *out << attack.name; }

class Hostile : public ::testing::TestWithParam<Attack> {};

void expect_healthy(Rank& rank, Oracle& oracle, std::uint32_t seed) {
  const Tokens tokens = random_tokens(rank.shape(), 7, seed);
  const Bytes dy = random_elements(rank.shape(), 7 * 64, seed + 1);
  coproc::SavedActivation kept;
  EXPECT_EQ(rank.finish(rank.send_forward(3, kAdapter, 1, tokens)).rows, oracle.forward(3, true, tokens, &kept));
  const Outcome outcome = rank.finish(rank.send_backward(1, dy, shm::kAccumulate));
  const auto expected = oracle.backward({&kept}, {dy}, true);
  EXPECT_EQ(outcome.rows, expected[0].dx);
  EXPECT_EQ(outcome.extra, expected[0].dw);
}

TEST_P(Hostile, RequestEndsItsSessionAndNobodyElses) {
  Host host;
  auto healthy = host.open_job(1, "healthy");
  Oracle oracle(host);
  oracle.fill(7);
  auto job = host.open_job(2, "attacked");
  expect_healthy(*healthy[0], oracle, 1);
  ASSERT_TRUE(job[0]->finish(job[0]->send_forward(1, kAdapter, 4, random_tokens(host.shape(), 2, 1))).ok());
  const Ticket waiting = job[1]->send_barrier(0);

  Request request = well_formed(GetParam().verb);
  const bool keeps_offset = contains(GetParam().name, "offset");
  if (request.verb == Verb::kBackward || request.verb == Verb::kFetch) request.act_id = 4;
  GetParam().change(request);
  const Outcome outcome = job[0]->finish(job[0]->send_raw(request, Bytes(32768), keeps_offset));
  EXPECT_EQ(outcome.error.code, ErrorCode::kInvalidArgument);
  EXPECT_TRUE(contains(outcome.error.why, GetParam().why)) << outcome.error.text();
  EXPECT_TRUE(contains(outcome.error.what, "rank 0 (pid 1002) of job 'attacked'")) << outcome.error.text();

  const Outcome peer = job[1]->finish(waiting);
  EXPECT_EQ(peer.error.code, ErrorCode::kRankDied);
  EXPECT_TRUE(contains(peer.error.what, "broke the protocol")) << peer.error.text();
  host.rounds();
  ASSERT_EQ(host.broken().size(), 1u);
  EXPECT_EQ(host.broken()[0].first, job[0]->session_id);
  EXPECT_EQ(host.broken()[0].second.why, outcome.error.why);
  host.end(*job[0], SessionEnd::kProtocolError);  // The server closes the socket; the session is gone already.
  expect_healthy(*healthy[0], oracle, 2);
  expect_same_adapter(*healthy[0], oracle, {TensorKind::kParam, TensorKind::kGrad});
}

template <class Field, class Value>
std::function<void(Request&)> set(Field Request::*field, Value value) {
  return [=](Request& request) { request.*field = static_cast<Field>(value); };
}

const Attack kAttacks[] = {
    {"verb_zero", Verb::kNone, [](Request&) {}, "verb is 0"},
    {"verb_unknown", Verb::kForward, set(&Request::verb, 77), "verb is 77"},
    {"flags_unknown", Verb::kForward, set(&Request::flags, 0x80), "flags is 128"},
    {"flags_of_another_verb", Verb::kForward, set(&Request::flags, shm::kAccumulate), "FORWARD takes only"},
    {"flags_on_step", Verb::kStep, set(&Request::flags, shm::kKeep), "STEP takes only"},
    {"reserved", Verb::kBarrier, set(&Request::reserved, 1), "reserved is 1"},
    {"stream_flag", Verb::kForward, set(&Request::stream_flag, 256), "stream_flag is 256"},
    {"layer_dense", Verb::kForward, set(&Request::layer, 0), "layer is 0"},
    {"layer_beyond", Verb::kForward, set(&Request::layer, 65535), "layer is 65535"},
    {"offset_misaligned", Verb::kForward, set(&Request::payload_offset, 8), "must be a multiple of 256"},
    {"offset_beyond", Verb::kForward, set(&Request::payload_offset, std::uint64_t{1} << 40),
     "does not lie in the arena"},
    {"offset_wraps", Verb::kForward, set(&Request::payload_offset, ~std::uint64_t{0} << 8),
     "does not lie in the arena"},
    {"offset_at_the_end", Verb::kBackward, set(&Request::payload_offset, 2 * 1024 * 1024), "does not lie in the arena"},
    {"offset_of_norm", Verb::kNorm, set(&Request::payload_offset, 1), "must be a multiple of 256"},
    {"offset_of_step", Verb::kStep, set(&Request::payload_offset, 2 * 1024 * 1024 - 256), "does not lie in the arena"},
    {"offset_of_read", Verb::kRead, set(&Request::payload_offset, 2 * 1024 * 1024 - 256), "does not lie in the arena"},
    {"tokens_too_many", Verb::kForward, set(&Request::num_tokens, 0xffff'ffffu), "does not lie in the arena"},
    {"tokens_of_backward", Verb::kBackward, set(&Request::num_tokens, 3), "num_tokens is 3; the forward had 2"},
    {"tokens_of_fetch", Verb::kFetch, set(&Request::num_tokens, 3), "num_tokens is 3; the forward had 2"},
    {"act_id_zero", Verb::kBackward, set(&Request::act_id, 0), "act_id is 0"},
    {"act_id_zero_release", Verb::kRelease, set(&Request::act_id, 0), "act_id is 0"},
    {"act_id_live", Verb::kForward, set(&Request::act_id, 4), "act_id is 4, which is live"},
    {"keep_y_of_nothing", Verb::kForward,
     [](Request& request) {
       request.act_id = 0;
       request.flags = shm::kKeepY;
     },
     "KEEP_Y is set but act_id is 0"},
    {"kind_unknown", Verb::kRead, set(&Request::kind, 5), "kind is 5"},
    {"tensor_unknown", Verb::kWrite, set(&Request::tensor, 6), "tensor is 6"},
    {"layer_of_read", Verb::kRead, set(&Request::layer, 0), "layer is 0"},
    {"experts_beyond", Verb::kRead, set(&Request::first_expert, 4), "experts 4 to 5 (exclusive) of 4"},
    {"experts_wrap", Verb::kWrite, [](Request& request) { request.first_expert = request.num_experts = 0xffff'ffffu; },
     "of 4 were asked for"},
    {"experts_of_t", Verb::kRead,
     [](Request& request) {
       request.kind = TensorKind::kT;
       request.num_experts = 2;
     },
     "t is one number"},
};
INSTANTIATE_TEST_SUITE_P(Kinds, Hostile, ::testing::ValuesIn(kAttacks),
                         [](const auto& test) { return test.param.name; });

// What is wrong lies in the payload.
TEST(HostilePayload, WithBadExpertIdsEndsTheSession) {
  Host host;
  for (const std::int32_t id : {5, -1, INT32_MIN, INT32_MAX}) {
    auto rank = host.open();
    Tokens tokens = random_tokens(host.shape(), 3, 1);
    tokens.ids[3] = id;
    const Outcome outcome = rank->finish(rank->send_forward(1, 0, 0, tokens));
    EXPECT_EQ(outcome.error.code, ErrorCode::kInvalidArgument);
    EXPECT_TRUE(contains(outcome.error.why, "of token 1, slot 1 is " + std::to_string(id))) << outcome.error.text();
  }
  auto rank = host.open();
  Tokens tokens = random_tokens(host.shape(), 3, 1);
  tokens.ids.assign(tokens.ids.size(), 4);  // The sentinel: no expert, no contribution.
  EXPECT_EQ(rank->finish(rank->send_forward(1, 0, 0, tokens)).rows, Bytes(3 * 64 * 2));
}

TEST(HostilePayload, OfAStepEndsTheSession) {
  Host host;
  const auto why = [&](const std::function<void(shm::StepHeader&, Bytes&)>& change) {
    auto rank = host.open();
    EXPECT_EQ(error_of(get(host.create(*rank))), "");
    shm::StepHeader header{};
    header.num_groups = 1;
    Bytes payload(shm::StepPayload(4).bytes);
    change(header, payload);
    std::memcpy(payload.data(), &header, sizeof header);
    Request request;
    request.verb = Verb::kStep;
    request.adapter_id = kAdapter;
    const Outcome outcome = rank->finish(rank->send_raw(request, payload));
    EXPECT_EQ(outcome.error.code, ErrorCode::kInvalidArgument);
    return outcome.error.why;
  };
  EXPECT_TRUE(contains(why([](auto& header, auto&) { header.num_groups = 65; }), "num_groups is 65"));
  EXPECT_TRUE(contains(why([](auto& header, auto&) { header.num_groups = ~0ull; }), "num_groups is"));
  EXPECT_TRUE(contains(why([](auto& header, auto&) { header.groups[0].decoupled = 7; }), "decoupled is 7"));
  EXPECT_TRUE(
      contains(why([](auto&, Bytes& payload) { payload[shm::StepPayload(4).group_of.offset + 9] = std::byte{1}; }),
               "layer 1, tensor 3 names a group beyond"));
}

TEST(HostileSequence, JumpsEndTheSessionAndOlderOnesAreNothing) {
  Host host;
  for (const std::uint64_t sequence : {std::uint64_t{257 + 1}, std::uint64_t{3}, ~std::uint64_t{0}}) {
    auto rank = host.open();
    const Ticket first = rank->send_forward(1, 0, 0, random_tokens(host.shape(), 1, 1));
    EXPECT_TRUE(rank->finish(first).ok());
    const std::size_t num_broken = host.broken().size();
    rank->send_sequence(1);
    host.rounds();
    EXPECT_EQ(host.broken().size(), num_broken);
    rank->send_sequence(sequence);
    host.rounds();
    ASSERT_EQ(host.broken().size(), num_broken + 1);
    EXPECT_TRUE(contains(host.broken().back().second.why, "the next request is 2")) << sequence;
  }
}

// Random requests of a client that makes no protocol error: in every second round of the fuzz.
Request random_legal(std::mt19937_64& random, std::uint32_t index) {
  Request request = well_formed(static_cast<Verb>(1 + random() % 9));
  const bool is_forward = request.verb == Verb::kForward;
  request.act_id = is_forward ? index + 1 : 1 + random() % (index + 1);
  request.layer = static_cast<std::uint16_t>(1 + random() % 3);
  request.payload_offset = random() % 8000 * 256;
  if (is_forward) request.flags = random() % 2 != 0 ? shm::kKeepY : 0;
  if (request.verb == Verb::kBackward) request.flags = static_cast<std::uint8_t>(random() % 4 << 1);
  return request;
}

// The same with up to seven bytes replaced, and any verb, activation and flags.
Request random_hostile(std::mt19937_64& random, std::uint32_t index) {
  Request request = random_legal(random, index);
  if (random() % 4 == 0) request.verb = static_cast<Verb>(random() % 12);
  if (random() % 4 == 0) request.act_id = random() % 4;
  const std::uint64_t num_changes = random() % 8 == 0 ? 7 : random() % 2;
  for (std::uint64_t change = 0; change < num_changes; ++change) {
    const std::size_t at = random() % sizeof request;
    const auto byte = static_cast<std::uint8_t>(random());
    std::memcpy(reinterpret_cast<std::byte*>(&request) + at, &byte, 1);
  }
  return request;
}

TEST(HostileFuzz, NeverHurtsTheDaemonOrItsHealthySession) {
  const char* const given = std::getenv("KT_TEST_SEED");
  const auto seed = given != nullptr ? static_cast<std::uint32_t>(std::atoi(given)) : std::random_device{}();
  std::printf("seed %u (set KT_TEST_SEED to repeat)\n", seed);
  std::mt19937_64 random(seed);
  EngineOptions options = Host::default_options();
  options.activation_bytes_max = 1 << 22;
  Host host(2, options);
  auto healthy = host.open_job(1, "healthy");
  Oracle oracle(host);
  oracle.fill(7);
  std::size_t num_broken = 0;
  for (std::uint32_t round = 0; round < 60; ++round) {
    const bool hostile = round % 2 == 1;
    auto rank = host.open();
    if (random() % 2 == 0) {
      EXPECT_EQ(error_of(get(host.create(*rank))), "");
    }
    for (std::size_t at = 0; at < rank->segment().arena_bytes(); at += 8) {
      const std::uint64_t noise = hostile && random() % 3 == 0 ? random() : random() % 5;
      std::memcpy(rank->segment().arena() + at, &noise, sizeof noise);
    }
    std::vector<Ticket> tickets;
    for (std::uint32_t i = 0; i < 30; ++i) {
      const Request request = hostile ? random_hostile(random, i) : random_legal(random, i);
      tickets.push_back(rank->send_raw(request, {}, true));
    }
    expect_healthy(*healthy[0], oracle, round);
    // A session that was not ended has every request answered; finish() is the watchdog.
    for (int i = 0; i < 100 && !rank->is_done(tickets.back()); ++i) host.rounds(1);
    const bool broken = host.broken().size() > num_broken;
    num_broken = host.broken().size();
    EXPECT_TRUE(hostile || !broken) << host.broken().back().second.text();
    if (!broken) {
      for (const Ticket& ticket : tickets) rank->finish(ticket);
    }
    host.end(*rank, SessionEnd::kDied);
  }
  expect_same_adapter(*healthy[0], oracle, {TensorKind::kParam, TensorKind::kGrad});
  EXPECT_GT(num_broken, 5u);
}

}  // namespace
}  // namespace kt::test
