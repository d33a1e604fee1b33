// The wire is fixed: a change here is a new kProtocolVersion.
#include <gtest/gtest.h>

#include <cstddef>

#include "shm/payload.h"
#include "shm/protocol.h"

namespace kt::shm {
namespace {

TEST(Layout, TheSlotHasItsFieldsWhereTheDrawingSays) {
  EXPECT_EQ(sizeof(Slot), 128u);
  EXPECT_EQ(offsetof(RequestLine, sequence), 0u);
  EXPECT_EQ(offsetof(RequestLine, words), 8u);
  EXPECT_EQ(offsetof(Slot, reply), 64u);
  EXPECT_EQ(offsetof(ReplyLine, done_seq), 0u);
  EXPECT_EQ(offsetof(ReplyLine, waiting), 4u);
  EXPECT_EQ(offsetof(ReplyLine, words), 8u);
}

TEST(Layout, ARequestHasItsFieldsWhereTheDrawingSays) {
  EXPECT_EQ(offsetof(Request, verb), 0u);
  EXPECT_EQ(offsetof(Request, flags), 1u);
  EXPECT_EQ(offsetof(Request, layer), 2u);
  EXPECT_EQ(offsetof(Request, adapter_id), 4u);
  EXPECT_EQ(offsetof(Request, act_id), 8u);
  EXPECT_EQ(offsetof(Request, payload_offset), 16u);
  EXPECT_EQ(offsetof(Request, num_tokens), 24u);
  EXPECT_EQ(offsetof(Request, kind), 28u);
  EXPECT_EQ(offsetof(Request, tensor), 29u);
  EXPECT_EQ(offsetof(Request, stream_flag), 30u);
  EXPECT_EQ(offsetof(Request, first_expert), 32u);
  EXPECT_EQ(offsetof(Request, num_experts), 36u);
  EXPECT_EQ(offsetof(Request, step), 40u);
  EXPECT_EQ(offsetof(Request, reserved), 48u);
}

TEST(Layout, AReplyHasItsFieldsWhereTheDrawingSays) {
  EXPECT_EQ(offsetof(Reply, code), 0u);
  EXPECT_EQ(offsetof(Reply, message_bytes), 4u);
  EXPECT_EQ(offsetof(Reply, value), 8u);
  EXPECT_EQ(offsetof(Reply, rank), 16u);
  EXPECT_EQ(offsetof(Reply, layer), 20u);
  EXPECT_EQ(offsetof(Reply, step), 24u);
  EXPECT_EQ(offsetof(Reply, reserved), 32u);
}

TEST(Layout, TheHeaderHasItsFieldsWhereTheDrawingSays) {
  EXPECT_EQ(offsetof(SegmentHeader, magic), 0u);
  EXPECT_EQ(offsetof(SegmentHeader, protocol), 8u);
  EXPECT_EQ(offsetof(SegmentHeader, session_id), 12u);
  EXPECT_EQ(offsetof(SegmentHeader, segment_bytes), 16u);
  EXPECT_EQ(offsetof(SegmentHeader, arena_bytes), 24u);
  EXPECT_EQ(offsetof(SegmentHeader, page_bytes), 32u);
  EXPECT_EQ(offsetof(SegmentHeader, daemon_pid), 36u);
  EXPECT_EQ(offsetof(SegmentHeader, daemon_sleeping), 128u);
  EXPECT_EQ(offsetof(SegmentHeader, state), 256u);
}

TEST(Layout, AVerbHasANameAndAByteThatIsNoVerbHasOneToo) {
  EXPECT_STREQ(verb_name(Verb::kForward), "FORWARD");
  EXPECT_STREQ(verb_name(Verb::kStep), "STEP");
  EXPECT_STREQ(verb_name(static_cast<Verb>(200)), "unknown");
}

TEST(Layout, ExactlyTheVerbsFromBarrierToStepAreCollective) {
  for (int verb = 0; verb < 256; ++verb) {
    EXPECT_EQ(is_collective(static_cast<Verb>(verb)), verb >= 7 && verb <= 10) << verb;
  }
}

TEST(Payload, PartsLieInOrderAtMultiplesOfTheAlignmentWithoutOverlap) {
  const PayloadShape shape{.hidden_size = 2049, .top_k = 3, .element_bytes = 2};
  const ForwardPayload forward(shape, 5);
  EXPECT_EQ(forward.x.offset, 0u);
  EXPECT_EQ(forward.x.bytes, 5u * 2049 * 2);
  EXPECT_EQ(forward.ids.bytes, 5u * 3 * 4);
  EXPECT_EQ(forward.y.bytes, forward.x.bytes);
  std::uint64_t end = 0;
  for (const Part& part : {forward.x, forward.ids, forward.weights, forward.y}) {
    EXPECT_EQ(part.offset % kPayloadAlignment, 0u);
    EXPECT_GE(part.offset, end);
    EXPECT_LT(part.offset, end + kPayloadAlignment);
    end = part.offset + part.bytes;
  }
  EXPECT_GE(forward.bytes, end);
}

TEST(Payload, NoTokensTakeNoBytes) {
  const PayloadShape shape{.hidden_size = 64, .top_k = 2, .element_bytes = 4};
  EXPECT_EQ(ForwardPayload(shape, 0).bytes, 0u);
  EXPECT_EQ(BackwardPayload(shape, 0).bytes, 0u);
  EXPECT_EQ(FetchPayload(shape, 0).bytes, 0u);
}

TEST(Payload, TheLargestNumbersOfTheProtocolDoNotOverflow) {
  const PayloadShape shape{.hidden_size = 1u << 20, .top_k = 1u << 10, .element_bytes = 4};
  const ForwardPayload forward(shape, ~0u);
  EXPECT_LT(forward.bytes, std::uint64_t{1} << 63);
  EXPECT_EQ(forward.x.bytes, std::uint64_t{~0u} << 22);
}

TEST(Payload, NormAndStepAgreeOnTheSizeOfGroupOf) {
  EXPECT_EQ(StepPayload(48).group_of.bytes, 48u * 6);
  EXPECT_EQ(NormPayload(48).group_of.bytes, 48u * 6);
  EXPECT_EQ(StepPayload(48).header.bytes, sizeof(StepHeader));
}

}  // namespace
}  // namespace kt::shm
