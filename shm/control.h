// Control packets: one JSON object per SEQPACKET packet, at most 4 KiB each way, with descriptors where noted. Cold.
//
//   {"op":"hello","protocol":1,"pid":N,"fingerprint":"…","arena_bytes":N,"name":"…"}
//       "fingerprint" may be absent (monitors and tests: any model), "name" is KT_COPROC_JOB or absent.
//       -> {"ok":true,"session_id":N,"daemon_id":"…","daemon_pid":N,"element_bytes":2|4,
//           "model":{…} (model_card.h),
//           "limits":{batch_tokens_max,activation_bytes_max,arena_bytes},"deterministic":bool}
//          + descriptors [segment, status page, eventfd]
//   {"op":"adapter_create","adapter":N,"layers":[…],"gate_up":{"r":N,"scaling":X,"shared_a":bool},
//    "down":{"r":N,"scaling":X}}
//       -> {"ok":true}. r = 0: that half is not adapted. May come again for the same adapter with other layers
//          (ranks may differ by layer). After join: a collective of the job, all must ask for the same.
//   {"op":"adapter_delete","adapter":N}      -> {"ok":true}
//   {"op":"join","job_id":"…","name":"…","rank":N,"world_size":N,"members":[…],"timeout_seconds":X}
//       members: ranks on this daemon, ascending. Answered when all have joined. -> {"ok":true,"step":N}
//   {"op":"bye"}                             -> {"ok":true}; the session ends.
//   {"op":"status"}                          -> {"ok":true,"pid":N} + descriptor [status page, read-only]; no session
//   needed.
//   {"op":"stop","drain":bool}               -> {"ok":true,"pid":N}; the socket closes when the daemon has gone.
// A refusal of any of them: {"ok":false,"error":{"code":N,"what":"…","why":"…","fix":"…"}}.
//
// A malformed packet (not JSON, no "op", wrong types, over 4 KiB, descriptors attached) ends that connection.
#pragma once
#include <chrono>
#include <nlohmann/json.hpp>
#include <string>
#include <vector>

#include "shm/base/result.h"
#include "shm/base/unique_fd.h"

namespace kt::shm {

inline constexpr std::size_t kPacketBytesMax = 4096;
inline constexpr std::size_t kPacketDescriptorsMax = 4;

struct Packet {
  nlohmann::json body;
  std::vector<UniqueFd> descriptors;  // Received ones are close-on-exec.
};

// Sends one packet. Refuses a body over kPacketBytesMax. A peer that went away is kNotFound, not SIGPIPE.
Status send_packet(int socket, const nlohmann::json& body, const std::vector<int>& descriptors = {});

// Receives one packet, waiting up to `timeout` (negative: for ever; zero: not at all). kNotFound: the peer closed.
// kTimeout: nothing came. kInvalidArgument: malformed (see above); excess descriptors are closed.
Result<Packet> receive_packet(int socket, std::chrono::milliseconds timeout);

// One request and its reply; a refusal comes back as its Error.
Result<Packet> call(int socket, const nlohmann::json& request, std::chrono::milliseconds timeout);

nlohmann::json error_reply(const Error& error);

// Where the socket is. `spec`: "" or "auto" (search: $XDG_RUNTIME_DIR/kt-coproc/kt.sock, then /run/kt-coproc/kt.sock;
// the first that exists, else the first candidate), or "unix:/path". Anything else is kUsage and is quoted; so is a
// path over 107 bytes.
Result<std::string> resolve_socket_path(const std::string& spec);

// Connects to a daemon. kNotFound: no daemon there (with what to run). kPermission: the socket or its directory is
// writable by others, or the peer is neither us nor root.
Result<UniqueFd> connect_daemon(const std::string& socket_path);

}  // namespace kt::shm
