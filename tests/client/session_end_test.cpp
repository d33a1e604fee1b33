// How a Session ends against a daemon in this process: shutdown, a closed session, fork. Death: failure_test.cpp.
#include <sys/wait.h>
#include <unistd.h>

#include <cmath>
#include <memory>
#include <string>
#include <thread>

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

TEST(SessionEnd, AShutdownCompletesWhatIsInFlightAndIsNamedAfterwards) {
  const HangWatchdog watchdog;
  const FakeModel model;
  FakeDaemon daemon(model);
  const auto session = connect(daemon);
  Call call(model, 5, 8);
  daemon.hold(true);
  std::thread in_flight([&] { EXPECT_TRUE(call.forward(*session, 0).ok()); });
  wait_until([&] { return daemon.requests().size() == 1; });
  daemon.shut_down();
  daemon.hold(false);
  in_flight.join();
  call.expect_forward();
  daemon.hang_up();
  wait_until([&] { return !session->daemon_alive(); });
  for (const Status& status : {call.forward(*session, 0), session->barrier(1), session->delete_adapter(1)}) {
    ASSERT_FALSE(status.ok());
    EXPECT_EQ(status.error().code, ErrorCode::kCoprocDied);
    EXPECT_NE(status.error().what.find("shut down"), std::string::npos) << status.error().text();
    EXPECT_NE(status.error().what.find(std::to_string(::getpid())), std::string::npos) << "names the daemon's pid";
  }
}

TEST(SessionEnd, ASessionThatTheDaemonEndsIsNotADeadDaemon) {
  const HangWatchdog watchdog;
  const FakeModel model;
  FakeDaemon daemon(model);
  const auto session = connect(daemon);
  Call call(model, 5, 9);
  daemon.refuse_next({ErrorCode::kInvalidArgument, "a malformed request", "layer is 99", "fix it"});
  EXPECT_EQ(call.forward(*session, 0).error().code, ErrorCode::kInvalidArgument);
  daemon.hold(true);
  std::thread waiter([&] {
    const Status status = call.forward(*session, 0);
    ASSERT_FALSE(status.ok());
    EXPECT_EQ(status.error().code, ErrorCode::kInvalidArgument);
    for (const float value : call.y) EXPECT_TRUE(std::isnan(value));
  });
  wait_until([&] { return daemon.requests().size() == 2; });
  daemon.hang_up();
  waiter.join();
  const Status later = session->barrier(1);
  ASSERT_FALSE(later.ok());
  EXPECT_EQ(later.error().code, ErrorCode::kInvalidArgument);
  EXPECT_NE(later.error().why.find("layer is 99"), std::string::npos) << later.error().text();
  EXPECT_TRUE(session->daemon_alive());
  const Status control = session->delete_adapter(1);
  ASSERT_FALSE(control.ok());
  EXPECT_EQ(control.error().code, ErrorCode::kInvalidArgument);
}

TEST(SessionEnd, AForkedChildIsRefusedAndDoesNotKeepTheSessionOpen) {
  const HangWatchdog watchdog;
  const FakeModel model;
  FakeDaemon daemon(model);
  auto session = connect(daemon);
  Call call(model, 5, 10);
  const std::uint64_t act_id = session->new_act_id();
  ASSERT_TRUE(call.forward(*session, act_id).ok());
  int wait_for_parent[2];
  ASSERT_EQ(::pipe(wait_for_parent), 0);
  const pid_t child = ::fork();
  if (child == 0) {
    ::close(wait_for_parent[1]);
    const bool refused = call.forward(*session, 0).error().code == ErrorCode::kUnsupported &&
                         session->barrier(1).error().code == ErrorCode::kUnsupported &&
                         session->delete_adapter(1).error().code == ErrorCode::kUnsupported;
    session->release(act_id);
    session.reset();
    char byte = 0;
    const bool parent_closed = ::read(wait_for_parent[0], &byte, 1) == 0;  // Lives on while the parent leaves.
    ::_exit(refused && parent_closed ? 0 : 1);
  }
  ::close(wait_for_parent[0]);
  EXPECT_EQ(daemon.num_live_activations(), 1u);
  ASSERT_TRUE(call.backward(*session, act_id).ok()) << "the child's use and destructor changed nothing";
  session.reset();
  wait_until([&] { return daemon.client_left(); });
  ::close(wait_for_parent[1]);
  int status = 0;
  ASSERT_EQ(::waitpid(child, &status, 0), child);
  EXPECT_EQ(status, 0);
}

TEST(SessionEnd, DestroyingASessionWithHeldReleasesAndADeadDaemonDoesNotHang) {
  const HangWatchdog watchdog;
  const FakeModel model;
  auto daemon = std::make_unique<FakeDaemon>(model);
  auto session = connect(*daemon);
  Call call(model, 5, 11);
  const std::uint64_t act_id = session->new_act_id();
  ASSERT_TRUE(call.forward(*session, act_id).ok());
  daemon->hold(true);
  session->release(act_id);
  wait_until([&] { return count_verb(*daemon, shm::Verb::kRelease) == 1; });
  daemon.reset();
  session.reset();
}

}  // namespace
}  // namespace kt::client
