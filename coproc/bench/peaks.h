// What this machine gives at best, all workers together: the kernel table's FLOP/s on a product that lies in L2, and
// the memory's bytes per second for reading.
#pragma once
#include <cstddef>
#include <cstdint>
#include <memory>
#include <vector>

#include "coproc/experts/memory.h"
#include "coproc/experts/worker_pool.h"
#include "kernels/kernel_table.h"
#include "shm/base/result.h"

namespace kt::coproc {

struct Peaks {
  double flops = 0;                  // Per second, of the table's gemm.
  double dram_bytes_per_second = 0;  // Read.
};

class PeakProbe {
 public:
  // Takes four times `cache_bytes` of memory, so that reading it finds nothing in a cache. kNoResources.
  static Result<std::unique_ptr<PeakProbe>> create(const kernels::KernelTable& table, WorkerPool& pool,
                                                   std::uint64_t cache_bytes);

  // One measurement of about 10 ms each. Leaves the caches full of memory nobody else uses.
  Peaks measure();

 private:
  // A product per worker; the sizes keep A, W and C within half of the smallest L2 (512 KiB).
  struct Product {
    std::vector<std::byte> a;
    std::vector<std::byte> w;
    std::vector<float> c;
  };
  PeakProbe(const kernels::KernelTable& table, WorkerPool& pool);
  double multiply_seconds(std::int64_t num_products);
  double read_seconds();

  const kernels::KernelTable& table_;
  WorkerPool& pool_;
  std::vector<Product> products_;  // By worker.
  std::int64_t num_products_ = 1;  // In one measurement.
  Memory buffer_;
  std::int64_t buffer_bytes_ = 0;
  std::vector<std::uint64_t> sums_;  // By task of reading: what is read has to go somewhere.
};

}  // namespace kt::coproc
