#include "shm/ring.h"

#include <algorithm>
#include <array>
#include <cstring>
#include <ctime>
#include <string_view>
#include <type_traits>

#include "shm/doorbell.h"
#include "shm/futex.h"
#include "shm/text.h"

namespace kt::shm {
namespace {

using Words = std::atomic<std::uint64_t>[7];
constexpr std::uint64_t kSequenceMax = ~std::uint64_t{0} >> 1;  // protocol.h: 63 bits.

std::uint32_t slot_index(std::uint64_t sequence) { return static_cast<std::uint32_t>((sequence - 1) % kNumSlots); }
std::uint32_t low_word(std::uint64_t sequence) { return static_cast<std::uint32_t>(sequence); }

// True when done_seq has come to `sequence` or, by a later lap, past it. A slot's sequences differ by 256 per lap, so
// the signed distance of the low words tells.
bool is_reached(std::uint32_t done_seq, std::uint64_t sequence) {
  return static_cast<std::int32_t>(done_seq - low_word(sequence)) >= 0;
}

// Relaxed atomic words: the other process may store at any moment, and the compiler must not load twice.
template <class Line>
void store_words(Words& words, const Line& line) {
  static_assert(sizeof(Line) == sizeof(Words) && std::is_trivially_copyable_v<Line>);
  std::uint64_t raw[7];
  std::memcpy(raw, &line, sizeof raw);
  for (std::size_t i = 0; i < std::size(raw); ++i) words[i].store(raw[i], std::memory_order_relaxed);
}

template <class Line>
Line load_words(const Words& words) {
  static_assert(sizeof(Line) == sizeof(Words) && std::is_trivially_copyable_v<Line>);
  std::uint64_t raw[7];
  for (std::size_t i = 0; i < std::size(raw); ++i) raw[i] = words[i].load(std::memory_order_relaxed);
  Line line;
  std::memcpy(&line, raw, sizeof line);
  return line;
}

// What one slot says about the positions; sequence 0 where it was never used, or holds nonsense.
struct SlotPosition {
  std::uint64_t sequence;
  bool answered;
};
SlotPosition read_position(const Segment& segment, std::uint32_t index) {
  const Slot& slot = segment.slot(index);
  const std::uint64_t sequence = slot.request.sequence.load(std::memory_order_acquire);
  if (sequence == 0 || sequence > kSequenceMax || slot_index(sequence) != index) return {0, true};
  return {sequence, slot.reply.done_seq.load(std::memory_order_acquire) == low_word(sequence)};
}

// "what\nwhy\nfix\n". The longest field is cut first, so that a long path does not cost the fix.
std::string message_text(const Error& error) {
  std::array<std::string, 3> fields = {one_line(error.what), one_line(error.why), one_line(error.fix)};
  constexpr std::size_t kFieldsBytesMax = kMessageBytes - fields.size();
  const auto shorter = [](const std::string& a, const std::string& b) { return a.size() < b.size(); };
  for (;;) {
    std::size_t bytes = 0;
    for (const std::string& field : fields) bytes += field.size();
    if (bytes <= kFieldsBytesMax) break;
    std::string& longest = *std::max_element(fields.begin(), fields.end(), shorter);
    const std::size_t excess = bytes - kFieldsBytesMax;
    const std::size_t keep_bytes = std::max(longest.size() - std::min(excess, longest.size()), kFieldsBytesMax / 3);
    longest.resize(cut_utf8(longest, keep_bytes).size());
  }
  return fields[0] + '\n' + fields[1] + '\n' + fields[2] + '\n';
}

}  // namespace

RankRing::RankRing(const Segment& segment) : segment_(segment) {
  for (std::uint32_t index = 0; index < kNumSlots; ++index) {
    const SlotPosition position = read_position(segment_, index);
    next_sequence_ = std::max(next_sequence_, position.sequence + 1);
    slot_busy_[index] = !position.answered;
  }
}

std::optional<std::uint64_t> RankRing::try_submit(const Request& request) {
  const std::uint32_t index = slot_index(next_sequence_);
  if (slot_busy_[index]) return std::nullopt;
  slot_busy_[index] = true;
  Slot& slot = segment_.slot(index);
  store_words(slot.request.words, request);
  slot.reply.waiting.store(0, std::memory_order_relaxed);                  // Nobody waits for this request yet.
  slot.request.sequence.store(next_sequence_, std::memory_order_seq_cst);  // R0 ↔ A0, S0
  return next_sequence_++;
}

std::optional<Reply> RankRing::try_reply(std::uint64_t sequence) const {
  const ReplyLine& line = segment_.slot(slot_index(sequence)).reply;
  if (line.done_seq.load(std::memory_order_acquire) != low_word(sequence)) return std::nullopt;  // A1 ↔ R1
  return load_words<Reply>(line.words);
}

std::string RankRing::message(std::uint64_t sequence, const Reply& reply) const {
  const std::span<char> field = segment_.message(slot_index(sequence));
  std::string text(std::min<std::size_t>(reply.message_bytes, field.size()), '\0');
  for (std::size_t i = 0; i < text.size(); ++i) text[i] = std::atomic_ref(field[i]).load(std::memory_order_relaxed);
  return text;
}

void RankRing::consume(std::uint64_t sequence) {
  KT_CHECK(sequence < next_sequence_ && sequence + kNumSlots >= next_sequence_ && slot_busy_[slot_index(sequence)]);
  slot_busy_[slot_index(sequence)] = false;
}

bool RankRing::wait_done(std::uint64_t sequence, std::uint64_t spin_ns, std::uint64_t timeout_ns) const {
  ReplyLine& line = segment_.slot(slot_index(sequence)).reply;
  if (is_reached(line.done_seq.load(std::memory_order_acquire), sequence)) return true;  // A1 ↔ R1
  const std::uint64_t start_ns = now_ns();
  const std::uint64_t deadline_ns = timeout_ns > kNoDeadline - start_ns ? kNoDeadline : start_ns + timeout_ns;
  spin_ns = std::min(spin_ns, timeout_ns);
  while (now_ns() - start_ns < spin_ns) {
    if (is_reached(line.done_seq.load(std::memory_order_acquire), sequence)) return true;  // A1 ↔ R1
    cpu_relax();
  }

  num_sleepers_.fetch_add(1, std::memory_order_seq_cst);
  line.waiting.store(1, std::memory_order_seq_cst);  // S2 ↔ S3
  bool is_done = false;
  for (;;) {
    const std::uint32_t seen = line.done_seq.load(std::memory_order_seq_cst);  // S2 ↔ S3, A1 ↔ R1
    is_done = is_reached(seen, sequence);
    if (is_done || released_.load(std::memory_order_seq_cst) || now_ns() >= deadline_ns) break;
    futex_wait(line.done_seq, seen, deadline_ns);
  }
  num_sleepers_.fetch_sub(1, std::memory_order_seq_cst);
  return is_done;
}

void RankRing::wake_all_waiters() const {
  released_.store(true, std::memory_order_seq_cst);
  // A waiter that looked at released_ just before may go to sleep just after this wake: wake until all have left.
  while (num_sleepers_.load(std::memory_order_seq_cst) != 0) {
    for (std::uint32_t index = 0; index < kNumSlots; ++index) futex_wake_all(segment_.slot(index).reply.done_seq);
    const timespec nap{0, 50'000};
    ::nanosleep(&nap, nullptr);
  }
}

DaemonRing::DaemonRing(const Segment& segment) : segment_(segment) {
  std::uint64_t newest = 0;
  std::uint64_t oldest_unanswered = kSequenceMax;
  for (std::uint32_t index = 0; index < kNumSlots; ++index) {
    const SlotPosition position = read_position(segment_, index);
    newest = std::max(newest, position.sequence);
    if (!position.answered) oldest_unanswered = std::min(oldest_unanswered, position.sequence);
  }
  next_sequence_ = std::min(newest + 1, oldest_unanswered);
}

std::optional<ReceivedRequest> DaemonRing::try_receive() {
  const std::uint32_t index = slot_index(next_sequence_);
  const RequestLine& line = segment_.slot(index).request;
  const std::uint64_t sequence = line.sequence.load(std::memory_order_acquire);  // A0 ↔ R0
  if (sequence < next_sequence_ || (sequence == next_sequence_ && unanswered_[index] != 0)) return std::nullopt;
  if (sequence > next_sequence_) return ReceivedRequest{sequence, Request{}};
  unanswered_[index] = next_sequence_++;
  return ReceivedRequest{sequence, load_words<Request>(line.words)};
}

bool DaemonRing::has_request() const {
  const std::uint32_t index = slot_index(next_sequence_);
  const std::uint64_t sequence = segment_.slot(index).request.sequence.load(std::memory_order_seq_cst);  // S1 ↔ S0
  return sequence > next_sequence_ || (sequence == next_sequence_ && unanswered_[index] == 0);
}

void DaemonRing::reply(std::uint64_t sequence, Reply reply, const Error* error) {
  const std::uint32_t index = slot_index(sequence);
  KT_CHECK(sequence != 0 && unanswered_[index] == sequence);
  unanswered_[index] = 0;
  reply.message_bytes = 0;
  if (error != nullptr) {
    const std::string text = message_text(*error);
    std::memcpy(segment_.message(index).data(), text.data(), text.size());
    reply.code = static_cast<std::uint32_t>(error->code);
    reply.message_bytes = static_cast<std::uint32_t>(text.size());
  }
  ReplyLine& line = segment_.slot(index).reply;
  store_words(line.words, reply);
  line.done_seq.store(low_word(sequence), std::memory_order_seq_cst);                    // R1 ↔ A1, S3 ↔ S2
  if (line.waiting.load(std::memory_order_seq_cst) != 0) futex_wake_all(line.done_seq);  // S3 ↔ S2
}

Error error_from_reply(const Reply& reply, const std::string& message) {
  std::array<std::string, 3> fields;
  std::string_view rest = message;
  for (std::string& field : fields) {
    const std::size_t end = std::min(rest.find('\n'), rest.size());
    field = valid_utf8(one_line(rest.substr(0, end)));
    rest.remove_prefix(std::min(end + 1, rest.size()));
  }
  auto& [what, why, fix] = fields;
  if (what.empty()) what = "the co-process refused a request";
  if (why.empty()) why = "error code " + std::to_string(reply.code);
  if (fix.empty()) fix = "see the daemon's log";
  return Error{static_cast<ErrorCode>(reply.code), std::move(what), std::move(why), std::move(fix)};
}

}  // namespace kt::shm
