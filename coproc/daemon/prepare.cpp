#include "coproc/daemon/prepare.h"

#include <spdlog/spdlog.h>

#include "coproc/machine/memory_room.h"
#include "coproc/model/fingerprint.h"
#include "kernels/formats.h"
#include "shm/text.h"

namespace kt::coproc {
namespace {

constexpr std::uint64_t kActivationShare = 4;  // A quarter of what the weights leave free.
constexpr std::size_t kModelPathBytesMax = 1023;

ExpertDims dims_of(const ModelConfig& config, ElementType element) {
  ExpertDims dims;
  dims.num_layers = config.num_layers;
  dims.moe_layers = config.moe_layers;
  dims.num_experts = config.num_experts;
  dims.top_k = config.top_k;
  dims.hidden_size = config.hidden_size;
  dims.intermediate_size = config.intermediate_size;
  dims.element_bytes = element_bytes(element);
  dims.activation = config.activation;
  return dims;
}

Result<const kernels::KernelTable*> choose_kernels(const RunOptions& options, ElementType element) {
  std::string why;
  const kernels::KernelTable* const table = kernels::find_table(options.kernels, element_bytes(element), &why);
  if (table != nullptr) return table;
  return Error{ErrorCode::kNoResources, "cannot use the kernels '" + options.kernels + "'", why,
               "leave --kernels out: the best this CPU can run are chosen"};
}

}  // namespace

Result<Prepared> prepare(const RunOptions& options) {
  KT_TRY(Checkpoint checkpoint, Checkpoint::open(options.model));
  shm::ModelCard card = checkpoint.config();
  card.path = shm::cut_utf8(card.path, kModelPathBytesMax);
  KT_TRY(card.fingerprint, fingerprint(checkpoint));
  card.weight_format = options.weight_format;
  const kernels::StorageFormat& format = *kernels::find_format(options.weight_format);
  const ElementType element = format.element_bytes == 4 ? ElementType::kFp32 : ElementType::kBf16;
  const ExpertDims dims = dims_of(checkpoint.config(), element);
  KT_TRY(const kernels::KernelTable* const table, choose_kernels(options, element));

  const CgroupLimits limits = read_cgroup_limits();
  const MemoryRoom room = read_memory_room(limits);
  const Machine machine = inspect_machine(limits.cpus);
  KT_TRY(WorkerPlan workers, plan_workers(machine, options.threads, options.numa));
  KT_TRY(auto weights, ExpertWeights::create(dims, *table, &format, workers.nodes));
  KT_TRY_STATUS(require_memory(room, weights->bytes(), "the expert weights of " + checkpoint.config().path));

  EngineOptions engine;
  engine.deterministic = options.deterministic;
  engine.batch_tokens_max = options.batch_tokens_max;
  engine.activation_bytes_max = options.activation_bytes_max;
  if (engine.activation_bytes_max == 0) {
    engine.activation_bytes_max = (room.bytes - weights->bytes()) / kActivationShare;
  }
  return Prepared{std::move(checkpoint), std::move(card),    element, dims, table,
                  std::move(workers),    std::move(weights), engine};
}

}  // namespace kt::coproc
