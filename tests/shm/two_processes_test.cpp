// Two real processes over memfds passed by SCM_RIGHTS: what threads cannot show (shared futexes, seals, death).
#include <fcntl.h>
#include <poll.h>
#include <signal.h>
#include <sys/mman.h>
#include <sys/socket.h>
#include <sys/wait.h>
#include <unistd.h>

#include <cerrno>
#include <functional>

#include "shm/control.h"
#include "shm/doorbell.h"
#include "shm/ring.h"
#include "shm/status_page.h"
#include "tests/shm/shm_test.h"

namespace kt::shm {
namespace {

using testing::make_reply;
using testing::make_request;
using testing::make_segment;
using testing::Watchdog;

constexpr std::uint64_t kNumRequests = 3'000;
constexpr std::chrono::seconds kPatience{10};

// Runs `body` in a child process; its return value is the exit status.
pid_t run_child(const std::function<int()>& body) {
  const pid_t child = ::fork();
  if (child == 0) {
    ::alarm(20);
    ::_exit(body());
  }
  return child;
}

int wait_for_exit(pid_t child) {
  int status = 0;
  EXPECT_EQ(::waitpid(child, &status, 0), child);
  return WIFEXITED(status) ? WEXITSTATUS(status) : 128 + WTERMSIG(status);
}

// The rank's program: says which line went wrong by its exit status.
int rank_main(int socket) {
  auto packet = receive_packet(socket, kPatience);
  if (!packet.ok() || packet.value().descriptors.size() != 3) return 1;
  auto& descriptors = packet.value().descriptors;
  const int segment_fd = descriptors[0].get();
  if (::ftruncate(segment_fd, 0) == 0 || errno != EPERM) return 2;
  if ((::fcntl(segment_fd, F_GETFD) & FD_CLOEXEC) == 0) return 3;
  const int status_fd = descriptors[1].get();
  if (::mmap(nullptr, 4096, PROT_READ | PROT_WRITE, MAP_SHARED, status_fd, 0) != MAP_FAILED) return 4;
  if (::pwrite(status_fd, "x", 1, 0) != -1) return 5;
  const auto segment = Segment::attach(std::move(descriptors[0]));
  const auto view = StatusPageView::attach(std::move(descriptors[1]));
  if (!segment.ok() || !view.ok()) return 6;
  RankRing ring(segment.value());
  for (std::uint64_t i = 1; i <= kNumRequests; ++i) {
    reinterpret_cast<std::uint64_t*>(segment.value().arena())[i % 64] = i * 3;
    const auto sequence = ring.try_submit(make_request(i));
    if (!sequence) return 7;
    ring_if_sleeping(segment.value(), descriptors[2].get());
    if (!ring.wait_done(*sequence, i % 2 * 20'000, 10'000'000'000)) return 8;
    if (ring.try_reply(*sequence)->value != static_cast<double>(i * 3)) return 9;
    ring.consume(*sequence);
  }
  return view.value().page().totals.forward_requests.load() == kNumRequests ? 0 : 10;
}

struct Connection {
  Connection() {
    int ends[2] = {-1, -1};
    EXPECT_EQ(::socketpair(AF_UNIX, SOCK_SEQPACKET | SOCK_CLOEXEC, 0, ends), 0);
    daemon.reset(ends[0]);
    rank.reset(ends[1]);
  }
  UniqueFd daemon, rank;
};

TEST(TwoProcesses, TrainOverAPassedSegmentSleepingOnDoorbellAndFutex) {
  const Watchdog watchdog;
  Connection connection;
  const pid_t child = run_child([&] {
    connection.daemon.reset();
    return rank_main(connection.rank.get());
  });
  connection.rank.reset();
  const Segment segment = make_segment();
  auto status = StatusPageOwner::create();
  auto doorbell = create_doorbell();
  ASSERT_TRUE(status.ok() && doorbell.ok());
  const int bell = doorbell.value().get();
  ASSERT_TRUE(send_packet(connection.daemon.get(), {{"ok", true}}, {segment.fd(), status.value().fd(), bell}).ok());

  DaemonRing ring(segment);
  for (std::uint64_t num_answered = 0; num_answered < kNumRequests;) {
    if (const auto received = ring.try_receive()) {
      const std::uint64_t i = received->request.act_id;
      const std::uint64_t value = reinterpret_cast<const std::uint64_t*>(segment.arena())[i % 64];
      status.value().page().totals.forward_requests.fetch_add(1, std::memory_order_relaxed);
      ring.reply(received->sequence, make_reply(static_cast<double>(value)));
      ++num_answered;
      continue;
    }
    set_sleeping(segment, true);
    if (!ring.has_request()) {
      pollfd entries[2] = {{bell, POLLIN, 0}, {connection.daemon.get(), 0, 0}};
      ASSERT_GT(::poll(entries, 2, 10'000), 0);
      ASSERT_EQ(entries[1].revents, 0) << "the rank ended early with status " << wait_for_exit(child);
      clear_doorbell(bell);
    }
    set_sleeping(segment, false);
  }
  EXPECT_EQ(wait_for_exit(child), 0);
}

TEST(TwoProcesses, TheDeathOfOneShowsAtTheOtherEndsSocket) {
  const Watchdog watchdog;
  Connection connection;
  const pid_t child = run_child([&] {
    connection.daemon.reset();
    ::pause();
    return 0;
  });
  connection.rank.reset();
  EXPECT_EQ(receive_packet(connection.daemon.get(), std::chrono::milliseconds(10)).error().code, ErrorCode::kTimeout);
  ASSERT_EQ(::kill(child, SIGKILL), 0);
  EXPECT_EQ(receive_packet(connection.daemon.get(), kPatience).error().code, ErrorCode::kNotFound);
  EXPECT_EQ(wait_for_exit(child), 128 + SIGKILL);
}

}  // namespace
}  // namespace kt::shm
