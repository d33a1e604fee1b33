#include "coproc/engine/batches.h"

#include "tests/coproc/engine/owners_fixture.h"

namespace kt::test {
namespace {

std::vector<std::uint32_t> ids(const coproc::Batch& batch) {
  std::vector<std::uint32_t> ids;
  for (const coproc::Session* session : batch.sessions) ids.push_back(session->id);
  return ids;
}

struct BatchesOwner : testing::Test {
  void open(int count) {
    for (int i = 0; i < count; ++i) owners.open();
    job = &owners.join_all();
  }
  Ticket forward(std::size_t rank, std::uint32_t layer, std::uint32_t num_tokens, std::uint64_t act_id = 0) {
    const Ticket ticket =
        owners.ranks[rank]->send_forward(layer, kAdapter, act_id, random_tokens(owners.shape, num_tokens, 1));
    owners.receive_and_advance();
    return ticket;
  }
  using Ids = std::vector<std::uint32_t>;
  Owners owners;  // 16 tokens a batch.
  coproc::Job* job = nullptr;
};

TEST_F(BatchesOwner, TakeTheOldestHeadAndWhatHasTheSameLayerAndAdapter) {
  open(4);
  forward(2, 1, 3);
  forward(0, 2, 3);
  forward(3, 1, 5);
  forward(1, 1, 2);
  const coproc::Batch batch = owners.batches.gather(*job);
  EXPECT_EQ(ids(batch), (Ids{2, 3, 4}));  // In order of rank.
  EXPECT_EQ(batch.num_tokens, 10u);
  EXPECT_EQ(batch.key.layer, 1u);
}

TEST_F(BatchesOwner, HoldTheTokensThatFitAndTheOldestWhateverItsSize) {
  open(3);
  forward(1, 1, 17);
  forward(0, 1, 1);
  EXPECT_EQ(ids(owners.batches.gather(*job)), Ids{2});
  EXPECT_TRUE(owners.batches.run_next());
  forward(1, 1, 15);
  forward(2, 1, 1);
  EXPECT_EQ(ids(owners.batches.gather(*job)), (Ids{1, 2}));  // 1 + 15 are 16: the third does not fit.
}

TEST_F(BatchesOwner, AnswerTheirHeadsKeepActivationsAndReleaseThemInBackward) {
  open(2);
  const Ticket kept = forward(0, 1, 3, 9), plain = forward(1, 1, 2);
  EXPECT_TRUE(owners.batches.run_next());
  EXPECT_FALSE(owners.batches.run_next());
  EXPECT_TRUE(owners.ranks[0]->finish(kept).ok());
  EXPECT_TRUE(owners.ranks[1]->finish(plain).ok());
  EXPECT_EQ(owners.page.page().totals.batches.load(), 1u);
  coproc::Session& session = owners.session(*owners.ranks[0]);
  EXPECT_GT(session.activations.bytes(), 0u);
  const Bytes dy(std::size_t{3} * 64 * 2);
  for (const std::uint8_t flags : {std::uint8_t{shm::kKeep}, std::uint8_t{shm::kAccumulate}}) {
    const Ticket backward = owners.ranks[0]->send_backward(9, dy, flags);
    owners.receive_and_advance();
    EXPECT_TRUE(owners.batches.run_next());
    EXPECT_TRUE(owners.ranks[0]->finish(backward).ok());
    EXPECT_EQ(session.activations.size(), flags == shm::kKeep ? 1u : 0u);
    EXPECT_EQ(job->find_adapter(kAdapter)->has_gradients(), flags == shm::kAccumulate);
  }
}

TEST_F(BatchesOwner, LeaveOutAFailedJobAndHeadsThatMayNotRun) {
  open(2);
  forward(0, 1, 3);
  forward(1, 1, 3);
  job->adapters.clear();  // What the heads name is gone.
  EXPECT_TRUE(owners.batches.gather(*job).sessions.empty());
  owners.registry.fail(*job, {});
  EXPECT_TRUE(owners.batches.gather(*job).sessions.empty());
  EXPECT_FALSE(owners.batches.run_next());
}

TEST(DeterministicBatches, LeaveAccumulatingBackwardsToTheCollectives) {
  Owners owners(true);
  owners.open();
  owners.open();
  coproc::Job& job = owners.join_all();
  for (const auto& rank : owners.ranks) rank->send_forward(1, kAdapter, 9, random_tokens(owners.shape, 3, 1));
  owners.receive_and_advance();
  EXPECT_TRUE(owners.batches.run_next());
  for (const auto& rank : owners.ranks) rank->send_backward(9, Bytes(std::size_t{3} * 64 * 2), shm::kAccumulate);
  owners.receive_and_advance();
  EXPECT_TRUE(owners.batches.gather(job).sessions.empty());
  EXPECT_TRUE(owners.collectives.run(0));
  EXPECT_EQ(owners.page.page().totals.backward_requests.load(), 2u);
}

}  // namespace
}  // namespace kt::test
