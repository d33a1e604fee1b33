#include "shm/control.h"

#include <poll.h>
#include <sys/socket.h>

#include <algorithm>
#include <array>
#include <cerrno>
#include <cstring>

#include "shm/doorbell.h"
#include "shm/text.h"

namespace kt::shm {
namespace {

using nlohmann::json;

constexpr const char* kPeerFix = "see the log of the other process: `kt-coproc status` tells whether the daemon runs";
// Three of them, every character escaped as two, leave room for the rest of a 4 KiB packet.
constexpr std::size_t kErrorFieldBytesMax = 600;

Error peer_gone() {
  return Error{ErrorCode::kNotFound, "the control connection is closed", "the other process closed it or died",
               kPeerFix};
}

Error malformed(std::string why) {
  return Error{ErrorCode::kInvalidArgument, "a malformed control packet", std::move(why),
               "run client and daemon of the same kt-coproc release"};
}

// Waits until the socket is readable or was closed. False: the deadline passed first.
Result<bool> wait_readable(int socket, std::chrono::milliseconds timeout) {
  using Clock = std::chrono::steady_clock;
  const auto deadline = Clock::now() + timeout;
  for (;;) {
    int wait_ms = -1;
    if (timeout.count() >= 0) {
      const auto left = std::chrono::ceil<std::chrono::milliseconds>(deadline - Clock::now()).count();
      wait_ms = static_cast<int>(std::clamp<std::int64_t>(left, 0, 1'000'000'000));
    }
    pollfd entry{socket, POLLIN, 0};
    const int num_ready = ::poll(&entry, 1, wait_ms);
    if (num_ready > 0) return true;
    if (num_ready < 0 && errno != EINTR) return os_error("poll", "control socket", kPeerFix);
    if (num_ready == 0 && wait_ms >= 0 && Clock::now() >= deadline) return false;
  }
}

// Takes ownership of every descriptor that came with a packet, wanted or not.
std::vector<UniqueFd> take_descriptors(const msghdr& message) {
  std::vector<UniqueFd> descriptors;
  auto& header = const_cast<msghdr&>(message);  // CMSG_NXTHDR takes no const pointer; it only reads.
  for (cmsghdr* part = CMSG_FIRSTHDR(&header); part != nullptr; part = CMSG_NXTHDR(&header, part)) {
    if (part->cmsg_level != SOL_SOCKET || part->cmsg_type != SCM_RIGHTS) continue;
    const std::size_t num_descriptors = (part->cmsg_len - CMSG_LEN(0)) / sizeof(int);
    for (std::size_t i = 0; i < num_descriptors; ++i) {
      int fd = -1;
      std::memcpy(&fd, CMSG_DATA(part) + i * sizeof(int), sizeof(int));
      descriptors.emplace_back(fd);
    }
  }
  return descriptors;
}

Result<Packet> parse_packet(std::string_view text, std::vector<UniqueFd> descriptors) {
  // The parser would take a NUL for the end, and leave the rest unread.
  if (text.find('\0') != std::string_view::npos) return malformed("a NUL byte in it");
  json body = json::parse(text, nullptr, /*allow_exceptions=*/false);
  if (!body.is_object()) return malformed("not a JSON object: " + std::to_string(text.size()) + " bytes");
  const auto op = body.find("op");
  const auto ok = body.find("ok");
  const bool is_request = op != body.end() && op->is_string();
  const bool is_reply = ok != body.end() && ok->is_boolean();
  if (!is_request && !is_reply) return malformed(R"(neither "op" (a string) nor "ok" (a boolean) in it)");
  return Packet{std::move(body), std::move(descriptors)};
}

std::string error_field(const json& error, const char* key) {
  const auto field = error.find(key);
  return field != error.end() && field->is_string() ? one_line(field->get<std::string>()) : std::string();
}

Error error_from_json(const json& reply) {
  const auto error = reply.find("error");
  if (error == reply.end() || !error->is_object()) return malformed("a refusal without its \"error\" object");
  const auto code = error->find("code");
  if (code == error->end() || !code->is_number_unsigned() || code->get<std::uint64_t>() == 0) {
    return malformed("a refusal without an error code");
  }
  return Error{static_cast<ErrorCode>(code->get<std::uint32_t>()), error_field(*error, "what"),
               error_field(*error, "why"), error_field(*error, "fix")};
}

}  // namespace

Status send_packet(int socket, const json& body, const std::vector<int>& descriptors) {
  const std::string text = body.dump(-1, ' ', false, json::error_handler_t::replace);
  if (text.size() > kPacketBytesMax || descriptors.size() > kPacketDescriptorsMax) {
    return Error{ErrorCode::kInvalidArgument, "a control packet is too large",
                 std::to_string(text.size()) + " bytes and " + std::to_string(descriptors.size()) +
                     " descriptors, at most " + std::to_string(kPacketBytesMax) + " and " +
                     std::to_string(kPacketDescriptorsMax) + " are allowed",
                 "shorten its names and lists"};
  }
  iovec bytes{const_cast<char*>(text.data()), text.size()};  // sendmsg only reads; iovec has no const form.
  msghdr message{};
  message.msg_iov = &bytes;
  message.msg_iovlen = 1;
  alignas(cmsghdr) std::array<char, CMSG_SPACE(kPacketDescriptorsMax * sizeof(int))> space{};
  if (!descriptors.empty()) {
    message.msg_control = space.data();
    message.msg_controllen = CMSG_SPACE(descriptors.size() * sizeof(int));
    cmsghdr* const part = CMSG_FIRSTHDR(&message);
    part->cmsg_level = SOL_SOCKET;
    part->cmsg_type = SCM_RIGHTS;
    part->cmsg_len = CMSG_LEN(descriptors.size() * sizeof(int));
    std::memcpy(CMSG_DATA(part), descriptors.data(), descriptors.size() * sizeof(int));
  }
  ssize_t sent = 0;
  do {
    sent = ::sendmsg(socket, &message, MSG_NOSIGNAL | MSG_DONTWAIT);
  } while (sent < 0 && errno == EINTR);
  if (sent >= 0) return ok_status();
  if (errno == EPIPE || errno == ECONNRESET || errno == ENOTCONN) return peer_gone();
  if (errno == EAGAIN) {
    return Error{ErrorCode::kTimeout, "a control packet could not be sent",
                 "the other process does not read: its queue is full", kPeerFix};
  }
  return os_error("sendmsg", "control socket", kPeerFix);
}

Result<Packet> receive_packet(int socket, std::chrono::milliseconds timeout) {
  std::array<char, kPacketBytesMax> buffer;
  alignas(cmsghdr) std::array<char, CMSG_SPACE(kPacketDescriptorsMax * sizeof(int))> space;
  for (;;) {
    KT_TRY(const bool is_readable, wait_readable(socket, timeout));
    if (!is_readable) {
      return Error{ErrorCode::kTimeout, "no control packet came",
                   "waited " + std::to_string(timeout.count()) + " ms for the other process", kPeerFix};
    }
    iovec bytes{buffer.data(), buffer.size()};
    msghdr message{};
    message.msg_iov = &bytes;
    message.msg_iovlen = 1;
    message.msg_control = space.data();
    message.msg_controllen = space.size();
    const ssize_t got = ::recvmsg(socket, &message, MSG_DONTWAIT | MSG_CMSG_CLOEXEC);
    if (got < 0) {
      if (errno == EINTR || errno == EAGAIN) continue;
      if (errno == ECONNRESET || errno == ENOTCONN) return peer_gone();
      return os_error("recvmsg", "control socket", kPeerFix);
    }
    std::vector<UniqueFd> descriptors = take_descriptors(message);
    if (got == 0) return peer_gone();  // SEQPACKET: the end, or an empty packet, which is no better.
    if ((message.msg_flags & MSG_TRUNC) != 0)
      return malformed("more than " + std::to_string(kPacketBytesMax) + " bytes");
    if ((message.msg_flags & MSG_CTRUNC) != 0) {
      return malformed("more than " + std::to_string(kPacketDescriptorsMax) + " descriptors, or no room for them");
    }
    return parse_packet({buffer.data(), static_cast<std::size_t>(got)}, std::move(descriptors));
  }
}

Result<Packet> call(int socket, const json& request, std::chrono::milliseconds timeout) {
  KT_TRY_STATUS(send_packet(socket, request));
  KT_TRY(Packet reply, receive_packet(socket, timeout));
  const auto ok = reply.body.find("ok");
  if (ok == reply.body.end() || !ok->is_boolean()) return malformed("a request came where a reply was expected");
  if (!ok->get<bool>()) return error_from_json(reply.body);
  return reply;
}

json error_reply(const Error& error) {
  const auto field = [](const std::string& text) {
    return std::string(cut_utf8(valid_utf8(one_line(text)), kErrorFieldBytesMax));
  };
  return {{"ok", false},
          {"error",
           {{"code", static_cast<std::uint32_t>(error.code)},
            {"what", field(error.what)},
            {"why", field(error.why)},
            {"fix", field(error.fix)}}}};
}

}  // namespace kt::shm
