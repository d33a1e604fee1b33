// One experts call whose tensors lie in the arena: the caller writes its inputs there and reads its outputs there.
//
//   Session::claim ─► ┌ write input, ids, weights ─► submit ─► read output, grad_weights ┐ ─► ~Claim
//      gets room      └──────────────────── next(): the next piece of the call ──────────┘    gives the room back
//
// A call that exceeds the arena or the daemon's largest request comes as several pieces, one after the other:
//
//   KT_TRY(Claim claim, session.claim(ForwardCall{.layer = 3, .num_tokens = num_tokens}));
//   do {
//     …                                  // tokens [first_token(), first_token() + num_tokens()) of the call
//     KT_TRY_STATUS(claim.submit());
//     …
//   } while (claim.next());
//
// Invariants
//   1  A claim holds one block of the arena, for its largest piece, and waits for room only when it is made.
//   2  It holds no slot of the ring outside submit(): an abandoned claim leaves the ring as it was.
//   3  A forward's activation exists for the caller once its last piece succeeded. When a claim ends before that, what
//      its pieces kept in the daemon is released.
#pragma once
#include <cstddef>
#include <cstdint>
#include <memory>
#include <span>

#include "shm/base/result.h"

namespace kt::client {

// act_id 0: keep nothing; else new_act_id(). flags: RequestFlag.
struct ForwardCall {
  std::uint32_t layer = 0;
  std::uint32_t adapter_id = 0;
  std::uint64_t act_id = 0;
  std::uint8_t flags = 0;
  std::uint32_t num_tokens = 0;
};
struct BackwardCall {
  std::uint64_t act_id = 0;
  std::uint8_t flags = 0;
  std::uint32_t num_tokens = 0;
};
struct FetchCall {
  std::uint64_t act_id = 0;
  std::uint32_t num_tokens = 0;
};

// Used by one thread at a time. A thread that holds a claim and makes another may wait for its own room for ever. The
// session must outlive its claims. In a forked child every submit() is refused, and the destructor does nothing.
class Claim {
 public:
  Claim(Claim&& other) noexcept;
  Claim& operator=(Claim&&) = delete;
  ~Claim();

  // The piece's place in the call.
  std::uint32_t first_token() const;
  std::uint32_t num_tokens() const;

  // To be written before submit(). Elements are bf16 bits, or f32 under weight format fp32. Empty: the call has none.
  std::span<std::byte> input();        // x or grad_output: element[num_tokens, hidden_size].
  std::span<std::int32_t> ids();       // [num_tokens, top_k]; num_experts or more contributes nothing.
  std::span<float> routing_weights();  // [num_tokens, top_k].

  // Sends the piece and waits for the answer; once per piece. Refuses a negative id. After an error the outputs are NaN
  // and the claim takes no further piece.
  Status submit();

  // Valid after submit(), until next() or the end of the claim.
  std::span<const std::byte> output() const;    // y or grad_input: element[num_tokens, hidden_size].
  std::span<const float> grad_weights() const;  // backward: [num_tokens, top_k].

  // Goes on to the next piece, whose spans are others. False: there is none, or this piece did not succeed.
  [[nodiscard]] bool next();

 private:
  friend class Session;
  struct Impl;
  explicit Claim(std::unique_ptr<Impl> impl);
  std::unique_ptr<Impl> impl_;
};

}  // namespace kt::client
