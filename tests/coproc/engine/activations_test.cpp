#include "coproc/engine/activations.h"

#include "coproc/engine/activation_budget.h"
#include "tests/coproc/engine/owners_fixture.h"

namespace kt::test {
namespace {

using coproc::ActivationStore;
using coproc::SavedActivation;

SavedActivation of_bytes(std::size_t bytes, std::uint32_t adapter_id = 0) {
  SavedActivation activation;
  activation.adapter_id = adapter_id;
  activation.x.resize(bytes);
  return activation;
}

TEST(ActivationStores, CountTheBytesTheyHold) {
  ActivationStore store;
  EXPECT_EQ(store.bytes(), 0u);
  store.add(7, of_bytes(100));
  store.add(9, of_bytes(31, 2));
  EXPECT_EQ(store.bytes(), 131u);
  EXPECT_EQ(store.find(8), nullptr);
  EXPECT_EQ(store.find(9)->adapter_id, 2u);
  store.release(8);  // Never there.
  store.release(7);
  store.release(7);
  EXPECT_EQ(store.bytes(), 31u);
  EXPECT_EQ(store.size(), 1u);
}

TEST(ActivationStores, DropAnAdaptersActivationsAndOnlyThose) {
  ActivationStore store;
  for (std::uint64_t act_id = 1; act_id <= 20; ++act_id) {
    store.add(act_id, of_bytes(act_id, static_cast<std::uint32_t>(act_id % 3)));
  }
  store.release_adapter(2);
  EXPECT_EQ(store.find(2), nullptr);
  EXPECT_NE(store.find(3), nullptr);
  EXPECT_EQ(store.bytes(), 210u - (2 + 5 + 8 + 11 + 14 + 17 + 20));
  store.clear();
  EXPECT_EQ(store.bytes(), 0u);
  EXPECT_EQ(store.size(), 0u);
}

TEST(ActivationsOwner, AreFoundWithTheNumTokensOfTheirForward) {
  Owners owners;
  coproc::Session& session = owners.session(owners.open());
  shm::Request request;
  request.verb = shm::Verb::kBackward;
  request.act_id = 4;
  request.num_tokens = 3;
  EXPECT_EQ(find_activation(session, request).error().code, ErrorCode::kNotFound);
  SavedActivation activation = of_bytes(8);
  activation.num_tokens = 3;
  session.activations.add(4, activation);
  EXPECT_EQ(find_activation(session, request).value(), session.activations.find(4));
  request.num_tokens = 2;
  const Error error = find_activation(session, request).error();
  EXPECT_EQ(error.code, ErrorCode::kInvalidArgument);
  EXPECT_TRUE(has_text(error.why, "num_tokens is 2; the forward had 3")) << error.text();
}

// The head of a session that has sent a forward of 3 tokens.
coproc::Pending& forward_head(Owners& owners, Rank& rank, std::uint64_t act_id, std::uint8_t flags = 0) {
  rank.send_forward(1, 0, act_id, random_tokens(owners.shape, 3, 1), flags);
  owners.receive_and_advance();
  return owners.session(rank).queue.front();
}

TEST(ActivationsOwner, AreKeptWholeWithinTheBudgetThenWithoutGAndUThenNotAtAll) {
  const ExpertDims dims = small_model(2);
  const std::uint64_t input = coproc::activation_input_bytes(dims, 3, false);
  const std::uint64_t gate_up = coproc::activation_gate_up_bytes(dims, 3);
  Owners owners(false, 2 * input + gate_up);
  Rank& rank = owners.open();
  coproc::Session& session = owners.session(rank);
  const SavedActivation& whole = *owners.activations.keep(session, forward_head(owners, rank, 1)).value();
  EXPECT_EQ(whole.bytes(), input + gate_up);
  session.answer_head(owners.accounting, {}, nullptr);
  const SavedActivation& without = *owners.activations.keep(session, forward_head(owners, rank, 2)).value();
  EXPECT_EQ(without.bytes(), input);
  session.answer_head(owners.accounting, {}, nullptr);
  const Error error = owners.activations.keep(session, forward_head(owners, rank, 3)).error();
  EXPECT_EQ(error.code, ErrorCode::kActivationLimit);
  EXPECT_TRUE(has_text(error.why, "the job holds " + std::to_string(2 * input + gate_up))) << error.text();
  EXPECT_EQ(session.activations.size(), 2u);
  EXPECT_EQ(owners.registry.memory().activations, 2 * input + gate_up);
}

TEST(ActivationsOwner, ShareTheBudgetBetweenJobs) {
  const std::uint64_t input = coproc::activation_input_bytes(small_model(2), 3, false);
  Owners owners(false, 2 * input - 1);
  Rank& rank = owners.open();
  owners.open();  // A second job: the share is half, and less than the input.
  EXPECT_FALSE(owners.activations.keep(owners.session(rank), forward_head(owners, rank, 1)).ok());
  owners.registry.end(2, coproc::SessionEnd::kBye);
  EXPECT_TRUE(owners.activations.keep(owners.session(rank), owners.session(rank).queue.front()).ok());
}

}  // namespace
}  // namespace kt::test
