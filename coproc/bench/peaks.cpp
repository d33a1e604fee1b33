#include "coproc/bench/peaks.h"

#include <algorithm>
#include <chrono>
#include <cstring>

#include "coproc/bench/elements.h"

namespace kt::coproc {
namespace {

using Clock = std::chrono::steady_clock;
using kernels::kPanelRows;

constexpr std::int64_t kM = 96;  // A multiple of every table's block of rows: 6 rows, or 2 AMX tiles.
constexpr std::int64_t kK = 256;
constexpr std::int64_t kLda = kK + kPanelRows;  // Rows a power of two apart would share L1 sets.
constexpr std::int64_t kNumPanels = 4;
constexpr std::int64_t kN = kNumPanels * kPanelRows;
constexpr double kProductFlops = 2.0 * kM * kN * kK;
constexpr double kMeasurementSeconds = 0.01;
constexpr double kProductsMax = 1e6;

constexpr std::uint64_t kCachesInBuffer = 4;
constexpr std::int64_t kReadTaskBytes = 1 << 20;
constexpr std::int64_t kLineBytes = 64;

double seconds_since(Clock::time_point begin) { return std::chrono::duration<double>(Clock::now() - begin).count(); }

// One word of each cache line brings the whole line; four sums, so that no addition waits for the one before.
std::uint64_t touch_lines(const std::byte* data) {
  std::uint64_t sum[4] = {};
  for (std::int64_t at = 0; at < kReadTaskBytes; at += 4 * kLineBytes) {
    for (std::int64_t line = 0; line < 4; ++line) {
      std::uint64_t word = 0;
      std::memcpy(&word, data + at + line * kLineBytes, sizeof word);
      sum[line] += word;
    }
  }
  return sum[0] + sum[1] + sum[2] + sum[3];
}

}  // namespace

PeakProbe::PeakProbe(const kernels::KernelTable& table, WorkerPool& pool)
    : table_(table), pool_(pool), products_(static_cast<std::size_t>(pool.num_workers())) {
  const std::int64_t eb = table.element_bytes;
  const std::int64_t stride = kernels::panel_stride_bytes(kK, eb);
  const std::vector<std::byte> rows = random_elements(kN * kK, eb, 1);
  for (Product& product : products_) {
    product.a = random_elements(kM * kLda, eb, 2);
    product.w.resize(static_cast<std::size_t>(kNumPanels * stride));
    product.c.resize(kM * kN);
    table.pack({rows.data(), kK, kN, kK, kK, kNumPanels, product.w.data(), stride});
  }
}

Result<std::unique_ptr<PeakProbe>> PeakProbe::create(const kernels::KernelTable& table, WorkerPool& pool,
                                                     std::uint64_t cache_bytes) {
  std::unique_ptr<PeakProbe> probe(new PeakProbe(table, pool));
  const std::uint64_t bytes = round_up(kCachesInBuffer * cache_bytes, std::uint64_t{kReadTaskBytes});
  KT_TRY(probe->buffer_, Memory::map(bytes, "the buffer whose reading shows the memory's bandwidth",
                                     "stop other processes on this machine, or raise the container's memory limit"));
  probe->buffer_bytes_ = static_cast<std::int64_t>(bytes);
  probe->sums_.resize(bytes / kReadTaskBytes);
  // Pages that were never written are all the same one.
  pool.run(probe->buffer_bytes_ / kReadTaskBytes, [&](std::int64_t task, int) {
    std::memset(probe->buffer_.data() + task * kReadTaskBytes, 1, kReadTaskBytes);
  });
  probe->multiply_seconds(pool.num_workers());  // Wakes the workers and brings the operands to their caches.
  const double once = probe->multiply_seconds(pool.num_workers()) / pool.num_workers();
  probe->num_products_ = static_cast<std::int64_t>(std::clamp(kMeasurementSeconds / once, 1.0, kProductsMax));
  return probe;
}

double PeakProbe::multiply_seconds(std::int64_t num_products) {
  const std::int64_t stride = kernels::panel_stride_bytes(kK, table_.element_bytes);
  const auto begin = Clock::now();
  pool_.run(num_products, [&](std::int64_t, int worker) {
    Product& product = products_[static_cast<std::size_t>(worker)];
    table_.gemm(product.a.data(), kLda, kM, {product.w.data(), stride, kNumPanels, kK}, product.c.data(), kN, false,
                {});
  });
  return seconds_since(begin);
}

double PeakProbe::read_seconds() {
  const auto begin = Clock::now();
  pool_.run(buffer_bytes_ / kReadTaskBytes, [&](std::int64_t task, int) {
    sums_[static_cast<std::size_t>(task)] = touch_lines(buffer_.data() + task * kReadTaskBytes);
  });
  return seconds_since(begin);
}

Peaks PeakProbe::measure() {
  Peaks peaks;
  peaks.flops = static_cast<double>(num_products_) * kProductFlops / multiply_seconds(num_products_);
  peaks.dram_bytes_per_second = static_cast<double>(buffer_bytes_) / read_seconds();
  return peaks;
}

}  // namespace kt::coproc
