#include "coproc/engine/messages.h"

#include "tests/coproc/engine/owners_fixture.h"

namespace kt::test {
namespace {

using coproc::describe;
using shm::Verb;

TEST(Messages, NameTheRankTheProcessAndTheJob) {
  Owners owners;
  EXPECT_EQ(describe(owners.session(owners.open())), "rank 0 (pid 1001) of job 'session-1'");
}

TEST(Messages, NameTheLayerOfARequestFromItsActivationIfItHasOne) {
  Owners owners;
  coproc::Session& session = owners.session(owners.open());
  session.job->step = 5;
  shm::Request request;
  request.verb = Verb::kForward;
  request.layer = 3;
  request.adapter_id = 1;
  EXPECT_EQ(describe(session, request), "FORWARD of layer 3 with adapter 1 in step 5");
  request.verb = Verb::kBackward;
  request.act_id = 9;
  coproc::SavedActivation activation;
  activation.layer = 2;
  activation.adapter_id = 7;
  session.activations.add(9, activation);
  EXPECT_EQ(describe(session, request), "BACKWARD of activation 9, layer 2 with adapter 7 in step 5");
  request.verb = Verb::kBarrier;
  EXPECT_EQ(describe(session, request), "BARRIER with adapter 1 in step 5");
}

TEST(Messages, SayHowLongAgoTheLastRequestWas) {
  coproc::LastRequest last;
  EXPECT_EQ(describe(last, 1'250'000'000), "hello in step 0, 1.2 s ago");
  last = {"FORWARD", true, 3, 4, 2'000'000'000};
  EXPECT_EQ(describe(last, 2'000'000'000), "FORWARD of layer 3 in step 4, 0.0 s ago");
  EXPECT_EQ(describe(last, 0), "FORWARD of layer 3 in step 4, 0.0 s ago");  // Clocks of two reads.
}

TEST(Messages, HaveThreeLines) {
  Owners owners;
  coproc::Session& session = owners.session(owners.open());
  const shm::Request request;
  const coproc::SavedActivation activation;
  const Error reason{ErrorCode::kInvalidArgument, "what", "why", "fix"};
  const Error errors[] = {protocol_error(session, request, "why"),
                          unknown_adapter(session, request),
                          unknown_activation(session, request),
                          stale_activation(session, request, activation),
                          rank_gone(session, SessionEnd::kBye, reason, 0),
                          rank_gone(session, SessionEnd::kDied, reason, 0),
                          rank_gone(session, SessionEnd::kProtocolError, reason, 0),
                          coproc::shutting_down_error()};
  for (const Error& error : errors) {
    EXPECT_NE(error.code, ErrorCode::kOk);
    EXPECT_FALSE(error.what.empty() || error.why.empty() || error.fix.empty()) << error.text();
  }
  EXPECT_TRUE(has_text(errors[6].what, "broke the protocol"));
}

TEST(Messages, NameCommandsAndTensorsAsTheirSendersDo) {
  EXPECT_STREQ(command_name(coproc::CreateAdapter{}), "adapter_create");
  EXPECT_STREQ(command_name(coproc::DeleteAdapter{}), "adapter_delete");
  EXPECT_STREQ(coproc::adapter_tensor_name(AdapterTensor::kDownB), "down_b");
}

}  // namespace
}  // namespace kt::test
