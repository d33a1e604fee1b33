// A Session against a daemon in this process: hello, splitting, releases, tensors, collectives, many threads.
#include "client/session.h"

#include <algorithm>
#include <numeric>
#include <thread>
#include <utility>
#include <vector>

#include "tests/client/session_call.h"

namespace kt::client {
namespace {

using testing::Call;
using testing::connect;
using testing::count_verb;
using testing::FakeDaemon;
using testing::FakeModel;
using testing::HangWatchdog;
using testing::wait_until;

TEST(Session, HelloSaysWhoWeAreAndTheModelComesBack) {
  const HangWatchdog watchdog;
  FakeDaemon daemon;
  const auto session = connect(daemon);
  EXPECT_EQ(session->model().num_experts, 8u);
  EXPECT_EQ(session->model().moe_layers, (std::vector<std::uint32_t>{0, 1, 2, 3}));
  EXPECT_EQ(session->model().path, "/models/fake");
  EXPECT_EQ(session->model().daemon_pid, static_cast<std::uint32_t>(::getpid()));
  EXPECT_TRUE(session->daemon_alive());
  const auto hello = daemon.hello();
  EXPECT_EQ(hello.at("pid"), ::getpid());
  EXPECT_EQ(hello.at("protocol"), shm::kProtocolVersion);
  EXPECT_FALSE(hello.contains("fingerprint"));
  EXPECT_FALSE(hello.contains("name"));
}

TEST(Session, ARefusedHelloIsTheDaemonsError) {
  const HangWatchdog watchdog;
  FakeDaemon daemon;
  daemon.answer_next({{"ok", false}, {"error", {{"code", 9}, {"what", "w"}, {"why", "y"}, {"fix", "f"}}}});
  ConnectOptions options;
  options.address = daemon.address();
  options.fingerprint = "other";
  options.name = "job";
  const auto session = Session::connect(options);
  ASSERT_FALSE(session.ok());
  EXPECT_EQ(session.error().code, ErrorCode::kModelMismatch);
  EXPECT_EQ(daemon.hello().at("fingerprint"), "other");
  EXPECT_EQ(daemon.hello().at("name"), "job");
}

TEST(Session, AHelloThatIsNotUnderstoodIsAVersionMismatch) {
  const HangWatchdog watchdog;
  FakeDaemon daemon;
  daemon.answer_next({{"ok", true}, {"model", "not an object"}});
  ConnectOptions options;
  options.address = daemon.address();
  const auto session = Session::connect(options);
  ASSERT_FALSE(session.ok());
  EXPECT_EQ(session.error().code, ErrorCode::kVersionMismatch);
}

TEST(Session, ADaemonThatGoesAwayDuringHelloIsDead) {
  const HangWatchdog watchdog;
  FakeDaemon daemon;
  daemon.hang_up_at_hello();
  ConnectOptions options;
  options.address = daemon.address();
  const auto session = Session::connect(options);
  ASSERT_FALSE(session.ok());
  EXPECT_EQ(session.error().code, ErrorCode::kCoprocDied) << session.error().text();
}

TEST(Session, ACallLargerThanTheArenaIsSplitAndGivesTheSame) {
  const HangWatchdog watchdog;
  const FakeModel model;
  FakeDaemon daemon(model);
  const auto session = connect(daemon);  // 2 MiB: about 7,500 tokens of 272 bytes.
  Call call(model, 20'000, 1);
  const std::uint64_t act_id = session->new_act_id();
  ASSERT_TRUE(call.forward(*session, act_id, shm::kKeepY).ok());
  call.expect_forward();
  EXPECT_EQ(count_verb(daemon, shm::Verb::kForward), 3u);
  EXPECT_EQ(daemon.num_live_activations(), 3u);

  const std::vector<float> first_y = std::exchange(call.y, std::vector<float>(call.y.size()));
  ASSERT_TRUE(call.fetch(*session, act_id).ok());
  EXPECT_EQ(call.y, first_y);

  ASSERT_TRUE(call.backward(*session, act_id, shm::kKeep | shm::kAccumulate).ok());
  call.expect_backward();
  EXPECT_EQ(daemon.num_live_activations(), 3u);
  ASSERT_TRUE(call.backward(*session, act_id, shm::kAccumulate).ok());
  EXPECT_EQ(daemon.num_live_activations(), 0u);
  const Status again = call.backward(*session, act_id, 0);
  ASSERT_FALSE(again.ok());
  EXPECT_EQ(again.error().code, ErrorCode::kNotFound);
}

TEST(Session, NoRequestHasMoreTokensThanTheDaemonTakes) {
  const HangWatchdog watchdog;
  FakeModel model;
  model.batch_tokens_max = 100;
  FakeDaemon daemon(model);
  const auto session = connect(daemon);
  Call call(model, 250, 2);
  ASSERT_TRUE(call.forward(*session, 0).ok());
  call.expect_forward();
  for (const shm::Request& request : daemon.requests()) EXPECT_LE(request.num_tokens, 100u);
  EXPECT_EQ(daemon.requests().size(), 3u);
}

TEST(Session, NoTokensAreStillARequest) {
  const HangWatchdog watchdog;
  FakeDaemon daemon;
  const auto session = connect(daemon);
  const std::uint64_t act_id = session->new_act_id();
  ASSERT_TRUE(session->claim(ForwardCall{.adapter_id = 1, .act_id = act_id}).value().submit().ok());
  ASSERT_TRUE(session->claim(BackwardCall{.act_id = act_id, .flags = shm::kAccumulate}).value().submit().ok());
  EXPECT_EQ(count_verb(daemon, shm::Verb::kBackward), 1u);
  EXPECT_EQ(daemon.num_live_activations(), 0u);
}

TEST(Session, ASplitForwardThatFailsHalfWayReleasesWhatItKept) {
  const HangWatchdog watchdog;
  FakeModel model;
  model.batch_tokens_max = 100;
  FakeDaemon daemon(model);
  const auto session = connect(daemon);
  Call call(model, 250, 3);
  daemon.refuse_next({ErrorCode::kActivationLimit, "full", "1 of 1", "wait"}, 1);
  const Status status = call.forward(*session, session->new_act_id());
  ASSERT_FALSE(status.ok());
  EXPECT_EQ(status.error().code, ErrorCode::kActivationLimit);
  EXPECT_EQ(count_verb(daemon, shm::Verb::kForward), 2u);
  wait_until([&] { return daemon.num_live_activations() == 0; });
}

TEST(Session, IdsBeyondTheLastExpertBecomeTheSentinelAndNegativeOnesAreRefused) {
  const HangWatchdog watchdog;
  const FakeModel model;
  FakeDaemon daemon(model);
  const auto session = connect(daemon);
  Call call(model, 3, 4);
  call.ids[2] = 1'000'000;
  const std::uint64_t act_id = session->new_act_id();
  ASSERT_TRUE(call.forward(*session, act_id).ok());
  EXPECT_EQ(call.ids[2], 1'000'000) << "the caller's ids stay as they are";
  call.ids[2] = static_cast<std::int32_t>(model.num_experts);
  call.expect_forward();
  call.ids[2] = -1;
  const Status refused = call.forward(*session, session->new_act_id());
  ASSERT_FALSE(refused.ok());
  EXPECT_EQ(refused.error().code, ErrorCode::kInvalidArgument);
  EXPECT_EQ(count_verb(daemon, shm::Verb::kForward), 1u) << "the session would have ended";
}

TEST(Session, MistakesThatWouldEndTheSessionAreRefusedBeforeTheyAreSent) {
  const HangWatchdog watchdog;
  const FakeModel model;
  FakeDaemon daemon(model);
  const auto session = connect(daemon);
  Call call(model, 3, 5);
  const std::uint64_t act_id = session->new_act_id();
  EXPECT_FALSE(session->claim(ForwardCall{.layer = 77}).ok());
  EXPECT_FALSE(call.forward(*session, 0, shm::kKeepY).ok());
  EXPECT_FALSE(call.forward(*session, act_id, shm::kAccumulate).ok());
  EXPECT_FALSE(session->step(1, 1, {}, std::vector<std::uint8_t>(3)).ok());
  EXPECT_FALSE(session->step(1, 1, {}, std::vector<std::uint8_t>(24, 0)).ok());
  EXPECT_FALSE(session->squared_norm(1, std::vector<std::uint8_t>(23)).ok());
  EXPECT_TRUE(daemon.requests().empty());
  ASSERT_TRUE(call.forward(*session, act_id).ok());
  EXPECT_FALSE(call.forward(*session, act_id).ok());
  EXPECT_FALSE(session->claim(BackwardCall{.act_id = act_id, .num_tokens = 2}).ok());
  EXPECT_EQ(daemon.requests().size(), 1u);
}

TEST(Session, ReleasedActivationsGoAwayWithoutAFurtherRequest) {
  const HangWatchdog watchdog;
  FakeModel model;
  model.batch_tokens_max = 4;
  FakeDaemon daemon(model);
  const auto session = connect(daemon);
  Call call(model, 10, 6);
  std::vector<std::uint64_t> act_ids;
  for (int i = 0; i < 150; ++i) {  // 450 chunks: more than the ring has slots.
    act_ids.push_back(session->new_act_id());
    ASSERT_TRUE(call.forward(*session, act_ids.back()).ok());
  }
  EXPECT_EQ(daemon.num_live_activations(), 450u);
  for (const std::uint64_t act_id : act_ids) session->release(act_id);
  session->release(act_ids.front());
  session->release(12345);
  wait_until([&] { return daemon.num_live_activations() == 0; });
  EXPECT_EQ(count_verb(daemon, shm::Verb::kRelease), 450u);
}

TEST(Session, ReleasesGoBeforeTheNextRequest) {
  const HangWatchdog watchdog;
  FakeModel model;
  FakeDaemon daemon(model);
  const auto session = connect(daemon);
  Call call(model, 10, 7);
  std::vector<std::uint64_t> act_ids;
  for (int i = 0; i < 300; ++i) {
    act_ids.push_back(session->new_act_id());
    ASSERT_TRUE(call.forward(*session, act_ids.back()).ok());
  }
  for (const std::uint64_t act_id : act_ids) session->release(act_id);
  ASSERT_TRUE(call.forward(*session, 0).ok());
  EXPECT_EQ(daemon.num_live_activations(), 0u);
}

TEST(Session, AdapterTensorsAreReadAndWrittenInPartsOfTheArena) {
  const HangWatchdog watchdog;
  FakeModel model;
  model.hidden_size = 2048;
  model.intermediate_size = 1024;
  const std::uint32_t r = 64;  // 512 KiB an expert: three fit into 2 MiB.
  FakeDaemon daemon(model, r);
  const auto session = connect(daemon);
  ASSERT_TRUE(session->create_adapter(1, {{0, 2}, {r, 2.0}, true, {r, 2.0}}).ok());
  std::vector<float> values(model.num_experts * std::size_t{r} * model.hidden_size);
  std::iota(values.begin(), values.end(), 0.0f);
  const TensorRef ref{shm::TensorKind::kParam, 2, shm::AdapterTensor::kGateA, 0, model.num_experts};
  ASSERT_TRUE(session->write(1, ref, values).ok());
  EXPECT_EQ(count_verb(daemon, shm::Verb::kWrite), 3u);
  std::vector<float> read_back(values.size());
  ASSERT_TRUE(session->read(1, ref, read_back).ok());
  EXPECT_EQ(read_back, values);
  std::vector<float> one(r * std::size_t{model.hidden_size});
  TensorRef third = ref;
  third.first_expert = 3;
  third.num_experts = 1;
  ASSERT_TRUE(session->read(1, third, one).ok());
  EXPECT_TRUE(std::equal(one.begin(), one.end(), values.begin() + 3 * static_cast<std::ptrdiff_t>(one.size())));
  std::vector<float> t(1);
  EXPECT_TRUE(session->read(1, {shm::TensorKind::kT, 2, shm::AdapterTensor::kGateA, 0, 0}, t).ok());
}

TEST(Session, TensorsThatDoNotExistOrDoNotFitAreRefused) {
  const HangWatchdog watchdog;
  FakeModel model;
  model.hidden_size = 4096;
  FakeDaemon daemon(model, 256);
  const auto session = connect(daemon);
  ASSERT_TRUE(session->create_adapter(1, {{0}, {256, 2.0}, true, {0, 0.0}}).ok());
  std::vector<float> values(256 * std::size_t{model.hidden_size});
  const auto code = [&](std::uint32_t adapter, std::uint32_t layer, shm::AdapterTensor tensor, std::uint32_t first) {
    const Status status = session->read(adapter, {shm::TensorKind::kParam, layer, tensor, first, 1}, values);
    return status.ok() ? ErrorCode::kOk : status.error().code;
  };
  EXPECT_EQ(code(2, 0, shm::AdapterTensor::kGateA, 0), ErrorCode::kNotFound);
  EXPECT_EQ(code(1, 1, shm::AdapterTensor::kGateA, 0), ErrorCode::kNotFound);
  EXPECT_EQ(code(1, 0, shm::AdapterTensor::kUpA, 0), ErrorCode::kNotFound) << "one A for gate and up";
  EXPECT_EQ(code(1, 0, shm::AdapterTensor::kDownA, 0), ErrorCode::kNotFound) << "down is not adapted";
  EXPECT_EQ(code(1, 0, shm::AdapterTensor::kGateB, 0), ErrorCode::kInvalidArgument) << "another size";
  EXPECT_EQ(code(1, 0, shm::AdapterTensor::kGateA, 8), ErrorCode::kInvalidArgument) << "8 experts only";
  EXPECT_EQ(code(1, 0, shm::AdapterTensor::kGateA, 0), ErrorCode::kInvalidArgument) << "4 MiB in an arena of 2 MiB";
  EXPECT_TRUE(daemon.requests().empty());
  ASSERT_TRUE(session->delete_adapter(1).ok());
  EXPECT_EQ(code(1, 0, shm::AdapterTensor::kGateA, 0), ErrorCode::kNotFound);
}

TEST(Session, CollectivesCarryWhatTheyWereGivenAndStepsAreCounted) {
  const HangWatchdog watchdog;
  FakeDaemon daemon;
  const auto session = connect(daemon);
  EXPECT_EQ(session->steps(), 0u);
  const auto joined = session->join({"job", "name", 1, 2, {0, 1}, 5.0});
  ASSERT_TRUE(joined.ok());
  EXPECT_EQ(joined.value(), 7u);
  std::vector<std::uint8_t> group_of(24, 0);
  group_of[5] = shm::kFrozen;
  const auto norm = session->squared_norm(1, group_of);
  ASSERT_TRUE(norm.ok());
  EXPECT_EQ(norm.value(), 23.0);
  const std::vector<shm::StepGroup> groups = {{1e-3, 0.9, 0.999, 1e-8, 0.01, 1}};
  ASSERT_TRUE(session->step(1, 0.5, groups, group_of).ok());
  ASSERT_TRUE(session->barrier(1).ok());
  ASSERT_TRUE(session->discard(1).ok());
  EXPECT_EQ(session->steps(), 8u);
  const auto requests = daemon.requests();
  ASSERT_EQ(requests.size(), 4u);
  EXPECT_EQ(requests[1].verb, shm::Verb::kStep);
  EXPECT_EQ(requests[1].step, 7u);
  daemon.refuse_next({ErrorCode::kDisagreement, "a", "b", "c"});
  EXPECT_FALSE(session->step(1, 0.5, groups, group_of).ok());
  EXPECT_EQ(session->steps(), 8u) << "a step that failed is not counted";
}

TEST(Session, ManyThreadsShareASmallArena) {
  const HangWatchdog watchdog;
  const FakeModel model;
  FakeDaemon daemon(model);
  const auto session = connect(daemon);
  std::vector<std::thread> threads;
  for (unsigned i = 0; i < 4; ++i) {
    threads.emplace_back([&, i] {
      for (unsigned round = 0; round < 6; ++round) {
        Call call(model, (i + round) % 4 == 0 ? 9000 : 1 + 1000 * i, 100 * i + round);
        const std::uint64_t act_id = session->new_act_id();
        ASSERT_TRUE(call.forward(*session, act_id).ok());
        call.expect_forward();
        if (round % 3 == 0) {
          session->release(act_id);
        } else {
          ASSERT_TRUE(call.backward(*session, act_id).ok());
          call.expect_backward();
        }
      }
    });
  }
  for (std::thread& thread : threads) thread.join();
  wait_until([&] { return daemon.num_live_activations() == 0; });
}

}  // namespace
}  // namespace kt::client
