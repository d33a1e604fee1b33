// The engine's owners without its thread: a test calls them one by one.
#pragma once
#include <memory>
#include <optional>
#include <string>
#include <vector>

#include "coproc/engine/adapter_commands.h"
#include "coproc/engine/batches.h"
#include "coproc/engine/collectives.h"
#include "coproc/engine/intake.h"
#include "coproc/engine/joins.h"
#include "coproc/engine/registry.h"
#include "tests/coproc/engine/engine_fixture.h"

namespace kt::test {

struct Owners {
  static constexpr std::uint64_t kTimeoutNs = 1000;

  explicit Owners(bool deterministic = false, std::uint64_t activation_bytes_max = std::uint64_t{1} << 30,
                  std::uint32_t batch_tokens_max = 16);

  // A session of a process that is its own job, and its rank.
  Rank& open();
  coproc::Session& session(const Rank& rank) { return *registry.find(rank.session_id); }
  // The ranks opened so far become one job, each with the adapter kAdapter.
  coproc::Job& join_all();
  void create_adapter(const Rank& rank);
  void receive_and_advance();

  const ExpertDims dims = small_model(2);
  const kernels::KernelTable& table = scalar_table(2);
  const RankShape shape{{dims.hidden_size, dims.top_k, 2}, dims.num_layers, dims.num_experts};
  std::unique_ptr<coproc::ExpertWeights> weights = random_weights(dims, table);
  coproc::WorkerPool pool{std::vector<int>{-1}};
  shm::StatusPageOwner page = make_page();
  coproc::Sleeper sleeper;
  coproc::ExpertCompute compute{dims, table, *weights, pool};
  coproc::Accounting accounting{page.page(), 3, pool};
  coproc::Registry registry{accounting, sleeper, pool, kTimeoutNs};
  coproc::Intake intake{dims, registry, accounting};
  coproc::Heads heads;
  coproc::Activations activations;
  coproc::Joins joins{registry, dims.num_layers, kTimeoutNs};
  coproc::AdapterCommands commands{dims, table};
  coproc::Batches batches;
  coproc::Collectives collectives{registry, heads, batches, commands, accounting, pool};
  std::vector<std::unique_ptr<Rank>> ranks;
};

// Where an answer goes: empty until it is given.
struct Told {
  std::shared_ptr<std::optional<Host::Answer>> answer = std::make_shared<std::optional<Host::Answer>>();
  coproc::OnDone on_done() const;
  coproc::OnJoined on_joined() const;
  bool given() const { return answer->has_value(); }
  ErrorCode code() const { return answer->value().ok() ? ErrorCode::kOk : answer->value().error().code; }
};

inline bool has_text(const std::string& text, const std::string& part) { return text.find(part) != std::string::npos; }

}  // namespace kt::test
