#include "client/liveness.h"

#include <gtest/gtest.h>

namespace kt::client {
namespace {

bool contains(const std::string& text, const std::string& part) { return text.find(part) != std::string::npos; }

TEST(Liveness, TheFirstReasonStays) {
  Liveness liveness(4711, "/models/m");
  EXPECT_EQ(liveness.end(), End::kNone);
  liveness.set_end(End::kShutDown);
  liveness.set_end(End::kDied);
  EXPECT_EQ(liveness.end(), End::kShutDown);
}

TEST(Liveness, ADeathNamesTheProcessTheLastRequestAndTheCommand) {
  Liveness liveness(4711, "/models/m");
  EXPECT_TRUE(contains(liveness.error(End::kDied).why, "no request was sent yet"));
  liveness.note_request(shm::Verb::kForward, 3, 12);
  liveness.note_request(shm::Verb::kStep, std::nullopt, 13);
  const Error error = liveness.error(End::kDied);
  EXPECT_EQ(error.code, ErrorCode::kCoprocDied);
  EXPECT_TRUE(contains(error.what, "pid 4711) died")) << error.text();
  EXPECT_TRUE(contains(error.why, "STEP at step 13")) << error.text();
  EXPECT_TRUE(contains(error.fix, "kt-coproc run --model /models/m")) << error.text();
}

TEST(Liveness, AShutdownIsADeathThatWasAskedFor) {
  Liveness liveness(4711, "/models/m");
  liveness.note_request(shm::Verb::kBackward, 3, 12);
  const Error error = liveness.error(End::kShutDown);
  EXPECT_EQ(error.code, ErrorCode::kCoprocDied);
  EXPECT_TRUE(contains(error.what, "was shut down")) << error.text();
  EXPECT_TRUE(contains(error.why, "BACKWARD of layer 3 at step 12")) << error.text();
}

TEST(Liveness, ASessionThatTheDaemonEndedQuotesTheLastRefusal) {
  Liveness liveness(4711, "/models/m");
  EXPECT_FALSE(liveness.has_refusal());
  EXPECT_TRUE(contains(liveness.error(End::kClosed).why, "it gave no reason"));
  liveness.note_refusal({ErrorCode::kInvalidArgument, "an earlier one", "x", "y"});
  liveness.note_refusal({ErrorCode::kInvalidArgument, "a malformed request", "layer is 99", "fix it"});
  EXPECT_TRUE(liveness.has_refusal());
  const Error error = liveness.error(End::kClosed);
  EXPECT_EQ(error.code, ErrorCode::kInvalidArgument);
  EXPECT_TRUE(contains(error.what, "lives, but ended this session")) << error.text();
  EXPECT_TRUE(contains(error.why, "a malformed request: layer is 99")) << error.text();
}

}  // namespace
}  // namespace kt::client
