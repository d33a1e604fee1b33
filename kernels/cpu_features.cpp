#include "kernels/cpu_features.h"

#include <cpuid.h>
#include <sys/syscall.h>
#include <unistd.h>

#include <array>
#include <atomic>

namespace kt::kernels {
namespace {

constexpr long kArchReqXcompPerm = 0x1023;  // Linux uapi/asm/prctl.h
constexpr long kXfeatureTileData = 18;
constexpr std::uint64_t kXcr0Avx = 0x6;        // SSE, AVX
constexpr std::uint64_t kXcr0Avx512 = 0xe6;    // SSE, AVX, opmask, upper halves of zmm0-15, zmm16-31
constexpr std::uint64_t kXcr0Tiles = 0x60000;  // tile configuration, tile data

// One requirement, under the name that /proc/cpuinfo gives it where it has one.
struct Requirement {
  const char* name;
  bool present;
};

// A feature is there when all of its requirements are; tile permission comes on top and is asked for only then.
struct Host {
  std::array<Requirement, 3> avx2;
  std::array<Requirement, 6> avx512;
  std::array<Requirement, 3> amx;
  bool tiles_granted = false;
};

std::uint64_t read_xcr0() {
  std::uint32_t low, high;
  __asm__ volatile("xgetbv" : "=a"(low), "=d"(high) : "c"(0));
  return (std::uint64_t{high} << 32) | low;
}

bool bit(std::uint32_t word, int index) { return (word >> index & 1) != 0; }

template <std::size_t N>
bool all_present(const std::array<Requirement, N>& requirements) {
  for (const Requirement& r : requirements)
    if (!r.present) return false;
  return true;
}

Host detect() {
  std::uint32_t a = 0, b = 0, c = 0, d = 0, c1 = 0;
  std::uint32_t b7 = 0, c7 = 0, d7 = 0, a71 = 0;
  const bool has_xgetbv = __get_cpuid(1, &a, &b, &c1, &d) != 0 && bit(c1, 27);  // OSXSAVE
  const std::uint64_t xcr0 = has_xgetbv ? read_xcr0() : 0;
  if (__get_cpuid_count(7, 0, &a, &b7, &c7, &d7) != 0 && a >= 1) __get_cpuid_count(7, 1, &a71, &b, &c, &d);

  Host host{
      .avx2 = {{{"avx2", bit(b7, 5)},
                {"fma", bit(c1, 12)},
                {"YMM state enabled by the operating system", (xcr0 & kXcr0Avx) == kXcr0Avx}}},
      .avx512 = {{{"avx512f", bit(b7, 16)},
                  {"avx512bw", bit(b7, 30)},
                  {"avx512dq", bit(b7, 17)},
                  {"avx512vl", bit(b7, 31)},
                  {"avx512_bf16", bit(a71, 5)},
                  {"ZMM state enabled by the operating system", (xcr0 & kXcr0Avx512) == kXcr0Avx512}}},
      .amx = {{{"amx_tile", bit(d7, 24)},
               {"amx_bf16", bit(d7, 22)},
               {"tile state enabled by the operating system", (xcr0 & kXcr0Tiles) == kXcr0Tiles}}},
  };
  host.tiles_granted = all_present(host.amx) && syscall(SYS_arch_prctl, kArchReqXcompPerm, kXfeatureTileData) == 0;
  return host;
}

const Host& this_host() {
  static const Host host = detect();
  return host;
}

std::uint32_t detected_features() {
  const Host& host = this_host();
  std::uint32_t features = 0;
  if (all_present(host.avx2)) features |= kAvx2Fma;
  if (all_present(host.avx512)) features |= kAvx512Bf16;
  if (host.tiles_granted) features |= kAmxBf16;
  return features;
}

constexpr std::uint32_t kNoOverride = ~std::uint32_t{0};
std::atomic<std::uint32_t> features_for_test{kNoOverride};

void append(std::string& list, const char* name) {
  if (!list.empty()) list += ", ";
  list += name;
}

template <std::size_t N>
void append_missing(std::string& list, const std::array<Requirement, N>& requirements) {
  for (const Requirement& r : requirements)
    if (!r.present) append(list, r.name);
}

}  // namespace

std::uint32_t cpu_features() {
  const std::uint32_t for_test = features_for_test.load(std::memory_order_relaxed);
  return for_test == kNoOverride ? detected_features() : for_test;
}

std::string missing_cpu_features(std::uint32_t required) {
  const std::uint32_t missing = required & ~cpu_features();
  const Host& host = this_host();
  std::string list;
  if (missing & kAvx2Fma) append_missing(list, host.avx2);
  if (missing & kAvx512Bf16) append_missing(list, host.avx512);
  if (missing & kAmxBf16) {
    append_missing(list, host.amx);
    if (all_present(host.amx) && !host.tiles_granted) append(list, "permission for tile data (arch_prctl)");
  }
  if (missing != 0 && list.empty()) list = "features hidden by a test";
  return list;
}

void override_cpu_features_for_test(std::optional<std::uint32_t> features) {
  features_for_test.store(features.value_or(kNoOverride), std::memory_order_relaxed);
}

}  // namespace kt::kernels
