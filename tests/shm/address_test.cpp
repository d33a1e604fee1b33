#include <sys/socket.h>
#include <sys/stat.h>
#include <sys/un.h>
#include <unistd.h>

#include <cstdlib>
#include <cstring>
#include <fstream>

#include "shm/control.h"
#include "tests/shm/shm_test.h"

namespace kt::shm {
namespace {

class Address : public ::testing::Test {
 protected:
  Address() {
    std::string pattern = std::filesystem::temp_directory_path() / "kt_shm_XXXXXX";
    EXPECT_NE(::mkdtemp(pattern.data()), nullptr);
    directory_ = pattern;
    if (const char* const value = std::getenv("XDG_RUNTIME_DIR")) saved_ = value;
    ::setenv("XDG_RUNTIME_DIR", directory_.c_str(), 1);
  }
  ~Address() override {
    saved_ ? ::setenv("XDG_RUNTIME_DIR", saved_->c_str(), 1) : ::unsetenv("XDG_RUNTIME_DIR");
    std::filesystem::remove_all(directory_);
  }
  // Listens as a daemon does.
  UniqueFd listen_at(const std::string& path, int type = SOCK_SEQPACKET) {
    const mode_t mask = ::umask(077);
    UniqueFd socket(::socket(AF_UNIX, type | SOCK_CLOEXEC, 0));
    sockaddr_un address{};
    address.sun_family = AF_UNIX;
    std::strncpy(address.sun_path, path.c_str(), sizeof address.sun_path - 1);
    EXPECT_EQ(::bind(socket.get(), reinterpret_cast<const sockaddr*>(&address), sizeof address), 0) << path;
    EXPECT_EQ(::listen(socket.get(), 8), 0);
    ::umask(mask);
    return socket;
  }
  std::string path_of_length(std::size_t bytes) const { return "/" + std::string(bytes - 1, 'p'); }

  std::string directory_;
  std::optional<std::string> saved_;
};

TEST_F(Address, AutoIsTheRuntimeDirectoryWhenNothingRuns) {
  const std::string expected = directory_ + "/kt-coproc/kt.sock";
  for (const char* spec : {"", "auto"}) {
    const auto path = resolve_socket_path(spec);
    ASSERT_TRUE(path.ok());
    // A daemon of the whole machine may run where the tests do.
    EXPECT_EQ(path.value(), ::access("/run/kt-coproc/kt.sock", F_OK) == 0 ? "/run/kt-coproc/kt.sock" : expected);
  }
}

TEST_F(Address, AutoPrefersTheSocketInTheRuntimeDirectory) {
  std::filesystem::create_directory(directory_ + "/kt-coproc");
  std::ofstream(directory_ + "/kt-coproc/kt.sock").put('x');
  EXPECT_EQ(resolve_socket_path("auto").value(), directory_ + "/kt-coproc/kt.sock");
}

TEST_F(Address, WithoutAUsableRuntimeDirectoryAutoIsRunAndNeverTmp) {
  for (const char* value : {"", "relative/dir"}) {
    ::setenv("XDG_RUNTIME_DIR", value, 1);
    EXPECT_EQ(resolve_socket_path("auto").value(), "/run/kt-coproc/kt.sock");
  }
  ::unsetenv("XDG_RUNTIME_DIR");
  EXPECT_EQ(resolve_socket_path("").value(), "/run/kt-coproc/kt.sock");
}

TEST_F(Address, AnExplicitPathIsTakenAsItIs) {
  EXPECT_EQ(resolve_socket_path("unix:/a/b c.sock").value(), "/a/b c.sock");
  EXPECT_EQ(resolve_socket_path("unix:" + path_of_length(107)).value(), path_of_length(107));
}

TEST_F(Address, AnInvalidValueIsAUsageErrorThatQuotesIt) {
  for (const char* spec : {"on", "1", "unix:", "unix:relative", "/path/kt.sock", "tcp://h:1", "AUTO", " auto", "off"}) {
    const auto path = resolve_socket_path(spec);
    ASSERT_FALSE(path.ok()) << spec;
    EXPECT_EQ(path.error().code, ErrorCode::kUsage);
    EXPECT_NE(path.error().what.find('"' + std::string(spec) + '"'), std::string::npos) << path.error().text();
  }
}

TEST_F(Address, APathOver107BytesIsAUsageErrorWithBothNumbers) {
  for (const auto& refused :
       {resolve_socket_path("unix:" + path_of_length(108)).error(), connect_daemon(path_of_length(108)).error()}) {
    EXPECT_EQ(refused.code, ErrorCode::kUsage);
    EXPECT_NE(refused.why.find("108"), std::string::npos) << refused.text();
    EXPECT_NE(refused.why.find("107"), std::string::npos) << refused.text();
  }
  ::setenv("XDG_RUNTIME_DIR", path_of_length(100).c_str(), 1);
  EXPECT_EQ(resolve_socket_path("auto").error().code, ErrorCode::kUsage);
}

TEST_F(Address, NoDaemonSaysWhatToRun) {
  const std::string path = directory_ + "/kt.sock";
  for (const bool left_over : {false, true}) {
    if (left_over) listen_at(path).reset();
    const auto socket = connect_daemon(path);
    ASSERT_FALSE(socket.ok());
    EXPECT_EQ(socket.error().code, ErrorCode::kNotFound);
    EXPECT_NE(socket.error().what.find(path), std::string::npos);
    EXPECT_EQ(socket.error().fix, "start one: kt-coproc run --model DIR");
  }
}

TEST_F(Address, TheSocketOfAnotherKindOfProgramIsNoDaemon) {
  const UniqueFd other = listen_at(directory_ + "/kt.sock", SOCK_STREAM);
  EXPECT_EQ(connect_daemon(directory_ + "/kt.sock").error().code, ErrorCode::kNotFound);
  std::ofstream(directory_ + "/file").put('x');
  EXPECT_EQ(connect_daemon(directory_ + "/file").error().code, ErrorCode::kNotFound);
}

TEST_F(Address, ARunningDaemonIsReached) {
  const UniqueFd listener = listen_at(directory_ + "/kt.sock");
  auto socket = connect_daemon(directory_ + "/kt.sock");
  ASSERT_TRUE(socket.ok()) << socket.error().text();
  const UniqueFd accepted(::accept(listener.get(), nullptr, nullptr));
  ASSERT_TRUE(send_packet(socket.value().get(), {{"op", "status"}}).ok());
  EXPECT_EQ(receive_packet(accepted.get(), std::chrono::seconds(5)).value().body["op"], "status");
}

TEST_F(Address, ASocketOrDirectoryThatOthersCanWriteIsRefusedWithItsMode) {
  const std::string path = directory_ + "/kt.sock";
  const UniqueFd listener = listen_at(path);
  ::chmod(path.c_str(), 0722);
  auto refused = connect_daemon(path);
  ASSERT_FALSE(refused.ok());
  EXPECT_EQ(refused.error().code, ErrorCode::kPermission);
  EXPECT_NE(refused.error().why.find("0722"), std::string::npos) << refused.error().text();
  ::chmod(path.c_str(), 0700);
  ::chmod(directory_.c_str(), 0770);
  refused = connect_daemon(path);
  ASSERT_FALSE(refused.ok());
  EXPECT_EQ(refused.error().code, ErrorCode::kPermission);
  EXPECT_NE(refused.error().fix.find(directory_), std::string::npos) << refused.error().text();
  ::chmod(directory_.c_str(), 0700);
  EXPECT_TRUE(connect_daemon(path).ok());
}

}  // namespace
}  // namespace kt::shm
