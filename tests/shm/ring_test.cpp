#include "shm/ring.h"

#include <random>
#include <vector>

#include "tests/shm/shm_test.h"

namespace kt::shm {
namespace {

using testing::make_reply;
using testing::make_request;
using testing::make_segment;
using testing::make_segment_after;

// One round trip through both ends, in one thread.
void round_trip(RankRing& rank, DaemonRing& daemon, std::uint64_t act_id) {
  const auto sequence = rank.try_submit(make_request(act_id));
  ASSERT_TRUE(sequence.has_value());
  EXPECT_FALSE(rank.try_reply(*sequence).has_value());
  EXPECT_TRUE(daemon.has_request());
  EXPECT_EQ(daemon.expected_sequence(), *sequence);
  const auto received = daemon.try_receive();
  ASSERT_TRUE(received.has_value());
  EXPECT_EQ(received->sequence, *sequence);
  EXPECT_EQ(received->request.act_id, act_id);
  daemon.reply(*sequence, make_reply(static_cast<double>(act_id) + 0.5));
  EXPECT_TRUE(rank.wait_done(*sequence, 0, 0));
  const auto reply = rank.try_reply(*sequence);
  ASSERT_TRUE(reply.has_value());
  EXPECT_EQ(reply->value, static_cast<double>(act_id) + 0.5);
  EXPECT_EQ(reply->code, 0u);
  rank.consume(*sequence);
}

TEST(Ring, EveryFieldOfARequestAndAReplyArrives) {
  const Segment segment = make_segment();
  RankRing rank(segment);
  DaemonRing daemon(segment);
  const Request sent{.verb = Verb::kWrite,
                     .flags = 5,
                     .layer = 0xABCD,
                     .adapter_id = 0x12345678,
                     .act_id = 0x1122334455667788,
                     .payload_offset = 0x99AABBCCDDEEFF00,
                     .num_tokens = 77,
                     .kind = TensorKind::kExpAvgSq,
                     .tensor = AdapterTensor::kDownB,
                     .stream_flag = 255,
                     .first_expert = 11,
                     .num_experts = 12,
                     .step = 13,
                     .reserved = 14};
  const auto sequence = rank.try_submit(sent);
  const auto received = daemon.try_receive();
  ASSERT_TRUE(received.has_value());
  EXPECT_EQ(std::memcmp(&received->request, &sent, sizeof sent), 0);
  Reply answered;
  answered.code = 4;
  answered.value = 2.5;
  answered.rank = 3;
  answered.layer = 9;
  answered.step = 1'000'000'000'000;
  daemon.reply(*sequence, answered);
  const auto reply = rank.try_reply(*sequence);
  ASSERT_TRUE(reply.has_value());
  EXPECT_EQ(std::memcmp(&*reply, &answered, sizeof answered), 0);
}

TEST(Ring, AnEmptyRingHasNothingToReceive) {
  const Segment segment = make_segment();
  DaemonRing daemon(segment);
  EXPECT_FALSE(daemon.has_request());
  EXPECT_FALSE(daemon.try_receive().has_value());
  EXPECT_EQ(daemon.expected_sequence(), 1u);
}

TEST(Ring, RequestsArriveInOrderOverSeveralLaps) {
  const Segment segment = make_segment();
  RankRing rank(segment);
  DaemonRing daemon(segment);
  for (std::uint64_t i = 1; i <= 3 * kNumSlots + 5; ++i) ASSERT_NO_FATAL_FAILURE(round_trip(rank, daemon, i)) << i;
}

TEST(Ring, SequencesPassTwoToThe32WhereDoneSeqWraps) {
  const std::uint64_t newest = (std::uint64_t{1} << 32) - 300;
  const Segment segment = make_segment_after(newest);
  RankRing rank(segment);
  DaemonRing daemon(segment);
  EXPECT_EQ(daemon.expected_sequence(), newest + 1);
  for (std::uint64_t i = 1; i <= 600; ++i) ASSERT_NO_FATAL_FAILURE(round_trip(rank, daemon, newest + i)) << i;
  EXPECT_EQ(daemon.expected_sequence(), newest + 601);
}

TEST(Ring, AFullRingRefusesUntilTheSlotItNeedsIsConsumed) {
  const Segment segment = make_segment();
  RankRing rank(segment);
  DaemonRing daemon(segment);
  for (std::uint64_t i = 1; i <= kNumSlots; ++i) ASSERT_EQ(rank.try_submit(make_request(i)), i);
  EXPECT_FALSE(rank.try_submit(make_request(0)).has_value());
  while (const auto received = daemon.try_receive()) daemon.reply(received->sequence, Reply{});
  EXPECT_EQ(daemon.expected_sequence(), kNumSlots + 1);
  EXPECT_FALSE(rank.try_submit(make_request(0)).has_value()) << "an answered slot is taken until it is consumed";
  rank.consume(2);
  EXPECT_FALSE(rank.try_submit(make_request(0)).has_value()) << "the ring goes on with slot 1, not with any free one";
  rank.consume(1);
  EXPECT_EQ(rank.try_submit(make_request(0)), kNumSlots + 1);
  EXPECT_EQ(rank.try_submit(make_request(0)), kNumSlots + 2);
  EXPECT_FALSE(rank.try_submit(make_request(0)).has_value());
}

TEST(Ring, RepliesAndConsumptionMayComeInAnyOrder) {
  constexpr unsigned kSeed = 5;
  SCOPED_TRACE("seed " + std::to_string(kSeed));
  std::mt19937 random(kSeed);
  const Segment segment = make_segment();
  RankRing rank(segment);
  DaemonRing daemon(segment);
  std::vector<std::uint64_t> received;
  std::vector<std::uint64_t> answered;
  const auto take_any = [&](std::vector<std::uint64_t>& from) {
    std::swap(from[random() % from.size()], from.back());
    const std::uint64_t sequence = from.back();
    from.pop_back();
    return sequence;
  };
  std::uint64_t num_submitted = 0;
  for (int i = 0; i < 20'000; ++i) {
    switch (random() % 4) {
      case 0:
        if (rank.try_submit(make_request(num_submitted + 1))) ++num_submitted;
        break;
      case 1:
        if (const auto next = daemon.try_receive()) {
          ASSERT_EQ(next->sequence, next->request.act_id);
          received.push_back(next->sequence);
        }
        break;
      case 2:
        if (!received.empty()) {
          const std::uint64_t sequence = take_any(received);
          daemon.reply(sequence, make_reply(static_cast<double>(sequence)));
          answered.push_back(sequence);
        }
        break;
      default:
        if (!answered.empty()) {
          const std::uint64_t sequence = take_any(answered);
          const auto reply = rank.try_reply(sequence);
          ASSERT_TRUE(reply.has_value());
          ASSERT_EQ(reply->value, static_cast<double>(sequence));
          rank.consume(sequence);
        }
    }
  }
  EXPECT_GT(num_submitted, 4u * kNumSlots);
}

TEST(Ring, AttachingInTheMiddleReadsThePosition) {
  const Segment segment = make_segment_after(1000);
  {
    RankRing rank(segment);
    EXPECT_EQ(rank.try_submit(make_request(1)), 1001u);
    EXPECT_EQ(rank.try_submit(make_request(2)), 1002u);
  }
  RankRing rank(segment);
  DaemonRing daemon(segment);
  EXPECT_EQ(daemon.expected_sequence(), 1001u) << "the oldest unanswered request is next";
  for (std::uint64_t i = 1003; i <= 1000 + kNumSlots; ++i) ASSERT_EQ(rank.try_submit(make_request(i)), i);
  EXPECT_FALSE(rank.try_submit(make_request(0)).has_value()) << "1001 was found unanswered: its slot is taken";
  const auto received = daemon.try_receive();
  ASSERT_TRUE(received.has_value());
  EXPECT_EQ(received->request.act_id, 1u);
  daemon.reply(1001, make_reply(8));
  EXPECT_EQ(rank.try_reply(1001)->value, 8);
  rank.consume(1001);
  EXPECT_EQ(rank.try_submit(make_request(0)), 1001u + kNumSlots);
}

TEST(Ring, ASequenceAheadOfTheExpectedOneIsShownAsHostileAndMovesNothing) {
  const Segment segment = make_segment();
  DaemonRing daemon(segment);
  for (const std::uint64_t forged : {std::uint64_t{2}, std::uint64_t{257}, std::uint64_t{1} << 63, ~std::uint64_t{0}}) {
    segment.slot(0).request.sequence = forged;
    segment.slot(0).request.words[0] = ~std::uint64_t{0};
    const std::uint64_t expected = daemon.expected_sequence();
    EXPECT_TRUE(daemon.has_request());
    const auto received = daemon.try_receive();
    ASSERT_TRUE(received.has_value());
    EXPECT_EQ(received->sequence, forged);
    EXPECT_NE(received->sequence, expected);
    EXPECT_EQ(received->request.verb, Verb::kNone) << "nothing of a hostile request is passed on";
    EXPECT_EQ(daemon.expected_sequence(), expected);
  }
}

TEST(Ring, AnOlderSequenceIsNothing) {
  const Segment segment = make_segment_after(600);
  DaemonRing daemon(segment);
  for (const std::uint64_t old : {std::uint64_t{0}, std::uint64_t{1}, std::uint64_t{89}, std::uint64_t{600}}) {
    segment.slot(600 % kNumSlots).request.sequence = old;
    EXPECT_FALSE(daemon.has_request());
    EXPECT_FALSE(daemon.try_receive().has_value());
  }
}

TEST(Ring, GarbageInARequestArrivesAsItIsAndHarmsNobody) {
  const Segment segment = make_segment();
  DaemonRing daemon(segment);
  for (auto& word : segment.slot(0).request.words) word = ~std::uint64_t{0};
  segment.slot(0).request.sequence = 1;
  const auto received = daemon.try_receive();
  ASSERT_TRUE(received.has_value());
  EXPECT_EQ(received->sequence, 1u);
  EXPECT_EQ(static_cast<int>(received->request.verb), 255);
  EXPECT_STREQ(verb_name(received->request.verb), "unknown");
}

TEST(Ring, ARankThatPublishesOverUnansweredRequestsIsNotHeardBeforeTheAnswer) {
  const Segment segment = make_segment();
  DaemonRing daemon(segment);
  for (std::uint64_t sequence = 1; sequence <= kNumSlots; ++sequence) {
    segment.slot(static_cast<std::uint32_t>(sequence - 1)).request.sequence = sequence;
    ASSERT_TRUE(daemon.try_receive().has_value());
  }
  segment.slot(0).request.sequence = kNumSlots + 1;
  EXPECT_FALSE(daemon.has_request());
  EXPECT_FALSE(daemon.try_receive().has_value());
  daemon.reply(1, Reply{});
  EXPECT_TRUE(daemon.has_request());
  EXPECT_EQ(daemon.try_receive()->sequence, kNumSlots + 1);
}

TEST(Ring, RandomBytesInTheSlotsNeverBreakTheDaemon) {
  constexpr unsigned kSeed = 20240611;
  SCOPED_TRACE("seed " + std::to_string(kSeed));
  std::mt19937_64 random(kSeed);
  const Segment segment = make_segment();
  DaemonRing daemon(segment);
  std::vector<std::uint64_t> unanswered;
  int num_received = 0;
  int num_hostile = 0;
  for (int i = 0; i < 100'000; ++i) {
    const std::uint64_t expected = daemon.expected_sequence();
    Slot& slot = segment.slot(static_cast<std::uint32_t>((expected - 1 + random() % 3) % kNumSlots));
    for (auto& word : slot.request.words) word = random();
    slot.reply.done_seq = static_cast<std::uint32_t>(random());
    slot.reply.waiting = static_cast<std::uint32_t>(random() % 2);
    const std::uint64_t near = expected + random() % 4 - 1;
    slot.request.sequence = random() % 8 == 0 ? random() : near;
    const bool has_request = daemon.has_request();
    const auto received = daemon.try_receive();
    ASSERT_EQ(received.has_value(), has_request);
    if (received && received->sequence == expected) {
      ++num_received;
      unanswered.push_back(expected);
      ASSERT_EQ(daemon.expected_sequence(), expected + 1);
    } else {
      ASSERT_EQ(daemon.expected_sequence(), expected);
      if (received) {
        ASSERT_GT(received->sequence, expected);
        ++num_hostile;
      }
    }
    ASSERT_LE(unanswered.size(), kNumSlots);
    if (!unanswered.empty() && random() % 3 == 0) {
      std::swap(unanswered[random() % unanswered.size()], unanswered.back());
      daemon.reply(unanswered.back(), Reply{});
      unanswered.pop_back();
    }
  }
  EXPECT_GT(num_received, 1000);
  EXPECT_GT(num_hostile, 1000);
}

TEST(RingDeath, ASecondAnswerToARequestIsOurBug) {
  GTEST_FLAG_SET(death_test_style, "threadsafe");
  const Segment segment = make_segment();
  RankRing rank(segment);
  DaemonRing daemon(segment);
  ASSERT_TRUE(rank.try_submit(make_request(1)).has_value());
  ASSERT_TRUE(daemon.try_receive().has_value());
  daemon.reply(1, Reply{});
  EXPECT_DEATH(daemon.reply(1, Reply{}), "KT_CHECK failed");
  EXPECT_DEATH(daemon.reply(2, Reply{}), "KT_CHECK failed");
}

class RingMessage : public ::testing::Test {
 protected:
  // The error as it comes out at the rank's end.
  Error carried(const Error& error) {
    const auto sequence = rank_.try_submit(make_request(1));
    EXPECT_TRUE(daemon_.try_receive().has_value());
    daemon_.reply(*sequence, Reply{}, &error);
    const auto reply = rank_.try_reply(*sequence);
    text_ = rank_.message(*sequence, *reply);
    rank_.consume(*sequence);
    return error_from_reply(*reply, text_);
  }
  Segment segment_ = make_segment();
  RankRing rank_{segment_};
  DaemonRing daemon_{segment_};
  std::string text_;
};

TEST_F(RingMessage, AnErrorArrivesAsItWasSent) {
  const Error error{ErrorCode::kRankDied, "rank 3 died", "its last request was layer 7 of step 12", "look at its log"};
  const Error received = carried(error);
  EXPECT_EQ(text_, "rank 3 died\nits last request was layer 7 of step 12\nlook at its log\n");
  EXPECT_EQ(received.code, error.code);
  EXPECT_EQ(received.text(), error.text());
}

TEST_F(RingMessage, NewlinesInAFieldDoNotShiftTheOthers) {
  const Error received = carried({ErrorCode::kStale, "a\nb", "c\n\nd", "e\n"});
  EXPECT_EQ(received.what, "a b");
  EXPECT_EQ(received.why, "c  d");
  EXPECT_EQ(received.fix, "e ");
}

TEST_F(RingMessage, ALongFieldIsCutAndTheShortOnesStayWhole) {
  const Error received = carried({ErrorCode::kUsage, std::string(5000, 'w'), "why", "fix it so"});
  EXPECT_EQ(text_.size(), kMessageBytes);
  EXPECT_EQ(received.what, std::string(kMessageBytes - 3 - 12, 'w'));
  EXPECT_EQ(received.why, "why");
  EXPECT_EQ(received.fix, "fix it so");
}

TEST_F(RingMessage, ThreeLongFieldsShareTheSpaceAndNoCharacterIsSplit) {
  std::string accents;
  for (int i = 0; i < 1000; ++i) accents += "é";
  const Error received = carried({ErrorCode::kUsage, accents, accents, accents});
  EXPECT_LE(text_.size(), kMessageBytes);
  EXPECT_GE(text_.size(), kMessageBytes - 8);
  for (const std::string* field : {&received.what, &received.why, &received.fix}) {
    EXPECT_GE(field->size(), 330u);
    EXPECT_EQ(field->size() % 2, 0u);
    EXPECT_EQ(*field, accents.substr(0, field->size()));
  }
}

TEST_F(RingMessage, AMissingLineIsFilledSoThatNoLineOfTheErrorIsEmpty) {
  Reply reply;
  reply.code = 8;
  for (const char* text : {"", "\n\n\n", "what", "what\n", "what\nwhy\n"}) {
    const Error error = error_from_reply(reply, text);
    EXPECT_EQ(error.code, ErrorCode::kActivationLimit);
    EXPECT_FALSE(error.what.empty() || error.why.empty() || error.fix.empty()) << error.text();
  }
  EXPECT_EQ(error_from_reply(reply, "a\nb\nc\nd\n").fix, "c");
}

TEST_F(RingMessage, AMessageLongerThanItsPlaceIsReadOnlyAsFarAsThePlaceGoes) {
  Reply reply;
  reply.message_bytes = ~0u;
  EXPECT_EQ(rank_.message(1, reply).size(), kMessageBytes);
  EXPECT_EQ(rank_.message(kNumSlots, reply).size(), kMessageBytes);
}

}  // namespace
}  // namespace kt::shm
