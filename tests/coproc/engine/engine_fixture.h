// What the engine's tests share: a small random model served by a real engine on its own thread, ranks on real
// segments, and an oracle that calls the experts directly.
#pragma once
#include <gtest/gtest.h>

#include <functional>
#include <future>
#include <memory>
#include <mutex>
#include <string>
#include <thread>
#include <vector>

#include "coproc/engine/engine.h"
#include "tests/support/test_rank.h"

namespace kt::test {

using coproc::CreateAdapter;
using coproc::EngineOptions;
using coproc::ExpertDims;
using coproc::JoinJob;
using coproc::SessionEnd;
using shm::AdapterTensor;
using shm::TensorKind;

inline constexpr std::uint32_t kAdapter = 1;                     // The adapter most tests train.
inline const std::vector<std::uint32_t> kMoeLayers = {1, 2, 3};  // Of four layers: the first one is dense.
coproc::AdapterLayerSpec default_spec();
ExpertDims small_model(std::uint32_t element_bytes);
const kernels::KernelTable& scalar_table(std::uint32_t element_bytes);
std::unique_ptr<coproc::ExpertWeights> random_weights(const ExpertDims& dims, const kernels::KernelTable& table);
shm::StatusPageOwner make_page();

// A session as the tests hold it.
struct Rank : TestRank {
  using TestRank::TestRank;
  std::uint32_t session_id = 0;
};

class Host {
 public:
  using Answer = Result<coproc::JoinAnswer>;  // Of a command that is no join: step 0.
  using Call = std::future<Answer>;

  explicit Host(std::uint32_t element_bytes = 2, EngineOptions options = default_options());
  ~Host();
  static EngineOptions default_options();

  const ExpertDims& dims() const { return dims_; }
  const kernels::KernelTable& table() const { return table_; }
  const coproc::ExpertWeights& weights() const { return *weights_; }
  RankShape shape() const;
  shm::StatusPage& page() { return page_.page(); }
  coproc::Engine& engine() { return *engine_; }

  std::unique_ptr<Rank> open(const std::string& name = "");
  Error refused_open();  // Throws if it was not refused.
  Call create(const Rank& rank, std::uint32_t adapter_id = kAdapter, std::vector<std::uint32_t> layers = kMoeLayers,
              coproc::AdapterLayerSpec spec = default_spec());
  Call remove(const Rank& rank, std::uint32_t adapter_id);
  Call join(const Rank& rank, JoinJob join);
  void end(const Rank& rank, SessionEnd why);  // Returns when it has happened.
  // Returns when the engine has received everything sent before, and has looked at it in at least `count` rounds.
  void rounds(int count = 4);
  // Worker 0 stands still, from its next command on, until the returned object is destroyed.
  class Pause {
   public:
    explicit Pause(Host& host);
    ~Pause() { released_.set_value(); }

   private:
    std::promise<void> released_;
  };

  // What on_session_ended was called with, so far. After rounds().
  std::vector<std::pair<std::uint32_t, Error>> broken();
  // Called on worker 0 when a session breaks the protocol: a point in time between two requests.
  void when_broken(std::function<void()> action);

  // `count` ranks, joined; each with kAdapter, filled from `seed` before the join.
  std::vector<std::unique_ptr<Rank>> open_job(std::uint32_t count, const std::string& job_id, std::uint32_t seed = 7,
                                              double timeout_seconds = 0);

 private:
  ExpertDims dims_;
  const kernels::KernelTable& table_;
  std::unique_ptr<coproc::ExpertWeights> weights_;
  coproc::WorkerPool pool_;
  shm::StatusPageOwner page_;
  std::unique_ptr<coproc::Engine> engine_;
  std::mutex mutex_;
  std::vector<std::pair<std::uint32_t, Error>> broken_;  // Guarded by mutex_.
  std::function<void()> when_broken_;                    // Guarded by mutex_.
  std::uint32_t num_sessions_ = 0;
  std::thread thread_;
};

// Waits for an answer; throws std::runtime_error after 30 s.
Host::Answer get(Host::Call call);
// "" when the answer is ok, else its error text; `code` gets the error code.
std::string error_of(const Host::Answer& answer, ErrorCode* code = nullptr);
JoinJob join_request(std::uint32_t rank, std::uint32_t world_size, const std::string& job_id,
                     double timeout_seconds = 0);

// The values a tensor is filled with: small, reproducible, different for each layer and tensor.
std::vector<float> tensor_values(const coproc::Adapter& adapter, const ExpertDims& dims, std::uint32_t layer,
                                 AdapterTensor tensor, std::uint32_t seed);
inline constexpr AdapterTensor kTensors[] = {AdapterTensor::kGateA, AdapterTensor::kGateB, AdapterTensor::kUpA,
                                             AdapterTensor::kUpB,   AdapterTensor::kDownA, AdapterTensor::kDownB};

// Calls the experts as the engine should: y, dx and dw must come out bit-equal.
class Oracle {
 public:
  explicit Oracle(const Host& host);

  coproc::Adapter& adapter() { return adapter_; }
  coproc::WorkerPool& pool() { return pool_; }
  void fill(std::uint32_t seed);                                       // The adapter's parameters.
  static void fill(Rank& rank, const Host& host, std::uint32_t seed);  // The same, through WRITE.
  Bytes forward(std::uint32_t layer, bool adapted, const Tokens& tokens, coproc::SavedActivation* kept = nullptr);
  struct Gradients {
    Bytes dx;
    Bytes dw;
  };
  // One batch: contributions enter S in the order of the items.
  std::vector<Gradients> backward(const std::vector<const coproc::SavedActivation*>& kept, const std::vector<Bytes>& dy,
                                  bool accumulate);
  void step(const StepArgs& args);
  double squared_norm();
  std::vector<float> read(TensorKind kind, std::uint32_t layer, AdapterTensor tensor) const;

 private:
  const ExpertDims& dims_;
  coproc::WorkerPool pool_;
  coproc::ExpertCompute compute_;
  coproc::Adapter adapter_;
};

std::vector<float> read_tensor(Rank& rank, const Oracle& oracle, TensorKind kind, std::uint32_t layer,
                               AdapterTensor tensor);
// Every tensor of every layer, bit for bit.
void expect_same_adapter(Rank& rank, const Oracle& oracle, const std::vector<TensorKind>& kinds);
// max |a - b| / max |b|.
double relative_difference(const std::vector<float>& a, const std::vector<float>& b);

}  // namespace kt::test
