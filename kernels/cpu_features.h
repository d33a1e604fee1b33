// What this host can run: CPUID bits and operating-system support, taken once.
#pragma once
#include <cstdint>
#include <optional>
#include <string>

namespace kt::kernels {

enum CpuFeature : std::uint32_t {
  kAvx512Bf16 = 1u << 0,  // F, BW, DQ, VL and BF16, with ZMM state enabled in XCR0.
  kAmxBf16 = 1u << 1,     // TILE and BF16, with tile state enabled in XCR0 *and* granted to us.
  kAvx2Fma = 1u << 2,     // AVX2 and FMA, with YMM state enabled in XCR0.
};

// Bit set of CpuFeature. Asks the kernel for tile permission (arch_prctl) on first call.
std::uint32_t cpu_features();

// What this host lacks of `required`, for people: "avx512f, avx512_bf16". Empty when nothing is missing.
std::string missing_cpu_features(std::uint32_t required);

// From now on cpu_features() returns `features`, whatever the CPU says; nullopt: the CPU's own again. Only for tests
// that execute a table the CPU cannot run, under an emulator: CPUID cannot be made to lie.
void override_cpu_features_for_test(std::optional<std::uint32_t> features);

}  // namespace kt::kernels
