// The loop nests of the amx table over tiles in C++: the same source that the compiled table has, at full size on any
// CPU with AVX2 and FMA, with what it does counted.
#pragma once
#include <gtest/gtest.h>

#include <cstddef>
#include <cstdint>

#define KT_TABLE amx_nest
#include "kernels/amx/nest.inl"
#include "tests/support/isa/amx_tiles.h"

namespace kt::test {

// A Tile of nest.inl. What hardware would refuse fails the test.
class SoftwareTile {
 public:
  void configure(const kernels::amx_nest::TileConfig& config) {
    check(tiles_.configure(static_cast<const std::uint8_t*>(static_cast<const void*>(&config))));
  }
  void release() { tiles_.release(); }
  template <int kTile>
  void zero() {
    check(tiles_.zero(kTile));
  }
  template <int kTile>
  void load(const void* rows, std::int64_t stride) {
    check(tiles_.load(kTile, static_cast<const std::uint8_t*>(rows), stride));
  }
  template <int kTile>
  void store(void* rows, std::int64_t stride) {
    check(tiles_.store(kTile, static_cast<std::uint8_t*>(rows), stride));
  }
  template <int kC, int kA, int kB>
  void dot() {
    check(tiles_.dot(kC, kA, kB));
  }

  const AmxTiles& tiles() const { return tiles_; }

  static bool runs_here() { return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma"); }

 private:
  static void check(const char* why) {
    if (why != nullptr) ADD_FAILURE() << why;
  }

  AmxTiles tiles_;
};

// gemm of the amx table in software tiles; what it did.
inline TileCounts software_gemm(const void* a, std::int64_t lda, std::int64_t m, const kernels::Panels& w, float* c,
                                std::int64_t ldc, bool accumulate, const kernels::Fetch& next = {}) {
  SoftwareTile tile;
  kernels::amx_nest::multiply(tile, {static_cast<const std::uint16_t*>(a), lda, w, c, ldc, accumulate, next}, m);
  EXPECT_FALSE(tile.tiles().configured()) << "gemm leaves tiles configured";
  return tile.tiles().counts();
}

}  // namespace kt::test
