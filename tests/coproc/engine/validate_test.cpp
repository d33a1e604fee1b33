#include "coproc/engine/validate.h"

#include <gtest/gtest.h>

#include <cstring>

#include "tests/coproc/engine/engine_fixture.h"

namespace kt::test {
namespace {

using coproc::check_request;
using coproc::Fault;
using shm::Request;
using shm::Verb;

constexpr std::uint64_t kArenaBytes = 4096;

// A request of the small model (four layers, MoE in 1 to 3; four experts) that is well-formed.
Request sound(Verb verb) {
  Request request;
  request.verb = verb;
  request.layer = 1;
  request.act_id = 5;
  request.num_tokens = 1;
  request.num_experts = 4;
  return request;
}

std::string fault_of(const Request& request) {
  return check_request(request, small_model(2), kArenaBytes).value_or("");
}

template <class Change>
std::string fault_of(Verb verb, Change change) {
  Request request = sound(verb);
  change(request);
  return fault_of(request);
}

bool starts_with(const std::string& text, const std::string& start) { return text.rfind(start, 0) == 0; }

TEST(Validate, PassesEveryVerbOfACorrectClient) {
  for (int verb = 1; verb <= static_cast<int>(Verb::kStep); ++verb) {
    EXPECT_EQ(fault_of(sound(static_cast<Verb>(verb))), "") << verb;
  }
}

TEST(Validate, NamesTheFieldThatIsOutOfRange) {
  const auto start = [](const std::string& text) { return text.substr(0, text.find(';')); };
  EXPECT_EQ(start(fault_of(Verb::kNone, [](Request&) {})), "verb is 0");
  EXPECT_EQ(start(fault_of(static_cast<Verb>(11), [](Request&) {})), "verb is 11");
  EXPECT_EQ(start(fault_of(Verb::kStep, [](Request& r) { r.flags = shm::kKeep; })),
            "flags is " + std::to_string(shm::kKeep));
  EXPECT_EQ(start(fault_of(Verb::kBarrier, [](Request& r) { r.reserved = 9; })), "reserved is 9");
  EXPECT_EQ(start(fault_of(Verb::kBarrier, [](Request& r) { r.stream_flag = 256; })), "stream_flag is 256");
  for (const int layer : {0, 4, 65535}) {
    EXPECT_EQ(start(fault_of(Verb::kForward, [&](Request& r) { r.layer = static_cast<std::uint16_t>(layer); })),
              "layer is " + std::to_string(layer));
  }
  EXPECT_EQ(start(fault_of(Verb::kRead, [](Request& r) { r.kind = static_cast<TensorKind>(5); })), "kind is 5");
  EXPECT_EQ(start(fault_of(Verb::kWrite, [](Request& r) { r.tensor = static_cast<AdapterTensor>(6); })), "tensor is 6");
}

TEST(Validate, WantsAnActivationWhereOneIsNeeded) {
  for (const Verb verb : {Verb::kFetch, Verb::kBackward, Verb::kRelease}) {
    EXPECT_TRUE(starts_with(fault_of(verb, [](Request& r) { r.act_id = 0; }), "act_id is 0"));
  }
  EXPECT_EQ(fault_of(Verb::kForward, [](Request& r) { r.act_id = 0; }), "");
  EXPECT_TRUE(starts_with(fault_of(Verb::kForward,
                                   [](Request& r) {
                                     r.act_id = 0;
                                     r.flags = shm::kKeepY;
                                   }),
                          "KEEP_Y is set but act_id is 0"));
}

TEST(Validate, HoldsExpertRangesToTheModelAlsoWhereTheSumOverflows) {
  for (const auto& [first, count] : {std::pair{0u, 5u}, {3u, 2u}, {0xffffffffu, 2u}, {1u, 0xffffffffu}}) {
    EXPECT_TRUE(starts_with(fault_of(Verb::kRead,
                                     [first = first, count = count](Request& r) {
                                       r.first_expert = first;
                                       r.num_experts = count;
                                     }),
                            "experts " + std::to_string(first)));
  }
  EXPECT_EQ(fault_of(Verb::kRead, [](Request& r) { r.first_expert = 3, r.num_experts = 1; }), "");
  EXPECT_TRUE(starts_with(fault_of(Verb::kRead, [](Request& r) { r.kind = TensorKind::kT; }), "t is one number"));
}

TEST(Validate, KeepsPayloadsAlignedAndInsideTheArena) {
  EXPECT_NE(fault_of(Verb::kForward, [](Request& r) { r.payload_offset = 8; }), "");
  EXPECT_EQ(fault_of(Verb::kForward, [](Request& r) { r.payload_offset = kArenaBytes - 1024; }), "");
  EXPECT_NE(fault_of(Verb::kForward, [](Request& r) { r.payload_offset = kArenaBytes; }), "");
  EXPECT_NE(fault_of(Verb::kForward, [](Request& r) { r.payload_offset = ~std::uint64_t{255}; }), "");
  EXPECT_NE(fault_of(Verb::kBackward, [](Request& r) { r.num_tokens = 0xffffffff; }), "");
  Request read = sound(Verb::kRead);
  EXPECT_FALSE(coproc::check_tensor(read, {4, 64}, kArenaBytes));  // 4 experts · 4 · 64 floats: all of it.
  EXPECT_TRUE(coproc::check_tensor(read, {4, 65}, kArenaBytes));
}

struct Copies : testing::Test {
  std::byte* at(const shm::Part& part) { return segment.arena() + part.offset; }
  ExpertDims dims = small_model(2);
  shm::Segment segment = shm::Segment::create(1, shm::kArenaBytesMin).value();
};

TEST_F(Copies, OfIdsNameTheFirstOneOutOfRange) {
  Request request = sound(Verb::kForward);
  request.num_tokens = 3;
  const shm::ForwardPayload payload(coproc::payload_shape(dims), 3);
  std::int32_t ids[6] = {0, 3, 4, 1, 2, 0};  // 4, the number of experts, contributes nothing.
  std::memcpy(at(payload.ids), ids, sizeof ids);
  std::vector<std::int32_t> copied;
  EXPECT_EQ(coproc::copy_ids(segment, request, dims, copied), std::nullopt);
  EXPECT_EQ(copied, std::vector<std::int32_t>(std::begin(ids), std::end(ids)));
  for (const std::int32_t bad : {-1, 5, INT32_MIN, INT32_MAX}) {
    ids[3] = bad;
    std::memcpy(at(payload.ids), ids, sizeof ids);
    EXPECT_TRUE(starts_with(*coproc::copy_ids(segment, request, dims, copied),
                            "the expert id of token 1, slot 1 is " + std::to_string(bad)));
  }
}

TEST_F(Copies, OfAStepCheckGroupsAndClearTheUnusedOnes) {
  const Request request = sound(Verb::kStep);
  const shm::StepPayload payload(dims.num_layers);
  shm::StepHeader header{};
  header.num_groups = 2;
  for (auto& group : header.groups) group = {1, 1, 1, 1, 1, 1};
  std::vector<std::uint8_t> group_of(std::size_t{dims.num_layers} * shm::kNumAdapterTensors, shm::kFrozen);
  group_of[7] = 1;
  shm::StepHeader copied;
  std::vector<std::uint8_t> mask;
  const auto copy = [&] {
    std::memcpy(at(payload.header), &header, sizeof header);
    std::memcpy(at(payload.group_of), group_of.data(), group_of.size());
    return coproc::copy_step(segment, request, dims, copied, mask).value_or("");
  };
  EXPECT_EQ(copy(), "");
  EXPECT_EQ(copied.groups[1].lr, 1);
  EXPECT_EQ(copied.groups[2].lr, 0);
  EXPECT_EQ(mask, group_of);
  group_of[7] = 2;
  EXPECT_TRUE(starts_with(copy(), "group_of is 2; layer 1, tensor 1"));
  group_of[7] = 1;
  header.groups[1].decoupled = 2;
  EXPECT_TRUE(starts_with(copy(), "decoupled is 2"));
  header.num_groups = shm::kNumGroupsMax + 1;
  EXPECT_TRUE(starts_with(copy(), "num_groups is 65"));
}

}  // namespace
}  // namespace kt::test
