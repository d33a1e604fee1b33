// The emulator beside the CPU: where AVX-512 is native, both execute the same instructions on the same operands, any
// bits among them. Elsewhere there is nothing to compare with; evex_emulator_test.cpp holds what the manual says.
#include <gtest/gtest.h>
#include <signal.h>
#include <ucontext.h>

#include <array>
#include <cstdlib>
#include <cstring>
#include <iostream>
#include <random>

#include "kernels/cpu_features.h"
#include "tests/support/isa/emulator.h"
#include "tests/support/isa/evex_execute.h"

namespace kt::test {
namespace {

// a, b and c of an instruction, and what became of c.
struct alignas(64) Operands {
  std::array<std::uint32_t, 16> a, b, c, result;
};

bool is_ud2(const std::uint8_t* code) { return code[0] == 0x0f && code[1] == 0x0b; }

// Emulates what stands between two ud2.
void emulate_until_ud2(int, siginfo_t*, void* context) {
  VectorRegisters registers(static_cast<ucontext_t*>(context));
  const auto code = [&] {
    return reinterpret_cast<const std::uint8_t*>(registers.ip());  // NOLINT(performance-no-int-to-ptr)
  };
  if (!is_ud2(code())) std::abort();
  registers.set_ip(registers.ip() + 2);
  while (!is_ud2(code())) {
    const std::optional<Instruction> instruction = decode_instruction(code());
    if (!instruction || execute_evex(*instruction, registers) != nullptr) std::abort();
  }
  registers.set_ip(registers.ip() + 2);
}

// An instruction on zmm16 (a), zmm17 (b) and zmm18 (c, also the result); the address of a is in %0.
#define KT_ON_OPERANDS(instruction)                                                          \
  "vmovups (%0), %%zmm16\n vmovups 64(%0), %%zmm17\n vmovups 128(%0), %%zmm18\n" instruction \
  "\n vmovups %%zmm18, 192(%0)\n"
#define KT_CASE(instruction)                                                                 \
  Case {                                                                                     \
    instruction,                                                                             \
        [](Operands* o) {                                                                    \
          __asm__ volatile("ud2\n" KT_ON_OPERANDS(instruction) "ud2\n" ::"r"(o) : "memory"); \
        },                                                                                   \
        [](Operands* o) {                                                                    \
          __asm__ volatile(KT_ON_OPERANDS(instruction)::"r"(o) : "memory");                  \
        }                                                                                    \
  }
struct Case {
  const char* name;
  void (*emulated)(Operands*);
  void (*native)(Operands*);
};

const Case kCases[] = {
    KT_CASE("vpmovsxbd 16(%0), %%zmm18"),
    KT_CASE("vpmovsxbd %%xmm17, %%zmm18"),
    KT_CASE("vpmovzxwd 32(%0), %%zmm18"),
    KT_CASE("vpmovdw %%zmm16, %%ymm18"),
    KT_CASE("vpermps 64(%0), %%zmm16, %%zmm18"),
    KT_CASE("vpermd %%zmm17, %%zmm16, %%zmm18"),
    KT_CASE("vpermt2ps %%zmm17, %%zmm16, %%zmm18"),
    KT_CASE("vpermi2ps %%zmm17, %%zmm16, %%zmm18"),
    KT_CASE("vmaxps %%zmm17, %%zmm16, %%zmm18"),
    KT_CASE("vptestmw %%zmm17, %%zmm16, %%k2\n vpblendmd %%zmm17, %%zmm16, %%zmm18%{%%k2%}"),
    KT_CASE("vptestmw %%zmm17, %%zmm16, %%k2\n vpblendmd 128(%0), %%zmm16, %%zmm18%{%%k2%}%{z%}"),
    KT_CASE("vpermt2w %%zmm17, %%zmm16, %%zmm18"),
    KT_CASE("vpermi2w 64(%0), %%zmm16, %%zmm18"),
    KT_CASE("vpmovzxbw 32(%0), %%zmm18"),
    KT_CASE("vpmovzxbw %%ymm17, %%zmm18"),
    KT_CASE("vptestmw %%zmm17, %%zmm16, %%k2\n vmovdqu16 %%zmm16, %%zmm18%{%%k2%}"),
    KT_CASE("vcvtne2ps2bf16 %%zmm17, %%zmm16, %%zmm18"),
    KT_CASE("vcvtne2ps2bf16 64(%0), %%zmm16, %%zmm18"),
    KT_CASE("vcvtdq2ps %%zmm17, %%zmm18"),
    KT_CASE("vdpbf16ps %%zmm17, %%zmm16, %%zmm18"),
    KT_CASE("vpshufb %%zmm17, %%zmm16, %%zmm18"),
    KT_CASE("vpunpckhqdq %%zmm17, %%zmm16, %%zmm18"),
    KT_CASE("vshufi64x2 $0x8d, %%zmm17, %%zmm16, %%zmm18"),
    KT_CASE("vpternlogd $0xca, %%zmm17, %%zmm16, %%zmm18"),
    KT_CASE("vpsrad $5, %%zmm17, %%zmm18"),
    KT_CASE("vpaddd 64(%0)%{1to16%}, %%zmm16, %%zmm18"),
};

// Numbers, and now and then any bits: subnormals, infinities, NaN.
void fill(std::array<std::uint32_t, 16>& words, std::mt19937& random) {
  std::normal_distribution<float> normal;
  for (std::uint32_t& word : words) {
    const float value = normal(random);
    std::memcpy(&word, &value, sizeof word);
    if (random() % 4 == 0) word = static_cast<std::uint32_t>(random());
    if (random() % 8 == 0) word &= 0x80ffffffu;
  }
}

// Which NaN comes out of an instruction that computes is not part of what is compared.
bool same(std::uint32_t a, std::uint32_t b) {
  float x, y;
  std::memcpy(&x, &a, sizeof x);
  std::memcpy(&y, &b, sizeof y);
  return a == b || (x != x && y != y);
}

TEST(EvexHardware, GivesWhatTheEmulatorGives) {
  if ((kernels::cpu_features() & kernels::kAvx512Bf16) == 0) GTEST_SKIP() << "this CPU has no AVX-512 to compare with";
  struct sigaction ours {};
  struct sigaction before {};
  ours.sa_sigaction = emulate_until_ud2;
  ours.sa_flags = SA_SIGINFO;
  ASSERT_EQ(sigaction(SIGILL, &ours, &before), 0);
  const auto seed = static_cast<std::uint32_t>(testing::UnitTest::GetInstance()->random_seed());
  std::cout << "seed " << seed << " (repeat with --gtest_random_seed=" << seed << ")\n";
  std::mt19937 random(seed);
  for (const Case& instruction : kCases) {
    for (int round = 0; round < 200; ++round) {
      Operands emulated{};
      for (auto* operand : {&emulated.a, &emulated.b, &emulated.c}) fill(*operand, random);
      Operands native = emulated;
      instruction.emulated(&emulated);
      instruction.native(&native);
      for (std::size_t i = 0; i < 16; ++i) {
        if (same(emulated.result[i], native.result[i])) continue;
        ADD_FAILURE() << instruction.name << ", word " << i << std::hex << ": a " << native.a[i] << " b " << native.b[i]
                      << " c " << native.c[i] << " gives " << native.result[i] << ", emulated " << emulated.result[i];
        round = 200;
        break;
      }
    }
  }
  sigaction(SIGILL, &before, nullptr);
}

}  // namespace
}  // namespace kt::test
