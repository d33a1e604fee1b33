// The wire between a rank and the daemon: one segment per session, drawn here byte by byte.
//
//   0          SegmentHeader   (4 KiB)    written by the daemon; `daemon_sleeping`, `state` change later
//   4 KiB      Slot[256]       (32 KiB)   the ring: line 0 written by the rank, line 1 by the daemon
//   36 KiB     StreamFlag[256] (2 KiB)    GPU ordering words, named by index in a request
//   64 KiB     Message[256]    (256 KiB)  error text of the slot of the same index, written by the daemon
//   2 MiB      arena                      payloads; offsets in requests count from here
//
// Invariants
//   W1  Request i (i = 1, 2, …) uses slot (i - 1) % 256. Its line 0 is complete before `sequence` = i is stored.
//   W2  The daemon stores `done_seq` = low 32 bits of i only after the reply line, the message and the
//       payload's results are complete. The slot may be used for i + 256 once the rank has consumed that reply.
//   W3  Neither end trusts a byte the other can write: copy first, validate the copy, use the copy.
//   W4  The daemon stores nothing outside the reply lines, the messages, the header and the payload parts of
//       an unanswered request.
// Ordering pairs (labels stand beside the accesses in ring.h and doorbell.h)
//   R0 sequence store-release  ↔ A0 sequence load-acquire      the request line
//   R1 done_seq store          ↔ A1 done_seq load-acquire      the reply line, message and results
//   S0/S1 seq_cst: rank stores sequence then loads daemon_sleeping; daemon stores daemon_sleeping then loads
//         sequence (the doorbell). S2/S3 alike for `waiting` and done_seq (the futex).
#pragma once
#include <atomic>
#include <cstddef>
#include <cstdint>

namespace kt::shm {

inline constexpr std::uint32_t kProtocolVersion = 1;
inline constexpr std::uint64_t kSegmentMagic = 0x0001'636f'7270'746bULL;  // "ktproc" and a version byte.

inline constexpr std::uint32_t kNumSlots = 256;
inline constexpr std::uint32_t kMessageBytes = 1024;
inline constexpr std::uint64_t kPayloadAlignment = 256;  // Every payload part starts at a multiple of this.

inline constexpr std::uint64_t kRingOffset = 4096;
inline constexpr std::uint64_t kFlagsOffset = std::uint64_t{36} * 1024;
inline constexpr std::uint64_t kMessagesOffset = std::uint64_t{64} * 1024;
inline constexpr std::uint64_t kArenaOffset = std::uint64_t{2} * 1024 * 1024;  // A huge-page boundary.
inline constexpr std::uint64_t kArenaBytesMin = std::uint64_t{1} * 1024 * 1024;
inline constexpr std::uint64_t kArenaBytesDefault = std::uint64_t{64} * 1024 * 1024;
inline constexpr std::uint64_t kArenaBytesMax = std::uint64_t{16} * 1024 * 1024 * 1024;

inline constexpr std::uint32_t kNumAdapterTensors = 6;  // See AdapterTensor.
inline constexpr std::uint32_t kNumGroupsMax = 64;      // Hyperparameter groups of one STEP.
inline constexpr std::uint8_t kFrozen = 255;            // group_of value: leave this tensor alone.

enum class Verb : std::uint8_t {
  kNone = 0,
  kForward = 1,
  kFetch = 2,
  kBackward = 3,
  kRelease = 4,
  kRead = 5,
  kWrite = 6,
  kBarrier = 7,  // 7…10 are collectives: they run when they are the next request of every member.
  kNorm = 8,
  kDiscard = 9,
  kStep = 10,
};
constexpr bool is_collective(Verb verb) { return verb >= Verb::kBarrier && verb <= Verb::kStep; }
const char* verb_name(Verb verb);  // "FORWARD", …; "unknown" for anything else.

enum RequestFlag : std::uint8_t {
  kKeepY = 1u << 0,       // FORWARD: keep y for later FETCHes.
  kKeep = 1u << 1,        // BACKWARD: keep the activation (retain_graph).
  kAccumulate = 1u << 2,  // BACKWARD: add the LoRA gradients to S.
};

enum class TensorKind : std::uint8_t { kParam = 0, kGrad = 1, kExpAvg = 2, kExpAvgSq = 3, kT = 4 };

// The LoRA tensors of one layer; per expert: A is [r, in], B is [out, r]. With shared_a (PEFT's fused layout) gate
// and up use gate_a, and up_a does not exist.
enum class AdapterTensor : std::uint8_t {
  kGateA = 0,  // [r, H]
  kGateB = 1,  // [I, r]
  kUpA = 2,    // [r, H]
  kUpB = 3,    // [I, r]
  kDownA = 4,  // [r, I]
  kDownB = 5,  // [H, r]
};

// Line 0 of a slot without its sequence: 56 bytes, copied as seven 8-byte words.
struct Request {
  Verb verb = Verb::kNone;
  std::uint8_t flags = 0;  // RequestFlag bits; unknown bits are a protocol error.
  std::uint16_t layer = 0;
  std::uint32_t adapter_id = 0;      // 0: base weights only.
  std::uint64_t act_id = 0;          // FORWARD: 0 keeps nothing. Chosen by the client, unique in its session.
  std::uint64_t payload_offset = 0;  // In the arena; a multiple of kPayloadAlignment.
  std::uint32_t num_tokens = 0;      // FORWARD, FETCH, BACKWARD.
  TensorKind kind = TensorKind::kParam;
  AdapterTensor tensor = AdapterTensor::kGateA;
  std::uint16_t stream_flag = 0;  // GPU ordering; 0: none.
  std::uint32_t first_expert = 0;
  std::uint32_t num_experts = 0;
  std::uint64_t step = 0;  // STEP: number of STEPs the sender has seen complete; must be the job's.
  std::uint64_t reserved = 0;
};
static_assert(sizeof(Request) == 56);

// Line 1 of a slot without done_seq and its padding: 56 bytes.
struct Reply {
  std::uint32_t code = 0;           // ErrorCode.
  std::uint32_t message_bytes = 0;  // Error text in Message[slot]: what, why and fix, each ended by a newline.
  double value = 0;                 // NORM: ‖S‖². READ/WRITE of kT use the payload.
  std::uint32_t rank = 0;           // RANK_DIED: who, and its last layer and step.
  std::uint32_t layer = 0;
  std::uint64_t step = 0;
  std::uint64_t reserved[3] = {};
};
static_assert(sizeof(Reply) == 56);

struct alignas(64) RequestLine {
  std::atomic<std::uint64_t> sequence;  // W1. Low 63 bits; stored last.
  std::atomic<std::uint64_t> words[7];  // A Request.
};
struct alignas(64) ReplyLine {
  std::atomic<std::uint32_t> done_seq;  // The futex word. Shared, not PRIVATE.
  std::atomic<std::uint32_t> waiting;   // Set by the rank before it sleeps: the one word of line 1 it writes.
  std::atomic<std::uint64_t> words[7];  // A Reply.
};
struct Slot {
  RequestLine request;
  ReplyLine reply;
};
static_assert(sizeof(Slot) == 128);

// Ordering words of one GPU request: written by the stream (`ready`) and by the daemon (`done`).
struct StreamFlag {
  std::atomic<std::uint32_t> ready;
  std::atomic<std::uint32_t> done;
};
static_assert(sizeof(StreamFlag) == 8);

enum class SessionState : std::uint32_t { kOpen = 0, kShuttingDown = 1 };

struct SegmentHeader {
  std::uint64_t magic;
  std::uint32_t protocol;
  std::uint32_t session_id;
  std::uint64_t segment_bytes;
  std::uint64_t arena_bytes;
  std::uint32_t page_bytes;  // 4096, or 2 MiB where huge pages could be had.
  std::uint32_t daemon_pid;
  alignas(128) std::atomic<std::uint32_t> daemon_sleeping;  // S0/S1.
  alignas(128) std::atomic<SessionState> state;
};
static_assert(sizeof(SegmentHeader) <= kRingOffset);

// STEP payload, part 0. Part 1 is group_of: u8[num_layers][kNumAdapterTensors].
// One group is one param_group of torch.optim.AdamW (decoupled = 1) or torch.optim.Adam (decoupled = 0).
struct StepGroup {
  double lr;
  double beta1;
  double beta2;
  double eps;
  double weight_decay;
  std::uint64_t decoupled;
};
struct StepHeader {
  double scale;  // Gradient used = scale · S.
  std::uint64_t num_groups;
  StepGroup groups[kNumGroupsMax];
};
static_assert(sizeof(StepHeader) == 16 + 48 * kNumGroupsMax);

}  // namespace kt::shm
