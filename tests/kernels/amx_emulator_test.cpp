// Emulated tiles against what the manual says, one property at a time. Natively where the CPU has AMX: the same
// instructions must then give the same results, except for what only the emulator refuses.
#include <gtest/gtest.h>

#include <array>
#include <bit>
#include <cstring>
#include <iostream>
#include <random>
#include <thread>
#include <vector>

#include "kernels/cpu_features.h"
#include "tests/support/isa/amx_execute.h"
#include "tests/support/isa/amx_instruction.h"
#include "tests/support/isa/bit_model.h"
#include "tests/support/isa/emulator.h"

namespace kt::test {
namespace {

// What LDTILECFG reads.
struct alignas(64) Config {
  std::array<std::uint8_t, 64> byte{};

  Config& tile(std::size_t t, std::int64_t rows, std::int64_t row_bytes) {
    byte[0] = 1;
    byte[16 + 2 * t] = static_cast<std::uint8_t>(row_bytes);
    byte[48 + t] = static_cast<std::uint8_t>(rows);
    return *this;
  }
};

// Eight whole tiles.
Config whole_tiles() {
  Config config;
  for (std::size_t t = 0; t < 8; ++t) config.tile(t, 16, 64);
  return config;
}

void load_config(const Config& config) { __asm__ volatile("ldtilecfg %0" ::"m"(config)); }

bool native() { return (kernels::cpu_features() & kernels::kAmxBf16) != 0; }

class AmxEmulator : public testing::Test {
 protected:
  void SetUp() override {
    if (!native() && !install_emulator()) GTEST_SKIP() << "the emulator needs a CPU with AVX2 and FMA";
    permit_tiles(true);
    const auto seed = static_cast<std::uint32_t>(testing::UnitTest::GetInstance()->random_seed());
    random_.seed(seed);
    std::cout << "seed " << seed << "\n";
  }

  void TearDown() override {
    if (!IsSkipped()) __asm__ volatile("tilerelease");
    permit_tiles(false);
  }

  int number(int low, int high) { return std::uniform_int_distribution<int>(low, high)(random_); }

  std::vector<std::uint8_t> bytes(std::size_t count) {
    std::vector<std::uint8_t> out(count);
    for (std::uint8_t& byte : out) byte = static_cast<std::uint8_t>(random_());
    return out;
  }

  std::mt19937 random_;
};

enum class Values { kAnyBits, kNormal, kNearSubnormal };

// Words of two bf16, or floats: any bits, or exponents around 1, or such that products lie around the smallest normal
// number.
void fill_words(std::mt19937& random, Values values, bool floats, std::vector<std::uint8_t>& bytes) {
  for (std::size_t at = 0; at < bytes.size(); at += 4) {
    auto word = static_cast<std::uint32_t>(random());
    if (values == Values::kNormal) word = (word & 0x81ff81ffu) | 0x3e003e00u;
    if (values == Values::kNearSubnormal) word = floats ? word & 0x81ffffffu : (word & 0x80ff80ffu) | 0x20002000u;
    std::memcpy(bytes.data() + at, &word, sizeof word);
  }
}

struct Dot {
  std::int64_t rows, columns, pairs;
  std::int64_t lda, ldb, ldc;  // bytes
  std::vector<std::uint8_t> a, b, c;
};

// The element that C must hold after c += a · b.
float expected(const Dot& dot, std::int64_t row, std::int64_t column) {
  std::vector<std::uint16_t> left(static_cast<std::size_t>(2 * dot.pairs)), right(left.size());
  std::memcpy(left.data(), dot.a.data() + row * dot.lda, left.size() * 2);
  for (std::int64_t pair = 0; pair < dot.pairs; ++pair)
    std::memcpy(right.data() + 2 * pair, dot.b.data() + pair * dot.ldb + 4 * column, 4);
  float start;
  std::memcpy(&start, dot.c.data() + row * dot.ldc + 4 * column, sizeof start);
  return tdpbf16ps_model(start, left.data(), right.data(), dot.pairs);
}

// C after the instructions: tmm0 = C, tmm1 = A, tmm2 = B.
std::vector<std::uint8_t> run(const Dot& dot) {
  Config config;
  config.tile(0, dot.rows, 4 * dot.columns).tile(1, dot.rows, 4 * dot.pairs).tile(2, dot.pairs, 4 * dot.columns);
  std::vector<std::uint8_t> out = dot.c;
  load_config(config);
  __asm__ volatile(
      "tileloadd (%0,%1,1), %%tmm0\n tileloadd (%2,%3,1), %%tmm1\n tileloadd (%4,%5,1), %%tmm2\n"
      "tdpbf16ps %%tmm2, %%tmm1, %%tmm0\n tilestored %%tmm0, (%0,%1,1)"
      :
      : "r"(out.data()), "r"(dot.ldc), "r"(dot.a.data()), "r"(dot.lda), "r"(dot.b.data()), "r"(dot.ldb)
      : "memory");
  return out;
}

TEST_F(AmxEmulator, Tdpbf16psFollowsItsModelForEveryShapeAndAnyBitsAndWritesNothingElse) {
  for (int round = 0; round < 3000; ++round) {
    const bool whole = round % 50 == 0;
    Dot dot{};
    dot.rows = whole ? 16 : number(1, 16);
    dot.columns = whole ? 16 : number(1, 16);
    dot.pairs = whole ? 16 : number(1, 16);
    dot.lda = 64 + 4 * number(0, 16);
    dot.ldb = 64 + 4 * number(0, 16);
    dot.ldc = 64 + 4 * number(0, 16);
    const auto values = static_cast<Values>(round % 3);
    for (auto* matrix : {&dot.a, &dot.b, &dot.c}) {
      matrix->resize(16 * 128);
      fill_words(random_, values, matrix == &dot.c, *matrix);
    }
    std::vector<std::uint8_t> want = dot.c;
    const std::vector<std::uint8_t> got = run(dot);
    for (std::int64_t row = 0; row < dot.rows; ++row) {
      for (std::int64_t column = 0; column < dot.columns; ++column) {
        const std::int64_t at = row * dot.ldc + 4 * column;
        const float model = expected(dot, row, column);
        float value;
        std::memcpy(&value, got.data() + at, sizeof value);
        ASSERT_TRUE(same_bits(model, value)) << dot.rows << " x " << dot.columns << " x " << dot.pairs << " at [" << row
                                             << ", " << column << "]: " << model << " became " << value;
        std::memcpy(want.data() + at, &value, sizeof value);
      }
    }
    ASSERT_EQ(want, got) << "wrote outside the tile";
  }
}

TEST_F(AmxEmulator, RowsAndColumnsOutsideATileAreZero) {
  // A tile of 3 rows of 12 bytes is loaded, and a product with ones in a larger B adds what its rows hold: nothing more
  // than those rows. Configured anew, every tile is zero.
  const std::vector<std::uint8_t> in = bytes(16 * 64);
  std::vector<std::uint8_t> out(16 * 64, 0xff);
  load_config(Config().tile(5, 3, 12));
  __asm__ volatile("tileloadd (%0,%1,1), %%tmm5" ::"r"(in.data()), "r"(std::int64_t{64}) : "memory");
  load_config(whole_tiles());
  __asm__ volatile("tilestored %%tmm5, (%0,%1,1)" ::"r"(out.data()), "r"(std::int64_t{64}) : "memory");
  for (const std::uint8_t byte : out) ASSERT_EQ(byte, 0);
}

TEST_F(AmxEmulator, ZeroedTilesAreZeroAndOthersKeepTheirRows) {
  const std::vector<std::uint8_t> in = bytes(16 * 64);
  std::vector<std::uint8_t> zeroed(16 * 64, 0xff), kept(16 * 64, 0xff);
  load_config(whole_tiles());
  __asm__ volatile(
      "tileloadd (%0,%3,1), %%tmm3\n tileloadd (%0,%3,1), %%tmm4\n tilezero %%tmm3\n"
      "tilestored %%tmm3, (%1,%3,1)\n tilestored %%tmm4, (%2,%3,1)"
      :
      : "r"(in.data()), "r"(zeroed.data()), "r"(kept.data()), "r"(std::int64_t{64})
      : "memory");
  for (const std::uint8_t byte : zeroed) ASSERT_EQ(byte, 0);
  EXPECT_EQ(kept, in);
}

TEST_F(AmxEmulator, AddressesHaveBaseStrideScaleAndDisplacement) {
  const std::vector<std::uint8_t> in = bytes(16 * 64 + 4096);
  std::array<std::vector<std::uint8_t>, 4> out;
  out.fill(std::vector<std::uint8_t>(2 * 64));
  Config config;
  for (std::size_t t = 0; t < 8; ++t) config.tile(t, 2, 64);
  load_config(config);
  __asm__ volatile(
      "mov %0, %%r13\n mov $64, %%r12\n mov $32, %%r9\n"
      "tileloadd (%%r13,%%r12,1), %%tmm0\n tilestored %%tmm0, (%1,%%r12,1)\n"
      "tileloadd 64(%%r13,%%r9,4), %%tmm1\n tilestored %%tmm1, (%2,%%r9,2)\n"
      "tileloadd 4000(%%r13,%%r12,1), %%tmm7\n tilestored %%tmm7, (%3,%%r12,1)\n"
      "lea 640(%%r13), %%r13\n neg %%r12\n tileloadd -64(%%r13,%%r12,2), %%tmm6\n neg %%r12\n"
      "tilestored %%tmm6, (%4,%%r12,1)"
      :
      : "r"(in.data()), "r"(out[0].data()), "r"(out[1].data()), "r"(out[2].data()), "r"(out[3].data())
      : "r9", "r12", "r13", "memory");
  const std::array<std::array<std::ptrdiff_t, 2>, 4> rows = {{{0, 64}, {64, 192}, {4000, 4064}, {576, 448}}};
  for (std::size_t i = 0; i < 4; ++i)
    for (std::size_t row = 0; row < 2; ++row)
      EXPECT_EQ(std::memcmp(out[i].data() + 64 * row, in.data() + rows[i][row], 64), 0) << i << ", row " << row;
}

TEST_F(AmxEmulator, FlagsGeneralAndVectorRegistersAndTheRoundingModeSurvive) {
  const Config config = whole_tiles();
  const std::array<std::uint32_t, 8> vector = {1, 2, 3, 4, 5, 6, 7, 8};
  std::array<std::uint32_t, 8> vector_after{};
  std::uint64_t wrong = 1;
  std::uint32_t mxcsr = 0;
  __asm__ volatile(
      "ldtilecfg %4\n vmovdqu %3, %%ymm9\n"
      "mov $0x1122334455667788, %%rbx\n mov %%rbx, -8(%%rsp)\n mov %%rbx, -120(%%rsp)\n"
      "mov $0xd5, %%eax\n mov %%al, %%ah\n sahf\n"
      "tilezero %%tmm0\n tilezero %%tmm1\n tilezero %%tmm2\n tdpbf16ps %%tmm2, %%tmm1, %%tmm0\n"
      "lahf\n movzbl %%ah, %%eax\n and $0xd5, %%eax\n xor $0xd5, %%eax\n"
      "mov -8(%%rsp), %%rcx\n xor %%rbx, %%rcx\n or %%rcx, %%rax\n mov -120(%%rsp), %%rcx\n xor %%rbx, %%rcx\n"
      "or %%rcx, %%rax\n mov %%rax, %0\n stmxcsr %2\n vmovdqu %%ymm9, %1"
      : "=m"(wrong), "=m"(vector_after), "=m"(mxcsr)
      : "m"(vector), "m"(config)
      : "rax", "rbx", "rcx", "xmm9", "cc", "memory");
  EXPECT_EQ(wrong, 0u);
  EXPECT_EQ(vector_after, vector);
  EXPECT_EQ(mxcsr & 0xffc0u, 0x1f80u);
}

TEST_F(AmxEmulator, EveryThreadHasItsOwnTiles) {
  const std::vector<std::uint8_t> mine = bytes(16 * 64);
  const std::vector<std::uint8_t> theirs = bytes(16 * 64);
  std::vector<std::uint8_t> out(16 * 64);
  load_config(whole_tiles());
  __asm__ volatile("tileloadd (%0,%1,1), %%tmm2" ::"r"(mine.data()), "r"(std::int64_t{64}) : "memory");
  std::thread([&] {
    load_config(whole_tiles());
    __asm__ volatile("tileloadd (%0,%1,1), %%tmm2\n tilerelease" ::"r"(theirs.data()), "r"(std::int64_t{64})
                     : "memory");
  }).join();
  __asm__ volatile("tilestored %%tmm2, (%0,%1,1)" ::"r"(out.data()), "r"(std::int64_t{64}) : "memory");
  EXPECT_EQ(out, mine);
}

TEST_F(AmxEmulator, WhatHardwareWouldRefuseEndsTheProcess) {
  if (native()) GTEST_SKIP() << "the CPU refuses it itself";
  EXPECT_DEATH(__asm__ volatile("tilezero %tmm0"), "tiles are not configured\n  at 0x.*: c4 e2 7b 49 c0");
  EXPECT_DEATH(
      {
        load_config(whole_tiles());
        __asm__ volatile("tilerelease\n tilezero %tmm0");
      },
      "tiles are not configured");
  const std::array<std::uint8_t, 64> memory{};
  const auto load_tile_1 = [&] {
    __asm__ volatile("tileloadd (%0,%1,1), %%tmm1" ::"r"(memory.data()), "r"(std::int64_t{0}) : "memory");
  };
  const auto dot = [] { __asm__ volatile("tdpbf16ps %tmm2, %tmm1, %tmm0"); };
  EXPECT_DEATH((load_config(Config().tile(0, 16, 64)), load_tile_1()), "a tile that the configuration leaves out");
  // C 4 x 8, A 4 x 6 pairs, B 6 pairs x 8: each dimension wrong in turn.
  EXPECT_DEATH((load_config(Config().tile(0, 5, 32).tile(1, 4, 24).tile(2, 6, 32)), dot()), "do not fit together");
  EXPECT_DEATH((load_config(Config().tile(0, 4, 28).tile(1, 4, 24).tile(2, 6, 32)), dot()), "do not fit together");
  EXPECT_DEATH((load_config(Config().tile(0, 4, 32).tile(1, 4, 20).tile(2, 6, 32)), dot()), "do not fit together");
  // tdpbf16ps %tmm1, %tmm1, %tmm0, which no assembler takes.
  const auto dot_of_one = [] { __asm__ volatile(".byte 0xc4, 0xe2, 0x72, 0x5c, 0xc1"); };
  EXPECT_DEATH((load_config(whole_tiles()), dot_of_one()), "three operands must be different");
}

TEST_F(AmxEmulator, ConfigurationsThatHardwareWouldRefuseEndTheProcess) {
  if (native()) GTEST_SKIP() << "the CPU refuses it itself";
  const auto with = [](std::size_t at, std::uint8_t value) {
    Config config = whole_tiles();
    config.byte[at] = value;
    return config;
  };
  EXPECT_DEATH(load_config(with(0, 2)), "a palette other than 1");
  EXPECT_DEATH(load_config(with(0, 0)), "a palette other than 1");
  EXPECT_DEATH(load_config(with(1, 3)), "a start row");
  EXPECT_DEATH(load_config(with(7, 1)), "not zero");
  EXPECT_DEATH(load_config(with(33, 1)), "not zero");  // row bytes of a ninth tile
  EXPECT_DEATH(load_config(with(56, 1)), "not zero");  // rows of a ninth tile
  EXPECT_DEATH(load_config(with(50, 17)), "larger than 16 rows");
  EXPECT_DEATH(load_config(with(16, 68)), "larger than 16 rows");
  EXPECT_DEATH(load_config(with(50, 0)), "rows but no columns, or the reverse");
  EXPECT_DEATH(load_config(with(16, 0)), "rows but no columns, or the reverse");
  EXPECT_DEATH(load_config(with(16, 62)), "whole 4-byte words");
}

TEST_F(AmxEmulator, TilesWithoutPermissionEndTheProcess) {
  if (native()) GTEST_SKIP() << "it was asked for and cannot be given back";
  permit_tiles(false);
  EXPECT_DEATH(load_config(whole_tiles()), "before arch_prctl\\(ARCH_REQ_XCOMP_PERM, 18\\) was asked");
  permit_tiles(true);
}

std::optional<Instruction> decode(std::array<std::uint8_t, 15> code) { return decode_amx(code.data()); }

TEST(AmxDecoder, KnowsEveryFormThatTheTableUses) {
  EXPECT_EQ(decode({0xc4, 0xe2, 0x78, 0x49, 0xc0})->op, Op::kTileRelease);
  const auto config = decode({0xc4, 0xe2, 0x78, 0x49, 0x44, 0x24, 0x88});  // ldtilecfg -120(%rsp)
  ASSERT_TRUE(config);
  EXPECT_EQ(config->op, Op::kTileConfigure);
  EXPECT_EQ(config->length, 7);
  EXPECT_EQ(config->base, 4);
  EXPECT_EQ(config->index, -1);
  EXPECT_EQ(config->displacement, -120);
  const auto zero = decode({0xc4, 0xe2, 0x7b, 0x49, 0xf8});  // tilezero %tmm7
  ASSERT_TRUE(zero);
  EXPECT_EQ(zero->op, Op::kTileZero);
  EXPECT_EQ(zero->reg, 7);
  const auto load =
      decode({0xc4, 0x82, 0x7b, 0x4b, 0xb4, 0xb5, 0x00, 0x10, 0, 0});  // tileloadd 4096(%r13,%r14,4),%tmm6
  ASSERT_TRUE(load);
  EXPECT_EQ(load->op, Op::kTileLoad);
  EXPECT_EQ(load->length, 10);
  EXPECT_EQ(load->reg, 6);
  EXPECT_EQ(load->base, 13);
  EXPECT_EQ(load->index, 14);
  EXPECT_EQ(load->scale, 2);
  EXPECT_EQ(load->displacement, 4096);
  const auto store = decode({0xc4, 0xe2, 0x7a, 0x4b, 0x14, 0x08});  // tilestored %tmm2, (%rax,%rcx)
  ASSERT_TRUE(store);
  EXPECT_EQ(store->op, Op::kTileStore);
  EXPECT_EQ(store->reg, 2);
  EXPECT_EQ(store->base, 0);
  EXPECT_EQ(store->index, 1);
  const auto dot = decode({0xc4, 0xe2, 0x42, 0x5c, 0xdd});  // tdpbf16ps %tmm7, %tmm5, %tmm3
  ASSERT_TRUE(dot);
  EXPECT_EQ(dot->op, Op::kTileDot);
  EXPECT_EQ(dot->reg, 3);
  EXPECT_EQ(dot->rm, 5);
  EXPECT_EQ(dot->second, 7);
}

TEST(AmxDecoder, FormsOutsideTheListAreUnknown) {
  EXPECT_FALSE(decode({0xc4, 0xe2, 0xf8, 0x49, 0xc0}));              // W1
  EXPECT_FALSE(decode({0xc4, 0xe2, 0x7c, 0x49, 0xc0}));              // 256 bits
  EXPECT_FALSE(decode({0xc4, 0xe1, 0x78, 0x49, 0xc0}));              // another map
  EXPECT_FALSE(decode({0xc4, 0xe2, 0x70, 0x49, 0xc0}));              // vvvv in tilerelease
  EXPECT_FALSE(decode({0xc4, 0xe2, 0x78, 0x49, 0xc1}));              // tilerelease with a register
  EXPECT_FALSE(decode({0xc4, 0xe2, 0x79, 0x49, 0x00}));              // sttilecfg
  EXPECT_FALSE(decode({0xc4, 0xe2, 0x78, 0x49, 0x08}));              // ldtilecfg /1
  EXPECT_FALSE(decode({0xc4, 0xe2, 0x7b, 0x49, 0xc1}));              // tilezero with a second register
  EXPECT_FALSE(decode({0xc4, 0xe2, 0x7b, 0x4b, 0x00}));              // tileloadd without SIB
  EXPECT_FALSE(decode({0xc4, 0xe2, 0x79, 0x4b, 0x04, 0x08}));        // tileloaddt1
  EXPECT_FALSE(decode({0xc4, 0x62, 0x7b, 0x4b, 0x04, 0x08}));        // tmm8
  EXPECT_FALSE(decode({0xc4, 0xe2, 0x73, 0x5e, 0xc1}));              // tdpbssd
  EXPECT_FALSE(decode({0xc4, 0xe2, 0x43, 0x5c, 0xdd}));              // tdpfp16ps
  EXPECT_FALSE(decode({0xc4, 0xe2, 0x42, 0x5c, 0x5d, 0, 0, 0, 0}));  // tdpbf16ps with memory
  EXPECT_FALSE(decode({0xc4, 0xe2, 0x02, 0x5c, 0xdd}));              // tdpbf16ps with tmm15
  EXPECT_FALSE(decode({0xc5, 0xf8, 0x77}));                          // vzeroupper
}

}  // namespace
}  // namespace kt::test
