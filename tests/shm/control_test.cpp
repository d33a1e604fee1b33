#include "shm/control.h"

#include <fcntl.h>
#include <sys/eventfd.h>
#include <sys/socket.h>
#include <unistd.h>

#include <cstring>
#include <random>
#include <thread>

#include "tests/shm/shm_test.h"

namespace kt::shm {
namespace {

using nlohmann::json;
using testing::num_open_descriptors;
using testing::Watchdog;

constexpr std::chrono::milliseconds kNow{0};
constexpr std::chrono::milliseconds kPatience{5'000};

class Control : public ::testing::Test {
 protected:
  Control() {
    int ends[2] = {-1, -1};
    EXPECT_EQ(::socketpair(AF_UNIX, SOCK_SEQPACKET | SOCK_CLOEXEC, 0, ends), 0);
    here_.reset(ends[0]);
    there_.reset(ends[1]);
  }
  // Sends bytes as a peer that knows nothing of control.h could.
  void send_raw(const std::string& bytes, const std::vector<int>& descriptors = {}) {
    iovec part{const_cast<char*>(bytes.data()), bytes.size()};
    msghdr message{};
    message.msg_iov = &part;
    message.msg_iovlen = 1;
    std::vector<char> space(CMSG_SPACE(descriptors.size() * sizeof(int)));
    if (!descriptors.empty()) {
      message.msg_control = space.data();
      message.msg_controllen = space.size();
      cmsghdr* const header = CMSG_FIRSTHDR(&message);
      header->cmsg_level = SOL_SOCKET;
      header->cmsg_type = SCM_RIGHTS;
      header->cmsg_len = CMSG_LEN(descriptors.size() * sizeof(int));
      std::memcpy(CMSG_DATA(header), descriptors.data(), descriptors.size() * sizeof(int));
    }
    ASSERT_EQ(::sendmsg(there_.get(), &message, MSG_NOSIGNAL), static_cast<ssize_t>(bytes.size()));
  }
  ErrorCode received_code(std::chrono::milliseconds timeout = kNow) {
    const auto packet = receive_packet(here_.get(), timeout);
    return packet.ok() ? ErrorCode::kOk : packet.error().code;
  }

  const Watchdog watchdog_;
  UniqueFd here_, there_;
};

TEST_F(Control, APacketArrivesWithItsDescriptorsWhichAreCloseOnExec) {
  const UniqueFd event(::eventfd(5, 0));
  ASSERT_TRUE(send_packet(there_.get(), {{"op", "hello"}, {"pid", 12}}, {event.get(), event.get(), event.get()}).ok());
  auto packet = receive_packet(here_.get(), kNow);
  ASSERT_TRUE(packet.ok()) << packet.error().text();
  EXPECT_EQ(packet.value().body, (json{{"op", "hello"}, {"pid", 12}}));
  ASSERT_EQ(packet.value().descriptors.size(), 3u);
  for (const UniqueFd& fd : packet.value().descriptors) EXPECT_TRUE(::fcntl(fd.get(), F_GETFD) & FD_CLOEXEC);
  std::uint64_t count = 0;
  EXPECT_EQ(::read(packet.value().descriptors[2].get(), &count, sizeof count), 8);
  EXPECT_EQ(count, 5u);
}

TEST_F(Control, PacketsKeepTheirBorders) {
  for (int i = 0; i < 3; ++i) ASSERT_TRUE(send_packet(there_.get(), {{"op", "status"}, {"i", i}}).ok());
  for (int i = 0; i < 3; ++i) EXPECT_EQ(receive_packet(here_.get(), kNow).value().body["i"], i);
  EXPECT_EQ(received_code(), ErrorCode::kTimeout);
}

TEST_F(Control, WaitingEndsByItsTimeoutOrWhenAPacketComes) {
  EXPECT_EQ(received_code(std::chrono::milliseconds(5)), ErrorCode::kTimeout);
  std::thread sender([this] {
    std::this_thread::sleep_for(std::chrono::milliseconds(20));
    EXPECT_TRUE(send_packet(there_.get(), {{"op", "bye"}}).ok());
  });
  EXPECT_EQ(received_code(std::chrono::milliseconds(-1)), ErrorCode::kOk);
  sender.join();
}

TEST_F(Control, APeerThatClosedIsNotFoundForBothAndNoSignal) {
  there_.reset();
  EXPECT_EQ(received_code(kPatience), ErrorCode::kNotFound);
  const auto sent = send_packet(here_.get(), {{"op", "bye"}});
  ASSERT_FALSE(sent.ok());
  EXPECT_EQ(sent.error().code, ErrorCode::kNotFound);
}

TEST_F(Control, WhatWasSentBeforeClosingStillArrives) {
  ASSERT_TRUE(send_packet(there_.get(), {{"op", "bye"}}).ok());
  there_.reset();
  EXPECT_EQ(received_code(), ErrorCode::kOk);
  EXPECT_EQ(received_code(), ErrorCode::kNotFound);
}

TEST_F(Control, MalformedPacketsAreRefused) {
  const std::string bad[] = {"x",
                             "{",
                             "[]",
                             "3",
                             "null",
                             "\"op\"",
                             "{}",
                             "{\"op\":3}",
                             "{\"ok\":1}",
                             "{\"op\":null}",
                             std::string("{\"op\":\"a\"}\0", 11),
                             "{\"op\":\"\xFF\"}",
                             std::string(4096, '['),
                             "{\"op\":\"a\"}{\"op\":\"b\"}"};
  for (const std::string& bytes : bad) {
    send_raw(bytes);
    EXPECT_EQ(received_code(), ErrorCode::kInvalidArgument) << bytes.substr(0, 40);
  }
  EXPECT_EQ(received_code(), ErrorCode::kTimeout) << "each was one packet";
}

TEST_F(Control, TheLargestPacketPassesAndOneByteMoreDoesNot) {
  const std::string frame = R"({"op":"a","t":""})";
  json body = {{"op", "a"}, {"t", std::string(kPacketBytesMax - frame.size(), 't')}};
  ASSERT_EQ(body.dump().size(), kPacketBytesMax);
  ASSERT_TRUE(send_packet(there_.get(), body).ok());
  EXPECT_EQ(received_code(), ErrorCode::kOk);
  body["t"] = std::string(kPacketBytesMax - frame.size() + 1, 't');
  EXPECT_EQ(send_packet(there_.get(), body).error().code, ErrorCode::kInvalidArgument);
  send_raw(body.dump());
  EXPECT_EQ(received_code(), ErrorCode::kInvalidArgument);
}

TEST_F(Control, TooManyDescriptorsAreRefusedAndAllClosed) {
  const UniqueFd event(::eventfd(0, 0));
  EXPECT_FALSE(send_packet(there_.get(), {{"op", "a"}}, std::vector<int>(kPacketDescriptorsMax + 1, event.get())).ok());
  const auto num_before = num_open_descriptors();
  for (const std::size_t num : {kPacketDescriptorsMax + 1, std::size_t{100}}) {
    send_raw(R"({"op":"a"})", std::vector<int>(num, event.get()));
    EXPECT_EQ(received_code(), ErrorCode::kInvalidArgument);
  }
  send_raw("not json", {event.get(), event.get()});
  EXPECT_EQ(received_code(), ErrorCode::kInvalidArgument);
  send_raw(std::string(5000, 'x'), {event.get()});
  EXPECT_EQ(received_code(), ErrorCode::kInvalidArgument);
  send_raw("", {event.get()});
  EXPECT_NE(received_code(), ErrorCode::kOk);
  EXPECT_EQ(num_open_descriptors(), num_before);
}

TEST_F(Control, APeerThatDoesNotReadIsATimeoutAndNeverBlocks) {
  const json body = {{"op", "a"}, {"t", std::string(4000, 't')}};
  auto sent = ok_status();
  for (int i = 0; i < 10'000 && sent.ok(); ++i) sent = send_packet(there_.get(), body);
  ASSERT_FALSE(sent.ok());
  EXPECT_EQ(sent.error().code, ErrorCode::kTimeout);
}

TEST_F(Control, ACallReturnsTheReply) {
  std::thread daemon([this] {
    const auto request = receive_packet(there_.get(), kPatience);
    ASSERT_TRUE(request.ok());
    EXPECT_EQ(request.value().body["op"], "status");
    EXPECT_TRUE(send_packet(there_.get(), {{"ok", true}, {"pid", 99}}).ok());
  });
  const auto reply = call(here_.get(), {{"op", "status"}}, kPatience);
  daemon.join();
  ASSERT_TRUE(reply.ok()) << reply.error().text();
  EXPECT_EQ(reply.value().body["pid"], 99);
}

TEST_F(Control, ARefusalComesBackAsTheErrorItWas) {
  const Error refused{ErrorCode::kModelMismatch, "another model", "\"a\" is not \"b\"", "start é"};
  ASSERT_TRUE(send_packet(there_.get(), error_reply(refused)).ok());
  const auto reply = call(here_.get(), {{"op", "hello"}}, kPatience);
  ASSERT_FALSE(reply.ok());
  EXPECT_EQ(reply.error().code, refused.code);
  EXPECT_EQ(reply.error().text(), refused.text());
}

TEST_F(Control, AReplyThatIsNoneIsAnError) {
  for (const json& bad :
       {json{{"op", "hello"}}, json{{"ok", false}}, json{{"ok", false}, {"error", "text"}},
        json{{"ok", false}, {"error", {{"code", "x"}}}}, json{{"ok", false}, {"error", {{"code", 0}}}},
        json{{"ok", false}, {"error", {{"code", -3}}}}}) {
    ASSERT_TRUE(send_packet(there_.get(), bad).ok());
    const auto reply = call(here_.get(), {{"op", "hello"}}, kPatience);
    ASSERT_FALSE(reply.ok()) << bad;
    EXPECT_EQ(reply.error().code, ErrorCode::kInvalidArgument) << bad;
  }
}

TEST_F(Control, AnyErrorFitsAPacket) {
  const char* const nasty[] = {"\"", "\\", "\n", "\x01", "\xFF", "é", "\xF0\x9F\x98\x80"};
  for (const char* character : nasty) {
    std::string text;
    for (int i = 0; i < 5000; ++i) text += character;
    const json reply = error_reply({ErrorCode::kOs, text, text, text});
    EXPECT_LE(reply.dump().size(), kPacketBytesMax) << character;
    ASSERT_TRUE(send_packet(there_.get(), reply).ok());
    EXPECT_EQ(call(here_.get(), {{"op", "a"}}, kPatience).error().code, ErrorCode::kOs);
  }
}

TEST_F(Control, RandomPacketsNeverBreakTheReceiverNorLeakDescriptors) {
  constexpr unsigned kSeed = 424242;
  SCOPED_TRACE("seed " + std::to_string(kSeed));
  std::mt19937 random(kSeed);
  const UniqueFd event(::eventfd(0, 0));
  const std::string valid =
      R"({"op":"hello","protocol":1,"pid":3,"fingerprint":"é","limits":{"a":[1,2.5,-3e9,true,null]}})";
  const auto num_before = num_open_descriptors();
  int num_accepted = 0;
  for (int i = 0; i < 5000; ++i) {
    std::string bytes = valid;
    for (std::uint32_t edits = random() % 4; edits > 0 && !bytes.empty(); --edits) {
      const std::size_t at = random() % bytes.size();
      switch (random() % 4) {
        case 0:
          bytes[at] = static_cast<char>(random());
          break;
        case 1:
          bytes.erase(at, random() % 8);
          break;
        case 2:
          bytes.insert(at, valid.substr(random() % valid.size()));
          break;
        default:
          bytes.insert(at, random() % 3000, "[{\"0,:"[random() % 6]);
      }
    }
    if (bytes.empty()) bytes = "x";
    send_raw(bytes, std::vector<int>(random() % 7, event.get()));
    const auto packet = receive_packet(here_.get(), kNow);
    if (packet.ok()) {
      ++num_accepted;
      ASSERT_TRUE(packet.value().body.is_object());
      ASSERT_LE(packet.value().descriptors.size(), kPacketDescriptorsMax);
    } else {
      ASSERT_EQ(packet.error().code, ErrorCode::kInvalidArgument);
    }
  }
  EXPECT_GT(num_accepted, 500);
  EXPECT_EQ(num_open_descriptors(), num_before);
}

}  // namespace
}  // namespace kt::shm
