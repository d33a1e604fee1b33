// The emulator against what the manual says, one property at a time. Natively where the CPU has AVX-512: the same
// instructions must then give the same results, except for what only the emulator refuses.
#include <gtest/gtest.h>

#include <array>
#include <bit>
#include <cmath>
#include <iostream>
#include <random>
#include <thread>

#include "kernels/cpu_features.h"
#include "tests/support/isa/bit_model.h"
#include "tests/support/isa/emulator.h"
#include "tests/support/isa/evex_instruction.h"

namespace kt::test {
namespace {

struct alignas(64) Words {
  std::array<std::uint32_t, 16> word;
  bool operator==(const Words&) const = default;
};

Words counting(std::uint32_t first) {
  Words w{};
  for (std::uint32_t i = 0; i < 16; ++i) w.word[i] = first + i;
  return w;
}

bool native() { return (kernels::cpu_features() & kernels::kAvx512Bf16) != 0; }

class EvexEmulator : public testing::Test {
 protected:
  void SetUp() override {
    if (!native() && !emulates_avx512())
      GTEST_SKIP() << "the emulator needs a CPU with AVX2 and FMA, and without a part of AVX-512";
  }
};

TEST_F(EvexEmulator, LoadsAndStoresCarryAll512BitsOfLowAndHighRegisters) {
  const Words in = counting(100);
  Words low{}, high{};
  __asm__ volatile("vmovups %2, %%zmm3\n vmovaps %%zmm3, %%zmm29\n vmovdqu64 %%zmm3, %0\n vmovdqa64 %%zmm29, %1"
                   : "=m"(low), "=m"(high)
                   : "m"(in)
                   : "xmm3");
  EXPECT_EQ(low, in);
  EXPECT_EQ(high, in);
}

TEST_F(EvexEmulator, AVexInstructionZeroesTheUpperHalfAndIsSeenByTheNextEvexOne) {
  const Words in = counting(1);
  Words out{};
  __asm__ volatile("vmovups %1, %%zmm2\n vpaddd %%ymm2, %%ymm2, %%ymm2\n vmovups %%zmm2, %0"  // vpaddd is VEX here
                   : "=m"(out)
                   : "m"(in)
                   : "xmm2");
  for (std::uint32_t i = 0; i < 16; ++i) EXPECT_EQ(out.word[i], i < 8 ? 2 * in.word[i] : 0) << "word " << i;
}

TEST_F(EvexEmulator, AVexInstructionReadsTheLowHalfThatAnEvexOneWrote) {
  const Words in = counting(7);
  Words out{};
  __asm__ volatile("vmovups %1, %%zmm2\n vextracti128 $1, %%ymm2, %%xmm5\n vmovdqu %%xmm5, %0\n vzeroupper"
                   : "=m"(out)
                   : "m"(in)
                   : "xmm2", "xmm5");
  for (std::uint32_t i = 0; i < 4; ++i) EXPECT_EQ(out.word[i], in.word[4 + i]);
}

TEST_F(EvexEmulator, ShorterVectorsZeroEverythingAboveThem) {
  const Words ones = counting(50);
  Words out{};
  __asm__ volatile("vmovups %1, %%zmm17\n vmovups %1, %%zmm18\n vpaddd %%ymm18, %%ymm17, %%ymm17\n vmovups %%zmm17, %0"
                   : "=m"(out)
                   : "m"(ones));
  for (std::uint32_t i = 0; i < 16; ++i) EXPECT_EQ(out.word[i], i < 8 ? 2 * ones.word[i] : 0);
}

TEST_F(EvexEmulator, MasksMergeOrZeroAndMaskedOffMemoryIsNotTouched) {
  const Words a = counting(0x1000);
  Words merged{}, zeroed{}, stored = counting(1);
  __asm__ volatile(
      "mov $0x0ff5, %%eax\n kmovw %%eax, %%k3\n kmovw %%k3, %%k2\n kmovw %%k2, %%ecx\n"
      "vpxord %%zmm20, %%zmm20, %%zmm20\n vpbroadcastd %%eax, %%zmm21\n vmovups %3, %%zmm22\n"
      "vpord %%zmm22, %%zmm20, %%zmm21%{%%k2%}\n vmovups %%zmm21, %0\n"
      "vmovaps %%zmm22, %%zmm23%{%%k2%}%{z%}\n vmovups %%zmm23, %1\n"
      "vmovups %%zmm22, %2%{%%k2%}\n"
      "kxorw %%k2, %%k2, %%k2\n kmovw %%k2, %%ecx\n vmovups (%%rcx), %%zmm24%{%%k2%}%{z%}"  // reads nothing at address
                                                                                            // 0
      : "=m"(merged), "=m"(zeroed), "+m"(stored)
      : "m"(a)
      : "eax", "ecx");
  for (std::uint32_t i = 0; i < 16; ++i) {
    const bool active = (0x0ff5u >> i & 1) != 0;
    EXPECT_EQ(merged.word[i], active ? a.word[i] : 0x0ff5u) << "word " << i;
    EXPECT_EQ(zeroed.word[i], active ? a.word[i] : 0u) << "word " << i;
    EXPECT_EQ(stored.word[i], active ? a.word[i] : 1 + i) << "word " << i;
  }
}

TEST_F(EvexEmulator, GeneralRegistersAreBroadcastAsWordsAndDoublewords) {
  Words doublewords{}, words{};
  __asm__ volatile(
      "mov $0x12345678, %%eax\n vpbroadcastd %%eax, %%zmm16\n vpbroadcastw %%eax, %%zmm17\n"
      "vmovups %%zmm16, %0\n vmovups %%zmm17, %1"
      : "=m"(doublewords), "=m"(words)
      :
      : "eax");
  for (std::uint32_t i = 0; i < 16; ++i) {
    EXPECT_EQ(doublewords.word[i], 0x12345678u) << "word " << i;
    EXPECT_EQ(words.word[i], 0x56785678u) << "word " << i;
  }
}

TEST_F(EvexEmulator, AddressesHaveBaseIndexScaleAndCompressedDisplacements) {
  std::array<Words, 8> memory{};
  for (std::uint32_t i = 0; i < 8; ++i) memory[i] = counting(100 * i);
  const std::uint64_t index = 16;  // · 8 = two vectors
  Words compressed{}, wide{}, element{};
  __asm__ volatile(
      "mov %4, %%r12\n vmovups 64(%3), %%zmm16\n vmovups %%zmm16, %0\n"
      "vmovups 68(%3,%%r12,8), %%zmm16\n vmovups %%zmm16, %1\n"  // 68 is no multiple of 64: disp32
      "vpxord %%zmm17, %%zmm17, %%zmm17\n vpaddd -4(%3,%%r12,8)%{1to16%}, %%zmm17, %%zmm16\n vmovups %%zmm16, %2"
      : "=m"(compressed), "=m"(wide), "=m"(element)
      : "r"(memory.data()), "r"(index), "m"(memory)
      : "r12");
  EXPECT_EQ(compressed, memory[1]);
  EXPECT_EQ(wide.word[0], 301u);
  EXPECT_EQ(wide.word[15], 400u);
  for (const std::uint32_t word : element.word) EXPECT_EQ(word, 115u);
}

alignas(64)
    [[gnu::used]] const std::uint32_t static_words[16] = {5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15, 16, 17, 18, 19, 20};

TEST_F(EvexEmulator, IpRelativeAddressesCountFromTheNextInstruction) {
  Words loaded{};
  Words shuffled{};
  __asm__ volatile(
      "vmovdqa32 %2, %%zmm19\n vmovups %%zmm19, %0\n"
      "valignd $3, %2, %%zmm19, %%zmm19\n vmovups %%zmm19, %1"  // an immediate follows the displacement
      : "=m"(loaded), "=m"(shuffled)
      : "m"(static_words));
  for (std::uint32_t i = 0; i < 16; ++i) {
    EXPECT_EQ(loaded.word[i], 5 + i);
    EXPECT_EQ(shuffled.word[i], 5 + (i + 3) % 16);
  }
}

TEST_F(EvexEmulator, FlagsGeneralRegistersAndTheRedZoneSurvive) {
  std::uint64_t wrong = 1;
  __asm__ volatile(
      "mov $0x1122334455667788, %%rbx\n mov %%rbx, -8(%%rsp)\n mov %%rbx, -120(%%rsp)\n"
      "mov $0xd5, %%eax\n mov %%al, %%ah\n sahf\n"
      "vpbroadcastd %%ebx, %%zmm16\n vpaddd %%zmm16, %%zmm16, %%zmm16\n"
      "lahf\n movzbl %%ah, %%eax\n and $0xd5, %%eax\n xor $0xd5, %%eax\n"
      "mov -8(%%rsp), %%rcx\n xor %%rbx, %%rcx\n or %%rcx, %%rax\n mov -120(%%rsp), %%rcx\n xor %%rbx, %%rcx\n"
      "or %%rcx, %%rax\n mov %%rax, %0"
      : "=r"(wrong)
      :
      : "rax", "rbx", "rcx", "cc", "memory");
  EXPECT_EQ(wrong, 0u);
}

TEST_F(EvexEmulator, IntegersAreShiftedConvertedComparedAndMergedAsSigned) {
  Words a{}, b{}, shifted{}, converted{}, larger{}, merged{};
  for (std::uint32_t i = 0; i < 16; ++i) {
    a.word[i] = i * 0x13579bdfu;
    b.word[i] = 0x80000000u - i * i * 0x01020304u;
  }
  __asm__ volatile(
      "vmovups %4, %%zmm16\n vmovups %5, %%zmm17\n"
      "vpsrad $28, %%zmm16, %%zmm18\n vmovups %%zmm18, %0\n"
      "vcvtdq2ps %%zmm16, %%zmm18\n vmovups %%zmm18, %1\n"
      "vpmaxsd %%zmm17, %%zmm16, %%zmm18\n vmovups %%zmm18, %2\n"
      "vpternlogd $0xca, %%zmm17, %%zmm16, %%zmm18\n vmovups %%zmm18, %3"  // a where zmm18 has ones, else b
      : "=m"(shifted), "=m"(converted), "=m"(larger), "=m"(merged)
      : "m"(a), "m"(b));
  for (std::size_t i = 0; i < 16; ++i) {
    const auto x = static_cast<std::int32_t>(a.word[i]);
    const auto y = static_cast<std::int32_t>(b.word[i]);
    const std::uint32_t max = x > y ? a.word[i] : b.word[i];
    EXPECT_EQ(static_cast<std::int32_t>(shifted.word[i]), x >> 28) << x;
    EXPECT_EQ(std::bit_cast<float>(converted.word[i]), static_cast<float>(x)) << x;
    EXPECT_EQ(larger.word[i], max) << x << " " << y;
    EXPECT_EQ(merged.word[i], (max & a.word[i]) | (~max & b.word[i])) << "word " << i;
  }
}

TEST_F(EvexEmulator, LanesOfTwoVectorsArePermutedByIndex) {
  Words a{}, b{}, index{}, got{};
  for (std::uint32_t i = 0; i < 16; ++i) {
    a.word[i] = 100 + i;
    b.word[i] = 200 + i;
    index.word[i] = (i * 7 + 3) | i << 8;  // Bits above the fifth do not count.
  }
  __asm__ volatile(
      "vmovups %1, %%zmm16\n vmovups %2, %%zmm17\n vmovups %3, %%zmm18\n"
      "vpermt2ps %%zmm17, %%zmm18, %%zmm16\n vmovups %%zmm16, %0"
      : "=m"(got)
      : "m"(a), "m"(b), "m"(index));
  for (std::size_t i = 0; i < 16; ++i) {
    const std::uint32_t from = index.word[i] & 31;
    EXPECT_EQ(got.word[i], from < 16 ? 100 + from : 200 + from - 16) << "word " << i;
  }
}

TEST_F(EvexEmulator, Vdpbf16psFollowsItsBitModelForAnyBits) {
  const auto seed = static_cast<std::uint32_t>(testing::UnitTest::GetInstance()->random_seed());
  std::cout << "seed " << seed << "\n";
  std::mt19937 random(seed);
  const kernels::KernelTable* table = nullptr;
  for (const kernels::KernelTable* each : kernels::all_tables())
    if (each->name == "avx512") table = each;
  ASSERT_NE(table, nullptr);
  for (int round = 0; round < 2000; ++round) {
    Words a{}, b{}, acc{};
    for (std::size_t i = 0; i < 16; ++i) {
      // Any bits; else exponents whose products and sums lie around the smallest normal number.
      const std::uint32_t keep = round % 2 == 0 ? 0xffffffffu : 0x80ff80ffu;
      const std::uint32_t set = round % 2 == 0 ? 0u : 0x20002000u;
      a.word[i] = (static_cast<std::uint32_t>(random()) & keep) | set;
      b.word[i] = (static_cast<std::uint32_t>(random()) & keep) | set;
      acc.word[i] = static_cast<std::uint32_t>(random()) & (round % 2 == 0 ? 0xffffffffu : 0x81ffffffu);
    }
    Words got = acc;
    __asm__ volatile(
        "vmovups %1, %%zmm16\n vmovups %2, %%zmm17\n vmovups %0, %%zmm18\n"
        "vdpbf16ps %%zmm17, %%zmm16, %%zmm18\n vmovups %%zmm18, %0"
        : "+m"(got)
        : "m"(a), "m"(b));
    for (std::size_t i = 0; i < 16; ++i) {
      const float want = dot_model(*table, std::bit_cast<float>(acc.word[i]), &a.word[i], &b.word[i], 2);
      ASSERT_TRUE(same_bits(want, std::bit_cast<float>(got.word[i])))
          << std::hex << a.word[i] << " " << b.word[i] << " " << acc.word[i] << " -> " << got.word[i];
    }
  }
}

TEST_F(EvexEmulator, EveryThreadHasItsOwnRegisters) {
  if (native()) GTEST_SKIP() << "natively zmm30 belongs to whoever is called in between";
  const Words mine = counting(1);
  Words out{};
  __asm__ volatile("vmovups %0, %%zmm30" ::"m"(mine));
  std::thread([] {
    const Words theirs = counting(900);
    __asm__ volatile("vmovups %0, %%zmm30" ::"m"(theirs));
  }).join();
  __asm__ volatile("vmovups %%zmm30, %0" : "=m"(out));
  EXPECT_EQ(out, mine);
}

TEST_F(EvexEmulator, WhatItDoesNotKnowEndsTheProcessWithTheBytes) {
  if (native()) GTEST_SKIP() << "the CPU executes it";
  EXPECT_DEATH(__asm__ volatile("vpconflictd %zmm1, %zmm2"), "unknown instruction\n  at 0x.*: 62 f2 7d 48 c4 d1");
  EXPECT_DEATH(__asm__ volatile("vaddps {rn-sae}, %zmm1, %zmm2, %zmm2"), "unknown instruction");
  EXPECT_DEATH(__builtin_trap(), "unknown instruction\n  at 0x.*: 0f 0b");
}

TEST_F(EvexEmulator, WhatHardwareWouldRefuseEndsTheProcess) {
  if (native()) GTEST_SKIP() << "the CPU refuses it itself";
  const std::array<Words, 2> memory{};
  const auto* unaligned = static_cast<const char*>(static_cast<const void*>(memory.data())) + 4;
  EXPECT_DEATH(__asm__ volatile("vmovaps (%0), %%zmm16" ::"r"(unaligned), "m"(memory)), "unaligned address");
  const std::uint32_t towards_zero = 0x7f80;
  EXPECT_DEATH(__asm__ volatile("ldmxcsr %0\n vpxord %%zmm16, %%zmm16, %%zmm16" ::"m"(towards_zero)), "MXCSR");
}

TEST(EvexDecoder, FormsOutsideTheListAreUnknown) {
  const auto decodes = [](std::array<std::uint8_t, 15> code) { return decode_instruction(code.data()).has_value(); };
  EXPECT_TRUE(decodes({0x62, 0xf1, 0x74, 0x48, 0x58, 0xd1}));   // vaddps zmm2, zmm1, zmm1
  EXPECT_FALSE(decodes({0x62, 0xf9, 0x74, 0x48, 0x58, 0xd1}));  // a reserved bit
  EXPECT_FALSE(decodes({0x62, 0xf1, 0x70, 0x48, 0x58, 0xd1}));  // the fixed bit cleared
  EXPECT_FALSE(decodes({0x62, 0xf1, 0xf4, 0x48, 0x58, 0xd1}));  // W1: another instruction
  EXPECT_FALSE(decodes({0x62, 0xf1, 0x74, 0x68, 0x58, 0xd1}));  // vector length 3
  EXPECT_FALSE(decodes({0x62, 0xf1, 0x74, 0xc8, 0x58, 0xd1}));  // zeroing without a mask
  EXPECT_FALSE(decodes({0x62, 0xf1, 0x74, 0x48, 0x10, 0x00}));  // vmovups with a second operand
  EXPECT_FALSE(decodes({0x62, 0xf1, 0x7c, 0x58, 0x10, 0x00}));  // vmovups with a broadcast
  EXPECT_FALSE(decodes({0xc5, 0xf0, 0x58, 0xd1}));              // VEX vaddps
  EXPECT_TRUE(decodes({0xc5, 0xf4, 0x47, 0xc9}));               // kxorw k1, k1, k1
}

}  // namespace
}  // namespace kt::test
