// How the expert weights come into memory: from their cache on disk, else from the checkpoint.
#pragma once
#include <cstdint>
#include <optional>

#include "coproc/daemon/prepare.h"
#include "coproc/model/loader.h"
#include "coproc/model/weight_cache.h"

namespace kt::coproc {

// On the loader's thread. A cache that cannot be used or written costs one warning, never the start.
class WeightLoading {
 public:
  // Of quantised formats only: others lie in the checkpoint as they are.
  WeightLoading(Prepared& prepared, const RunOptions& options, LoadProgress& progress);

  // Fills the weights; errors as those of load_experts. Shows progress on standard error.
  Status load(std::uint32_t num_threads);
  // Unless the weights came from there; until progress.cancel. The weights are only read: the daemon serves meanwhile.
  void write_cache();

 private:
  Status load_checkpoint(std::uint32_t num_threads);

  Prepared& prepared_;
  LoadProgress& progress_;
  std::optional<WeightCache> cache_;  // Empty: nothing to read or write.
};

}  // namespace kt::coproc
